"""Training of early exits: states at boundaries, the papers' losses, and what a step does with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor import sharding
from mor.model import transformer
from mor.train import evaluate
from mor.train import exit_losses
from mor.train import step as step_lib
from tests.helpers import decoding
from tests.helpers import tiny

PLAIN = dict(tiny.VANILLA, num_layers=6)


def make(exit=None, **model):
  return tiny.config(model=model, exit=exit or {}, mesh=dict(data=1))


def random_batch(config):
  return jax.tree.map(jnp.asarray, tiny.batch(config))


def assert_equal(got_BTD, expected_BTD, batch):
  """Where there is a token."""
  valid_BT = np.asarray(batch["segment_BT"] != 0)
  np.testing.assert_allclose(np.asarray(got_BTD)[valid_BT], np.asarray(expected_BTD)[valid_BT], atol=1e-5)


def cut_params(config, params, after):
  return params | {"stack": jax.tree.map(lambda a: a[:after], params["stack"])}


def applied(config, variables, batch, **options):
  return transformer.Transformer(config.model).apply(
      variables, batch["tokens_BT"], batch["segment_BT"], key=jax.random.key(0), **options)


@pytest.mark.parametrize("scan", [True, False])
def test_a_plain_models_exits_are_the_models_that_end_there(scan):
  config = make(**PLAIN, scan_layers=scan)
  batch, variables = random_batch(config), decoding.draw(config.model)
  out = applied(config, variables, batch, exits=(2, 5))
  whole = applied(config, variables, batch)
  assert_equal(out.hidden_BTD, whole.hidden_BTD, batch)
  for after, state_BTD in zip((2, 5), out.exits):
    short = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=after))
    expected = applied(short, {"params": cut_params(config, variables["params"], after)}, batch).hidden_BTD
    assert_equal(state_BTD, expected, batch)


@pytest.mark.parametrize("model", [
    pytest.param(dict(sharing="cycle", num_layers=6, router=tiny.FIXED), id="cycle"),
    pytest.param(dict(sharing="cycle", num_layers=6, kv_plan="shared", router=tiny.FIXED), id="shared"),
    pytest.param(dict(sharing="cycle", num_layers=6, router=tiny.FIXED, scan_layers=False), id="unrolled"),
])
def test_a_recursive_models_exits_are_its_first_loops(model):
  config = make(**model)
  batch, variables = random_batch(config), decoding.draw(config.model)
  out = applied(config, variables, batch, exits=(2, 4))
  for loops, state_BTD in enumerate(out.exits, start=1):
    short = dataclasses.replace(config, model=dataclasses.replace(
        config.model, num_layers=2 * loops, num_recursions=loops))
    assert_equal(state_BTD, applied(short, variables, batch).hidden_BTD, batch)


@pytest.mark.parametrize("execution", ["gathered", "masked"])
def test_a_token_that_its_router_drops_keeps_its_state(execution):
  """And one that the second loop keeps has another state after it."""
  config = make(num_layers=5, execution=execution)
  batch, variables = random_batch(config), decoding.draw(config.model)
  out = applied(config, variables, batch, exits=(2, 3))
  first_BTD, second_BTD = out.exits
  same_BT = np.isclose(first_BTD, second_BTD, atol=1e-6).all(axis=-1)
  valid_BT = batch["segment_BT"] != 0
  np.testing.assert_array_equal(same_BT[valid_BT], ~np.asarray(out.keep_RBT[1])[valid_BT])


def by_hand(config, params, batch):
  """NLL of each exit and of the end, KL of each exit from the end, means over targets."""
  out = applied(config, {"params": params}, batch, exits=config.exit.layers)
  logits = [transformer.unembed(params, h) for h in (*out.exits, out.hidden_BTD)]
  mask_BT = batch["loss_mask_BT"]
  mean = lambda x_BT: jnp.sum(jnp.where(mask_BT, x_BT, 0)) / mask_BT.sum()
  log = [jax.nn.log_softmax(x) for x in logits]
  nll = [mean(-jnp.take_along_axis(x, batch["target_BT"][:, :, None], axis=2)[:, :, 0]) for x in log]
  kl = [mean(jnp.sum(jnp.exp(log[-1]) * (log[-1] - x), axis=-1)) for x in log[:-1]]
  return nll, kl


def loss_of(config, params, batch):
  state = step_lib.start(config, {"params": params})
  targets = jnp.float32(batch["loss_mask_BT"].sum())
  return step_lib.micro_loss(config, params, state, batch, None, targets, None, None, 0)


@pytest.mark.parametrize("name, fields, formula", [
    ("free", dict(layers=(2,), weighting="depth", kl=0.0), lambda nll, kl: (2 * nll[0] + 6 * nll[1]) / 8),
    ("calm", dict(layers=(1, 2, 3, 4, 5), weighting="depth", kl=0.0),
     lambda nll, kl: sum(i * x for i, x in enumerate(nll, start=1)) / 21),
    ("rrt", dict(layers=(2, 4), weighting="constant", coef=0.1, kl=0.25),
     lambda nll, kl: nll[2] + 0.1 * sum(0.75 * n + 0.25 * k for n, k in zip(nll, kl))),
])
def test_losses_are_the_papers(name, fields, formula):
  config = make(exit=fields, **PLAIN)
  batch, params = random_batch(config), decoding.draw(config.model)["params"]
  nll, kl = by_hand(config, params, batch)
  loss, (terms, _) = loss_of(config, params, batch)
  np.testing.assert_allclose(loss, formula(nll, kl), rtol=1e-5)
  for layer, value in zip(config.exit.layers, nll):
    np.testing.assert_allclose(terms[f"exit_{layer}_nll"], value, rtol=1e-5)


def test_the_end_learns_nothing_from_its_exits():
  """Of an exit's KL, the layers after it have no gradient."""
  config = make(exit=dict(layers=(2,), kl=1.0, coef=1.0), **PLAIN)
  batch, params = random_batch(config), decoding.draw(config.model)["params"]
  out_of = lambda config: jax.grad(lambda p: loss_of(config, p, batch)[0])(params)["stack"]
  with_exit, without = out_of(config), out_of(make(**PLAIN))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(axis=tuple(range(1, a.ndim))), with_exit, without)
  for change_L in jax.tree.leaves(moved):
    assert (change_L[:2] > 1e-6).all()
    np.testing.assert_allclose(change_L[2:], 0, atol=1e-6)


def test_which_layers_imitate_which():
  assert exit_losses.select_teachers(6, 24) == (4, 8, 12, 16, 20, 24)
  # From the last teacher on: nearest 2; below 2 nearest 1; below 1 nearest 0; none is left: 0 again.
  distance_TS = jnp.array([[0.0, 9, 9], [5, 1, 0], [1, 0, 9], [9, 9, 1]])
  assert list(exit_losses.assign_layers(distance_TS)) == [0, 0, 1, 2]
  assert list(exit_losses.assign_layers(jnp.array([[3.0, 2, 1], [0, 8, 8], [8, 0, 8]]))) == [0, 0, 1]


@pytest.mark.parametrize("hidden, pairs", [
    ("last", [(2, 6)]), ("uniform", [(1, 3), (2, 6)]), ("dynamic", None),
])
def test_hidden_states_imitate_deeper_ones(hidden, pairs):
  config = make(exit=dict(layers=(2,), weighting="depth", kl=0.0, hidden=hidden, hidden_coef=0.3), **PLAIN)
  batch, params = random_batch(config), decoding.draw(config.model)["params"]
  out = applied(config, {"params": params}, batch, exits=(1, 2, 3))
  states = dict(zip((1, 2, 3), out.exits)) | {6: out.hidden_BTD}
  mask_BT = batch["loss_mask_BT"]
  mse = lambda a, b: float(np.mean(np.mean((states[a] - states[b])**2, axis=-1)[mask_BT]))
  if pairs is None:  # each row has its own; nothing is below the first layer, so it serves again
    of_row = lambda i, b: float(np.sum(np.mean((states[i] - states[6])**2, axis=-1)[b][mask_BT[b]]))
    nearest = sum(min(of_row(i, b) for i in (1, 2)) for b in range(len(mask_BT))) / np.sum(mask_BT)
    expected = (mse(1, 3) + nearest) / 2
  else:
    expected = np.mean([mse(*pair) for pair in pairs])
  _, (terms, _) = loss_of(config, params, batch)
  np.testing.assert_allclose(terms["exit_hidden"], expected, rtol=1e-5)
  plain = loss_of(make(exit=dict(layers=(2,), weighting="depth", kl=0.0), **PLAIN), params, batch)[0]
  np.testing.assert_allclose(loss_of(config, params, batch)[0], plain + 0.3 * terms["exit_hidden"], rtol=1e-5)


def test_each_row_has_a_map_of_its_own():
  """So that the loss of a batch is that of its rows: here the first layer is nearest to the end in one row only."""
  config = make(exit=dict(layers=(2,), hidden="dynamic"), **PLAIN).exit
  near, far = np.full((1, 4, 8), 0.1, np.float32), np.full((1, 4, 8), 1.0, np.float32)
  states = {1: np.concatenate([near, far]), 2: np.concatenate([far, near]), 3: np.zeros((2, 4, 8), np.float32),
            6: np.zeros((2, 4, 8), np.float32)}
  of = lambda states: float(exit_losses._imitation_loss(config, 6, states, jnp.ones((len(states[1]), 4))))
  rows = [of({i: a[b:b + 1] for i, a in states.items()}) for b in range(2)]
  np.testing.assert_allclose(rows, [4 * 0.01, 4 * (1.0 + 0.01) / 2], rtol=1e-5)
  np.testing.assert_allclose(of({i: jnp.asarray(a) for i, a in states.items()}), sum(rows), rtol=1e-6)


def test_curricula():
  at = lambda step, **fields: np.asarray(exit_losses.loss_factors(
      make(exit=dict(layers=(1, 2, 4), coef=0.5, **fields), **PLAIN).exit, 6, jnp.int32(step), 12)).tolist()
  assert [at(s, curriculum="rotational") for s in (0, 1, 5)] == [[.5, 0, 0, 1], [0, .5, 0, 1], [0, 0, .5, 1]]
  assert [at(s, curriculum="gradual") for s in (0, 2, 4, 11)] == [[0, 0, .5, 1], [0, .5, .5, 1], *2 * [[.5, .5, .5, 1]]]
  np.testing.assert_allclose(at(0, curriculum="gradual", weighting="depth"), [0, 0, .4, .6], rtol=1e-6)


@pytest.mark.parametrize("model", [PLAIN, dict(num_layers=5)], ids=["plain", "mor"])
def test_layers_are_dropped_by_row_and_the_last_most(model):
  config = make(**model)
  batch, variables = random_batch(config), decoding.draw(config.model)
  whole, none = applied(config, variables, batch), applied(config, variables, batch, drop=1e-9)
  np.testing.assert_allclose(whole.hidden_BTD, none.hidden_BTD, atol=1e-6)
  some = applied(config, variables, batch, drop=0.5).hidden_BTD
  assert not np.allclose(some, whole.hidden_BTD, atol=1e-3)
  drop_UB = transformer._draw_dropped(6, 20000, 0.5, jax.random.key(0))
  np.testing.assert_allclose(drop_UB.mean(axis=1), 0.5 * (2 ** (np.arange(6) / 5) - 1), atol=0.02)


def test_training_drops_layers_as_the_config_says():
  none, nearly_none, some = (make(exit=dict(layer_dropout=drop), **PLAIN) for drop in (0.0, 1e-9, 0.9))
  batch, params = random_batch(none), decoding.draw(none.model)["params"]
  loss, same, other = (loss_of(config, params, batch)[0] for config in (none, nearly_none, some))
  np.testing.assert_allclose(same, loss, rtol=1e-6)
  assert abs(other - loss) > 1e-3 * loss


@pytest.mark.parametrize("model", [
    pytest.param(PLAIN, id="plain"),
    pytest.param(dict(sharing="cycle", num_layers=6, router=tiny.FIXED), id="cycle", marks=pytest.mark.slow)])
def test_training_lowers_an_exits_loss_however_the_batch_is_cut(model):
  fields = dict(layers=(2,), coef=1.0, kl=0.5)
  whole, parts = (tiny.config(model=model, exit=fields, train=dict(accumulation=n)) for n in (1, 2))
  mesh = sharding.make_mesh(whole.mesh)
  histories = []
  for config in (whole, parts):
    state, train_step = step_lib.init_state(config, mesh), step_lib.make_train_step(config, mesh)
    history = []
    for _ in range(8):
      state, metrics = train_step(state, random_batch(config))
      history.append(float(metrics["exit_2_nll"]))
    histories.append(history)
  assert histories[0][-1] < histories[0][0] - 0.2
  np.testing.assert_allclose(histories[0], histories[1], rtol=2e-3)
  figures = evaluate.make(whole, mesh, np.ones(whole.model.vocab_size, np.int32))(
      state.params, state.balance, [tiny.batch(whole)])
  out = applied(whole, {"params": state.params}, random_batch(whole), exits=(2,))
  mask_BT = random_batch(whole)["loss_mask_BT"]
  best = [np.argmax(transformer.unembed(state.params, h), axis=-1) for h in (out.exits[0], out.hidden_BTD)]
  np.testing.assert_allclose(figures["agreement_exit_2"], np.mean((best[0] == best[1])[mask_BT]), rtol=1e-6)
  np.testing.assert_allclose(figures["nll_exit_2"], by_hand(whole, state.params, random_batch(whole))[0][0], rtol=1e-4)


@pytest.mark.parametrize("model, fields, error", [
    (PLAIN, dict(layers=(6,)), "layers 1, 2, 3, 4, 5"),
    (dict(num_layers=5), dict(layers=(1,)), "layers 2, 3"),
    (PLAIN, dict(layers=(3, 2)), "ascending"),
    (PLAIN, dict(layers=(2, 3), hidden="last"), "use one exit"),
    (dict(num_layers=5), dict(layers=(2,), hidden="uniform"), "has no states"),
    (PLAIN, dict(layers=(2,), curriculum="gradual"), "several exits"),
    (PLAIN, dict(layers=(2,), kl=1.5), r"share in \[0, 1\]"),
    (PLAIN, dict(layers=(2,), coef=0.0), "coef"),
    (PLAIN, dict(layers=(2,), layer_dropout=1.0), "layer_dropout"),
])
def test_wrong_exits_are_refused(model, fields, error):
  with pytest.raises(ValueError, match=error):
    make(exit=fields, **model)
