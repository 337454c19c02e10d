"""Properties of the model, over every router and KV plan."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.model import recursion
from mor.model import transformer
from mor.model.kv import plans as kv_plans
from mor.model.routers import base as router_base
from mor.model.routers import table as router_table
from mor.train import loss
from tests.helpers import tiny
from tests.helpers import weights

CAPACITY = (1.0, 0.7, 0.4)
EVERY = tiny.crossed(router_table.ROUTERS, kv_plans.PLANS)


def build(router, plan, num_layers=5):
  """One layer a step, which compiles sooner; 8 layers are two a step."""
  return tiny.config(model=dict(kv_plan=plan, router=tiny.router(router, capacity=CAPACITY), num_layers=num_layers)).model


def apply(config, params, tokens_BT, segment_BT=None, routing="select"):
  run = functools.partial(transformer.Transformer(config).apply, routing=routing)
  with jax.disable_jit():
    return run({"params": jax.tree.map(jnp.asarray, params)}, jnp.asarray(tokens_BT),
               None if segment_BT is None else jnp.asarray(segment_BT))


def distinct_tokens(config, batch=3, seq_len=12, seed=0):
  """Every token of the batch differs, so an embedding row belongs to one position."""
  rng = np.random.default_rng(seed)
  return rng.permutation(config.vocab_size)[:batch * seq_len].reshape(batch, seq_len).astype(np.int32)


@pytest.mark.parametrize("router,plan", EVERY)
def test_gathered_equals_masked(router, plan):
  config = build(router, plan, num_layers=8)
  batch = jax.tree.map(jnp.asarray, tiny.batch(tiny.config()))
  params = jax.tree.map(jnp.asarray, weights.draw(config))

  def value_and_grad(execution):
    model = transformer.Transformer(dataclasses.replace(config, execution=execution))

    def total(params):
      out = model.apply({"params": params}, batch["tokens_BT"], batch["segment_BT"])
      terms = router_table.make(config).losses(out.sums, router_base.norms(out.sums))
      nll_BT = loss.token_nll(transformer.head(params), out.hidden_BTD, batch["target_BT"], 16)
      return jnp.sum(nll_BT * batch["loss_mask_BT"]) / batch["loss_mask_BT"].sum() + sum(terms.values()), out.keep_RBT

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)

  (gathered, keep), gathered_grads = value_and_grad("gathered")
  (masked, masked_keep), masked_grads = value_and_grad("masked")
  np.testing.assert_array_equal(keep, masked_keep)
  assert not router_table.ROUTERS[router].routes or not keep[-1].all(), "nothing was dropped, so nothing was tested"
  np.testing.assert_allclose(gathered, masked, rtol=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gathered_grads), jax.tree.leaves(masked_grads)):
    scale = max(1.0, float(jnp.abs(b).max()))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=str(path))


@pytest.mark.parametrize("router,plan", EVERY)
def test_future_tokens_have_no_gradient(router, plan):
  config = build(router, plan)
  tokens_BT, cut = distinct_tokens(config), 5
  params = jax.tree.map(jnp.asarray, weights.draw(config))
  probe_D = jnp.asarray(np.random.default_rng(3).normal(size=config.d_model), jnp.float32)
  model = transformer.Transformer(config)

  def past(embedding_VD):
    out = model.apply({"params": {**params, "embedding": embedding_VD}}, tokens_BT, routing="decide")
    return jnp.sum(out.hidden_BTD[:, :cut] * probe_D[None, None, :])

  grad_VD = jax.jit(jax.grad(past))(params["embedding"])
  norm_BT = jnp.linalg.norm(grad_VD, axis=1)[tokens_BT]
  np.testing.assert_array_equal(norm_BT[:, cut:], 0.0)
  assert (norm_BT[:, :cut] > 0).all()


@pytest.mark.parametrize("router,plan", EVERY)
def test_changing_the_future_changes_no_past(router, plan):
  """The gradient does not see routing decisions; this does."""
  config = build(router, plan)
  params, cut = weights.draw(config), 7
  before_BT = distinct_tokens(config)
  after_BT = before_BT.copy()
  after_BT[:, cut:] = distinct_tokens(config, seed=1)[:, cut:]
  a, b = (apply(config, params, t, routing="decide") for t in (before_BT, after_BT))
  np.testing.assert_array_equal(a.keep_RBT[:, :, :cut], b.keep_RBT[:, :, :cut])
  np.testing.assert_allclose(a.hidden_BTD[:, :cut], b.hidden_BTD[:, :cut], rtol=0, atol=1e-6)
  assert float(jnp.abs(a.hidden_BTD[:, cut:] - b.hidden_BTD[:, cut:]).max()) > 0.1
  if router_table.ROUTERS[router].looks_ahead:  # the oracle does look ahead: the test can tell
    a, b = (apply(config, params, t, routing="select") for t in (before_BT, after_BT))
    assert (a.keep_RBT[:, :, :cut] != b.keep_RBT[:, :, :cut]).any()


@pytest.mark.parametrize("routing", ["select", pytest.param("decide", marks=pytest.mark.slow)])
@pytest.mark.parametrize("router,plan", EVERY)
def test_padded_batch_equals_its_rows(router, plan, routing):
  config = build(router, plan)
  params = weights.draw(config)
  tokens_BT = distinct_tokens(config)
  lengths = (12, 7, 4)
  segment_BT = np.array([[1] * n + [0] * (12 - n) for n in lengths], np.int32)
  batch = apply(config, params, tokens_BT, segment_BT, routing)
  for row, n in enumerate(lengths):
    alone = apply(config, params, tokens_BT[row:row + 1, :n], None, routing)
    np.testing.assert_array_equal(batch.keep_RBT[:, row, :n], alone.keep_RBT[:, 0])
    assert not batch.keep_RBT[:, row, n:].any(), "padding was routed"
    np.testing.assert_allclose(batch.hidden_BTD[row, :n], alone.hidden_BTD[0], rtol=0, atol=1e-5)


def test_fixed_router_equals_the_unrolled_tied_stack():
  config = build("fixed", "recursion_wise", num_layers=8)
  params = weights.draw(config)
  flat = [("prelude", 0)] + [("stack", i) for _ in range(3) for i in range(2)] + [("coda", 0)]
  rows = [jax.tree.map(lambda a: a[i], params[group]) for group, i in flat]
  vanilla = tiny.config(model=tiny.VANILLA).model
  unrolled = dict(embedding=params["embedding"], final_norm=params["final_norm"],
                  stack=jax.tree.map(lambda *a: np.stack(a), *rows))
  tokens_BT = distinct_tokens(config)
  np.testing.assert_allclose(apply(config, params, tokens_BT).hidden_BTD,
                             apply(vanilla, unrolled, tokens_BT).hidden_BTD, rtol=0, atol=1e-5)


def test_one_recursion_is_vanilla():
  vanilla = tiny.config(model=tiny.VANILLA).model
  cycle = dataclasses.replace(vanilla, sharing="cycle")
  params, tokens_BT = weights.draw(vanilla), distinct_tokens(vanilla)
  np.testing.assert_array_equal(apply(vanilla, params, tokens_BT).hidden_BTD,
                                apply(cycle, params, tokens_BT).hidden_BTD)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_and_unrolling_change_no_gradient(remat):
  config = build("expert_choice", "hybrid")
  batch = jax.tree.map(jnp.asarray, tiny.batch(tiny.config()))
  params = jax.tree.map(jnp.asarray, weights.draw(config))

  def grads(config):
    model = transformer.Transformer(config)
    total = lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, batch["tokens_BT"], batch["segment_BT"]).hidden_BTD))
    return jax.jit(jax.grad(total))(params)

  plain = grads(config)
  other = grads(dataclasses.replace(config, remat=remat, scan_layers=remat == "full"))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


def test_bfloat16_follows_float32():
  config = build("fixed", "shared")
  params, tokens_BT = weights.draw(config), distinct_tokens(config)
  exact = apply(config, params, tokens_BT)
  rounded = apply(dataclasses.replace(config, compute_dtype="bfloat16"), params, tokens_BT)
  assert rounded.hidden_BTD.dtype == jnp.bfloat16
  np.testing.assert_allclose(rounded.hidden_BTD.astype(jnp.float32), exact.hidden_BTD, rtol=0, atol=0.15)


def test_router_scores_are_float32_in_bfloat16():
  config = dataclasses.replace(build("expert_choice", "recursion_wise"), compute_dtype="bfloat16")
  out = apply(config, weights.draw(config), distinct_tokens(config))
  assert out.score_RBT.dtype == jnp.float32
  assert all(value.dtype == jnp.float32 for value in out.sums.values())


def test_parameters_are_float32_and_counted_once():
  config = build("expert_choice", "recursion_wise", num_layers=8)
  shapes = jax.eval_shape(transformer.Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  assert shapes["params"]["stack"]["attention"]["q"].shape == (2, 20, 4, 6)
  assert jax.tree.map(lambda a: a.shape, shapes["params"]) == jax.tree.map(lambda a: a.shape, weights.draw(config))


def test_compact_keeps_the_order_of_positions():
  keep_BT = jnp.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
  np.testing.assert_array_equal(recursion.compact(keep_BT, 3), [[0, 2, 3], [4, 5, 5]])


def test_random_router_needs_no_parameters():
  for router in ("expert_choice", "token_choice"):
    fields = tiny.router(router, capacity=CAPACITY, arch="random", sampling="none", balancing="none")
    config = tiny.config(model=dict(router=fields)).model
    params = {k: v for k, v in weights.draw(config).items() if k != "router"}
    out = apply(config, params, distinct_tokens(config))
    assert out.keep_RBT[0].all() and not out.keep_RBT[2].all()
    causal = apply(config, params, distinct_tokens(config), routing="decide")
    assert 0 < causal.keep_RBT[2].sum() < causal.keep_RBT[0].sum()
