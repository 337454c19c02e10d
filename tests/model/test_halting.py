"""The gate that halts: its soft training is its hard decoding where it is sure, and its loss is a divergence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.conversion import hf_export
from mor.conversion import unrolled
from mor.model import depths
from mor.model import recursion
from mor.model import transformer
from mor.model.kv import plans as kv_plans
from mor.model.routers import table as router_table
from tests.helpers import tiny
from tests.helpers import weights


def make(kv_plan="recursion_wise", **fields):
  """One layer a step between prelude and coda."""
  fields = dict(num_layers=5, kv_plan=kv_plan) | fields
  return tiny.config(model=fields | dict(router=tiny.router("halting", **fields.pop("router", {})))).model


def draw(model, sure=1.0):
  """Parameters in which every part matters; `sure` multiplies the logits of the gate."""
  params = jax.tree.map(jnp.asarray, weights.draw(model))
  router = params["router"] | {"bias": jnp.full((1, 1), -0.3)}
  return params | {"router": jax.tree.map(lambda a: sure * a, router)}


def apply(model, params, routing, tokens_BT=np.random.default_rng(0).integers(0, 61, (4, 12))):
  with jax.disable_jit():
    return transformer.Transformer(model).apply({"params": params}, tokens_BT, routing=routing)


@pytest.mark.parametrize("kv_plan", kv_plans.PLANS)
def test_training_is_decoding_where_the_gate_is_sure(kv_plan):
  model = make(kv_plan, num_layers=8)
  sure, unsure = draw(model, 1e4), draw(model)
  soft, hard = (apply(model, sure, routing) for routing in ("select", "decide"))
  np.testing.assert_array_equal(soft.keep_RBT, hard.keep_RBT)
  assert set(np.unique(np.sum(hard.keep_RBT, axis=0))) == {1, 2, 3}, "some depth was never taken"
  np.testing.assert_allclose(soft.hidden_BTD, hard.hidden_BTD, rtol=0, atol=2e-5)
  soft, hard = (apply(model, unsure, routing) for routing in ("select", "decide"))
  assert float(jnp.abs(soft.hidden_BTD - hard.hidden_BTD).max()) > 0.1, "an unsure gate tells nothing"


def test_the_output_is_the_expectation_over_the_numbers_of_steps():
  """Neither states nor shares depend on R, so a longer recursion shows the last state of a shorter one."""
  model = make(router=dict(capacity=(1.0, 0.7, 0.4)))  # without effect
  params, segment_BT = draw(model), jnp.ones((2, 12), jnp.int32)
  entry_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 12, 20)), jnp.float32)
  longer = recursion.Recursion(depths.at(model, 4))
  with jax.disable_jit():
    output_BTD, trace = recursion.Recursion(model).run(params, entry_BTD, segment_BT, routing="select")
    _, more = longer.run(params, entry_BTD, segment_BT, routing="select", exits=longer.schedule.boundaries())
  share_RBT = jnp.exp(trace.score_RBT)
  np.testing.assert_allclose(more.score_RBT[:3], trace.score_RBT, rtol=0, atol=1e-5)
  leaves_RBT = jnp.concatenate([share_RBT[:-1] - share_RBT[1:], share_RBT[-1:]])
  np.testing.assert_allclose(jnp.sum(leaves_RBT, axis=0), 1.0, atol=1e-6)
  expected_BTD = sum(leaves_BT[:, :, None] * state_BTD for leaves_BT, state_BTD in zip(leaves_RBT, more.exits))
  np.testing.assert_allclose(output_BTD, expected_BTD, rtol=0, atol=1e-5)


def test_the_loss_is_the_divergence_from_the_uniform_distribution():
  model = make()
  out = apply(model, draw(model), "select")
  share_RBT = np.exp(np.asarray(out.score_RBT, np.float64))
  leaves_RBT = np.concatenate([share_RBT[:-1] - share_RBT[1:], share_RBT[-1:]])
  divergence = np.sum(leaves_RBT * np.log(3 * leaves_RBT)) / 48
  router = router_table.make(model)
  losses = router.losses(out.sums, {"tokens": out.sums["tokens"]})
  np.testing.assert_allclose(losses["halting"], divergence, rtol=1e-5)
  assert router.weigh(losses) == pytest.approx(0.05 * divergence, rel=1e-5)


def test_a_threshold_of_one_never_leaves_early():
  model = make(router=dict(halting_threshold=1.0))
  params = draw(model, 3.0)
  out = apply(model, params, "decide")
  assert out.keep_RBT.all()
  fixed = tiny.config(model=dict(num_layers=5, router=tiny.FIXED)).model
  plain = apply(fixed, {name: group for name, group in params.items() if name != "router"}, "decide")
  np.testing.assert_allclose(out.hidden_BTD, plain.hidden_BTD, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.2, 0.8])
def test_a_token_leaves_when_the_probability_to_have_left_reaches_the_threshold(threshold):
  model = make(router=dict(halting_threshold=threshold))
  out = apply(model, draw(model), "decide")
  left_RBT = 1.0 - np.exp(np.asarray(out.score_RBT))
  alive_BT = np.ones((4, 12), bool)
  for r in range(3):
    alive_BT = alive_BT & (left_RBT[r] < threshold)
    np.testing.assert_array_equal(out.keep_RBT[r], alive_BT)


def test_the_likelihood_teaches_the_gate():
  model = make()
  params, tokens_BT = draw(model), np.random.default_rng(0).integers(0, 61, (2, 12))

  def total(gate, routing):
    out = transformer.Transformer(model).apply({"params": params | {"router": gate}}, tokens_BT, routing=routing)
    return jnp.sum(jnp.sin(out.hidden_BTD[:, -1]))

  soft, hard = (jax.jit(jax.grad(total), static_argnums=1)(params["router"], routing) for routing in ("select", "decide"))
  assert all(float(jnp.abs(leaf).max()) > 1e-4 for leaf in jax.tree.leaves(soft))
  assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(hard))


@pytest.mark.parametrize("refuse, message", [
    (lambda model: unrolled.check(model), "router"),
    (lambda model: router_table.make(model).official_modules(1), "the official code has no such router"),
    (lambda model: hf_export.write("nowhere", model, {}, tokenizer=None, chat_template=None, context=12, dtype="float32",
                                   special_ids={}), "modeling_mor.py has no such router"),
], ids=["llama", "official_mor", "hf"])
def test_other_formats_refuse_it_by_name(refuse, message):
  with pytest.raises(ValueError, match=message):
    refuse(make())


def test_a_fresh_gate_leaves_alike_after_each_step():
  model = dataclasses.replace(make(), init_std=1e-6)
  params = draw(model) | {"router": router_table.make(model).init(jax.random.key(0))["router"]}
  share_RBT = jnp.exp(apply(model, params, "select").score_RBT)
  np.testing.assert_allclose(share_RBT, np.broadcast_to(np.reshape([1, 2 / 3, 4 / 9], (3, 1, 1)), (3, 4, 12)), atol=1e-3)
