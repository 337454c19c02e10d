"""Schedules and update rules by their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from mor.train import optim
from tests.helpers import tiny


def rates(schedule, steps=20, **fields):
  config = tiny.config(optim=dict(learning_rate=1.0, schedule=schedule, warmup_steps=4, **fields), train=dict(steps=steps))
  rate = optim.learning_rate(config)
  return np.array([float(rate(i)) for i in range(steps + 1)])


def test_wsd_is_a_trapezoid():
  expected = [0.25, 0.5, 0.75] + [1.0] * 14 + [0.75, 0.5, 0.25, 0.0]
  np.testing.assert_allclose(rates("wsd", cooldown_fraction=0.2), expected, atol=1e-6)


def test_wsd_ends_at_the_end_ratio():
  assert rates("wsd", cooldown_fraction=0.5, end_ratio=0.1)[-1] == pytest.approx(0.1)


def test_cosine_falls_from_the_peak():
  rate = rates("cosine")
  assert rate[4] == pytest.approx(1.0) and rate[-1] == pytest.approx(0.0, abs=1e-6)
  assert rate[12] == pytest.approx(0.5)


def test_constant_stays():
  np.testing.assert_allclose(rates("constant")[3:], 1.0)


def test_decay_spares_norms():
  config = tiny.config(optim=dict(weight_decay=0.5, learning_rate=1.0, schedule="constant", warmup_steps=0))
  params = {"final_norm": jnp.ones(3), "embedding": jnp.ones((2, 3))}
  zeros = {"final_norm": jnp.zeros(3), "embedding": jnp.zeros((2, 3))}
  tx = optim.make(config)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_array_equal(updates["final_norm"], 0.0)
  np.testing.assert_allclose(updates["embedding"], -0.5)


def test_auxiliary_router_learns_at_its_own_rate():
  config = tiny.config(model=dict(router=dict(sampling="aux_router", aux_router_lr_multiplier=7.0)),
                       optim=dict(weight_decay=0.0, schedule="constant", warmup_steps=0))
  params = {"aux_router": {"out": jnp.ones((2, 3))}, "router": {"out": jnp.ones((2, 3))}}
  tx = optim.make(config)
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_allclose(updates["aux_router"]["out"], 7.0 * updates["router"]["out"], rtol=1e-6)


@pytest.mark.parametrize("clip_norm, expected", [(1.0, 0.5), (0.4, 0.2), (1000.0, 50.0), (0.0, 50.0)])
def test_clipping_bounds_the_gradient(clip_norm, expected):
  """The norm of the gradient is 100; the first moment is a tenth of what clipping leaves."""
  tx = optim.make(tiny.config(optim=dict(clip_norm=clip_norm)))
  params = {"embedding": jnp.ones((2, 2))}
  _, state = tx.update({"embedding": jnp.full((2, 2), 50.0)}, tx.init(params), params)
  moments, = (part for part in state if hasattr(part, "mu"))
  np.testing.assert_allclose(moments.mu["embedding"], 0.1 * expected, rtol=1e-5)


def test_moments_decay_as_the_config_says():
  fields = dict(b1=0.7, b2=0.6, eps=0.5, clip_norm=0.0, weight_decay=0.0, learning_rate=1.0, schedule="constant",
                warmup_steps=0)
  tx = optim.make(tiny.config(optim=fields))
  params = {"embedding": jnp.ones(1)}
  state = tx.init(params)
  first = second = 0.0
  for step, gradient in enumerate((2.0, -3.0, 0.5), start=1):
    updates, state = tx.update({"embedding": jnp.array([gradient])}, state, params)
    first, second = 0.7 * first + 0.3 * gradient, 0.6 * second + 0.4 * gradient**2
    expected = -(first / (1 - 0.7**step)) / (np.sqrt(second / (1 - 0.6**step)) + 0.5)
    np.testing.assert_allclose(updates["embedding"], [expected], rtol=1e-5)


@pytest.mark.parametrize("schedule", list(optim.SCHEDULES))
def test_shared_steps_have_the_rates_of_a_longer_run(schedule):
  shared = min(20, tiny.config(optim=dict(schedule=schedule, warmup_steps=4)).optim.shared_steps(20))
  assert shared == {"wsd": 16, "cosine": 4, "constant": 20}[schedule]
  np.testing.assert_array_equal(rates(schedule)[:shared], rates(schedule, steps=50)[:shared])
