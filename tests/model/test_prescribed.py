"""Prescribed depths: their frequencies, and the gates of the router that they overrule."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import decoder as decoder_lib
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.model.routers import prescribed
from mor.model.routers import table
from mor.serve import engine as engine_lib
from mor.serve import generate as generate_lib
from mor.serve import model as model_lib
from tests.helpers import tiny
from tests.helpers import weights as test_weights

ROUTERS = {
    **{name: tiny.router(name) for name in table.ROUTERS},
    "every_step": tiny.TOKEN_CHOICE | dict(gating="every_step"),
}
EVEN = (1 / 3, 1 / 3, 1 / 3)
FORCED = {1: (1, 0, 0), 2: (0, 1, 0), 3: (0, 0, 1)}


def make(config, probabilities, seed=0):
  return prescribed.Prescribed(table.make(config), probabilities, seed)


@pytest.mark.parametrize("probabilities", [EVEN, (0.5, 0.0, 0.5), (0.2, 0.5, 0.3)])
def test_frequencies_are_the_probabilities(probabilities):
  """Five standard deviations of 3 x 3 shares: a false alarm in less than 1e-5 of all seeds."""
  router = make(tiny.config().model, probabilities)
  h_BTD = jax.random.normal(jax.random.key(3), (40, 500, 20))
  position_BT = jnp.broadcast_to(jnp.arange(500)[None, :], (40, 500))
  depth_BT = np.asarray(jax.jit(router.depth)(h_BTD, position_BT))
  shares = np.bincount(depth_BT.reshape(-1), minlength=4)[1:] / depth_BT.size
  for share, p in zip(shares, probabilities, strict=True):
    assert abs(share - p) <= 5 * np.sqrt(p * (1 - p) / depth_BT.size)


def test_depths_differ_between_rows_positions_and_seeds_alone():
  config = tiny.config().model
  h_BTD = jax.random.normal(jax.random.key(3), (30, 40, 20))
  position_BT = jnp.broadcast_to(jnp.arange(40)[None, :], (30, 40))
  depth_BT = make(config, EVEN).depth(h_BTD, position_BT)
  for other_BT in (make(config, EVEN, seed=1).depth(h_BTD, position_BT), jnp.roll(depth_BT, 1, axis=0),
                   make(config, EVEN).depth(h_BTD, position_BT + 1)):
    assert 0.2 < np.mean(np.asarray(depth_BT == other_BT)) < 0.5  # 1/3, were they independent
  rounded_BTD = h_BTD * (1 + 1e-6)
  np.testing.assert_array_equal(depth_BT, make(config, EVEN).depth(rounded_BTD, position_BT))
  one_BT = make(config, EVEN).depth(h_BTD[4:5, 7:9], position_BT[4:5, 7:9])  # of that token alone
  np.testing.assert_array_equal(depth_BT[4:5, 7:9], one_BT)


def routings(router, config, balance=None):
  """What a router says of a batch at each step."""
  params = {name: {k: jnp.asarray(v) for k, v in tree.items()}
            for name, tree in test_weights.draw(config).items() if name.endswith("router")}
  h_BTD = jax.random.normal(jax.random.key(3), (3, 12, 20))
  alive_BT = jnp.arange(12)[None, :] < jnp.array([[12], [7], [0]])
  plan = router.enter(params, h_BTD, alive_BT, balance=balance, position_BT=jnp.tile(jnp.arange(12), (3, 1)))
  found = []
  for step in range(3):
    found.append(router.decide(plan, h_BTD, alive_BT, step))
    alive_BT = found[-1].keep_BT
  return found


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ROUTERS)
def test_every_live_token_stops_at_the_prescribed_depth(name, depth):
  config = tiny.config(model=dict(router=ROUTERS[name])).model
  kept_R = [int(routed.keep_BT.sum()) for routed in routings(make(config, FORCED[depth]), config)]
  assert kept_R == [19] * depth + [0] * (3 - depth)


@pytest.mark.parametrize("gating", ["weighted", "every_step", "additive"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gates_are_those_of_the_prescribed_depth(gating, depth):
  """A bias that outweighs every probability sends all tokens to one depth as well."""
  routing = tiny.TOKEN_CHOICE | dict(gating=gating, balancing="loss_free")
  config = tiny.config(model=dict(router=routing)).model
  wanted = routings(table.make(config), config, dict(bias_R=9.0 * jnp.eye(3)[depth - 1]))
  for ours, theirs in zip(routings(make(config, FORCED[depth]), config), wanted, strict=True):
    assert not ours.keeps_all  # it cannot be known before the draw
    chex.assert_trees_all_equal(ours.replace(keeps_all=theirs.keeps_all), theirs)


@pytest.mark.parametrize("name", ["fixed", "expert_choice"])
def test_the_inner_router_gates(name):
  config = tiny.config(model=dict(router=ROUTERS[name])).model
  for ours, inner in zip(routings(make(config, FORCED[3]), config),
                         routings(table.make(config), config)):
    same = inner.replace(keep_BT=ours.keep_BT, keeps_all=False)
    chex.assert_trees_all_equal(ours, same)
    assert jnp.all(inner.keep_BT <= ours.keep_BT)


def test_equal_by_value():
  config = tiny.config().model
  router = make(config, EVEN)
  assert router == make(config, EVEN) and hash(router) == hash(make(config, EVEN))
  different = dataclasses.replace(config, d_ff=30)
  for other in (make(config, (0, 0, 1)), make(config, EVEN, seed=1), make(different, EVEN), router.inner):
    assert router != other


@pytest.mark.parametrize("probabilities, said", [
    ((0.5, 0.5), "2 probabilities for 3 depths"),
    ((0.5, 0.5, 0.5), "sum to 1"),
    ((1.5, -0.5, 0.0), "non-negative"),
    ((float("nan"), 0.5, 0.5), "non-negative"),
])
def test_what_is_no_distribution_is_refused(probabilities, said):
  with pytest.raises(ValueError, match=said):
    make(tiny.config().model, probabilities)


def test_engine_equals_generate_at_prescribed_depths():
  config = tiny.config().model
  model = model_lib.Model(config, {"params": jax.tree.map(jnp.asarray, test_weights.draw(config))}, None, 24)
  rng = np.random.default_rng(2)
  requests = [model.request(rng.integers(0, 61, 1 + i % 5).tolist(), max_tokens=9, temperature=1.5) for i in range(7)]
  decoder = decoder_lib.Decoder(config, storage_lib.Dense(24, 2, 6, "float32"), make(config, EVEN))
  weights = weights_lib.prepare(config, model.variables, "float32")
  wanted = generate_lib.generate(decoder, weights, requests, context=24)
  engine = engine_lib.Engine(model, num_slots=3, page_size=8, router=make(config, EVEN))
  numbers = [engine.submit_request(request) for request in requests]
  while not engine.idle:
    engine.step()
  assert [engine.take(n) for n in numbers] == wanted
  assert {d for c in wanted for d in c.depths} == {1, 2, 3}
