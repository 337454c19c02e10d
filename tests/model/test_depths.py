"""A model of any number of steps is the model built with it, and training draws that number from (seed, step)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.model import depths
from mor.model import layers
from mor.model import recursion
from mor.model import transformer
from tests.helpers import tiny
from tests.helpers import weights

POISSON = dict(distribution="poisson", mean=4.0, most=12)


def make(num_recursions=3, train=None, **fields):
  """One layer a step between prelude and coda."""
  fields = dict(router=tiny.FIXED, num_recursions=num_recursions, num_layers=num_recursions + 2) | fields
  return tiny.config(model=fields | dict(recursions_train=train or {})).model


def apply(model, params, tokens_BT):
  run = functools.partial(transformer.Transformer(model).apply, routing="decide")
  with jax.disable_jit():
    return run({"params": jax.tree.map(jnp.asarray, params)}, tokens_BT).hidden_BTD


@pytest.mark.parametrize("sharing, kv_plan", [
    ("middle_cycle", "recursion_wise"), ("cycle", "shared"), ("middle_sequence", "recursion_wise"),
    pytest.param("middle_cycle", "hybrid", marks=pytest.mark.slow)])
def test_any_number_of_steps_is_the_model_built_with_it(sharing, kv_plan):
  """And with keys of its own in each step, it is the plain model whose layers are written out."""
  edge = 2 if sharing.startswith("middle") else 0
  fields = dict(sharing=sharing, kv_plan=kv_plan, router=tiny.FIXED)
  model = tiny.config(model=fields | dict(num_layers=edge + 6)).model  # two layers in a step
  params, tokens_BT = weights.draw(model), np.random.default_rng(0).integers(0, 61, (3, 12))
  outputs = []
  for steps in (1, 4):
    built = tiny.config(model=fields | dict(num_recursions=steps, num_layers=edge + 2 * steps)).model
    assert depths.at(model, steps) == built
    if kv_plan == "recursion_wise":
      plain = tiny.config(model=tiny.VANILLA | dict(num_layers=built.num_layers)).model
      rows = recursion.Recursion(built).schedule.unrolled()
      stack = [jax.tree.map(lambda a: a[i], params[group]) for group, i in rows]
      written = dict(embedding=params["embedding"], final_norm=params["final_norm"],
                     stack=jax.tree.map(lambda *a: np.stack(a), *stack))
      np.testing.assert_allclose(apply(built, params, tokens_BT), apply(plain, written, tokens_BT), rtol=0, atol=1e-5)
      outputs.append(apply(built, params, tokens_BT))
  assert not any(np.allclose(a, b, atol=1e-2) for a, b in zip(outputs, outputs[1:]))


@pytest.mark.parametrize("fields, words", [
    (dict(router=tiny.router("expert_choice")), "router.name='expert_choice'; its router has scores"),
    (dict(router=tiny.TOKEN_CHOICE), "router.name='token_choice'; its router has scores"),
    (dict(lora=dict(q=2)), r"model.lora=\{'q': 2\}; use ranks of 0"),
    (tiny.VANILLA | dict(num_layers=3), "sharing 'vanilla'; use a sharing scheme that repeats layers"),
])
def test_parameters_of_the_trained_steps_alone_are_named(fields, words):
  model = make(**fields)
  assert depths.at(model, model.num_recursions) == model
  with pytest.raises(ValueError, match=f"^4 recursion steps of a model with .*{words}"):
    depths.at(model, 4)


def test_a_draw_depends_on_seed_and_step_alone():
  model = make(train=POISSON)
  drawn = [depths.draw(model, 7, step) for step in range(12)]
  assert drawn == [3, 3, 5, 4, 3, 4, 5, 2, 3, 1, 2, 5], "another draw: runs with drawn steps no longer resume bitwise"
  assert depths.draw(model, 8, 0) != depths.draw(model, 7, 0) or depths.draw(model, 8, 1) != depths.draw(model, 7, 1)
  assert depths.draw(model, -1, 5) in range(1, 13)
  assert [depths.draw(make(), 7, step) for step in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("train", [dict(distribution="uniform", values=(1, 2, 5)), POISSON], ids=["uniform", "poisson"])
def test_draws_follow_the_distribution(train):
  """Each count is within 5 standard deviations: one false alarm in 10^5, if the seed were new each time."""
  model, num = make(train=train), 4000
  chances = depths.probabilities(model)
  drawn = np.bincount([depths.draw(model, 0, step) for step in range(num)], minlength=13)
  assert sum(chances.values()) == pytest.approx(1.0)
  for steps, chance in chances.items():
    assert abs(drawn[steps] - num * chance) <= 5 * np.sqrt(num * chance * (1 - chance)) + 1


def test_the_poisson_has_its_mean_and_the_spread_of_a_log_normal_rate():
  model = make(train=dict(distribution="poisson", mean=4.0, sigma=0.5, most=200))
  chances = depths.probabilities(model)
  mean = sum(steps * chance for steps, chance in chances.items())
  variance = sum((steps - mean)**2 * chance for steps, chance in chances.items())
  assert mean == pytest.approx(4.0)
  assert variance == pytest.approx(3.0 + 9.0 * np.expm1(0.25))  # Poisson's, and that of its rate


@pytest.mark.parametrize("kv_plan, scan", [
    ("recursion_wise", True), pytest.param("shared", True, marks=pytest.mark.slow),
    pytest.param("recursion_wise", False, marks=pytest.mark.slow)])
def test_the_gradient_passes_the_last_steps_alone(kv_plan, scan):
  """It is that of the last steps, run on a state and on first keys that are constants."""
  model = make(4, dict(backprop=2), kv_plan=kv_plan, scan_layers=scan)
  whole = dataclasses.replace(model, recursions_train=dataclasses.replace(model.recursions_train, backprop=0))
  params = jax.tree.map(jnp.asarray, weights.draw(model))
  tokens_BT = np.random.default_rng(0).integers(0, 61, (2, 12))

  def total(model, params):
    out = transformer.Transformer(model).apply({"params": params}, tokens_BT)
    return jnp.sum(jnp.sin(out.hidden_BTD)), out.hidden_BTD

  (_, hidden_BTD), grads = jax.jit(jax.value_and_grad(functools.partial(total, model), has_aux=True))(params)
  (_, same_BTD), whole_grads = jax.jit(jax.value_and_grad(functools.partial(total, whole), has_aux=True))(params)
  np.testing.assert_allclose(hidden_BTD, same_BTD, rtol=0, atol=1e-6)
  for leaf in jax.tree.leaves((grads["prelude"], grads["embedding"])):
    np.testing.assert_array_equal(leaf, 0.0)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4), grads["coda"], whole_grads["coda"])
  if kv_plan != "recursion_wise":
    return

  def last_steps(params):  # a step's keys are its own, so that a recursion of 4 steps is one of 2 and one of 2
    def run(steps, state_BTD):
      return recursion.Recursion(depths.at(whole, steps)).run(params, state_BTD, jnp.ones_like(tokens_BT), routing="select")[0]

    entry_BTD = transformer.Transformer(model).apply({"params": params}, tokens_BT).entry_BTD
    state_BTD = run(2, jax.lax.stop_gradient(run(2, entry_BTD)))
    return jnp.sum(jnp.sin(_finish(params, state_BTD)))

  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4), grads["stack"],
               jax.jit(jax.grad(last_steps))(params)["stack"])


def _finish(params, state_BTD):
  """Runs coda and final norm, as a plain model whose one layer is the coda."""
  plain = tiny.config(model=tiny.VANILLA | dict(num_layers=1)).model
  ones_BT = jnp.ones(state_BTD.shape[:2], jnp.int32)
  state_BTD, _ = recursion.Recursion(plain).run({"stack": params["coda"]}, state_BTD, ones_BT, routing="select")
  return layers.rms_norm(state_BTD, params["final_norm"], plain.norm_eps)


def test_all_steps_are_the_whole_gradient():
  model = make(3, dict(backprop=3))
  assert model.recursions_train.first_step(3) == 0 == model.recursions_train.first_step(2)
  assert model.recursions_train.first_step(5) == 2
