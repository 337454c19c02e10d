"""float32 means float32: no platform rounds the factors of a product, in decoding and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor import sharding
from mor.decode import tick
from mor.model import kernels
from mor.train import step
from tests.helpers import platforms
from tests.helpers import serving
from tests.helpers import tiny

HIGHEST = str((jax.lax.Precision.HIGHEST,) * 2)
PRECISIONS = [("cpu", {"None"}), ("gpu", {HIGHEST}), ("tpu", {HIGHEST})]


@pytest.mark.parametrize("platform, precisions", PRECISIONS)
def test_a_tick_multiplies_float32_in_float32(platform, precisions):
  """A CPU does so anyway, and its program is as it was."""
  with platforms.pretend(platform):
    runner = serving.engine(serving.model(), storage="dense").runner
    program = jax.make_jaxpr(lambda weights, slots: tick.run(
        runner.decoder, weights, slots, num_ticks=1, vocab_size=60, together=False))(runner.weights, runner.slots)
  assert platforms.find_precisions(program) == precisions


@pytest.mark.parametrize("platform, precisions", PRECISIONS[:2])
def test_a_training_step_multiplies_float32_in_float32(platform, precisions):
  config = tiny.config(model=dict(attention="xla"))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  with platforms.pretend(platform), jax.set_mesh(mesh):
    jitted = step.make_train_step(config, mesh).jitted
    program = jax.make_jaxpr(lambda state, batch: jitted(state, batch, None, None))(
        step.state_shapes(config), jax.tree.map(np.asarray, tiny.batch(config)))
  assert platforms.find_precisions(program) == precisions


@pytest.mark.parametrize("dtype, precisions", [("float32", {HIGHEST}), ("bfloat16", {"None"})])
def test_a_tpu_kernel_asks_for_full_precision_where_it_can(dtype, precisions):
  """Its compiler refuses products of bfloat16 in full precision, in the gradient too."""
  x_BTNH, segment_BT = jnp.ones((1, 128, 2, 8), dtype), jnp.ones((1, 128), jnp.int32)

  def add_up(*qkv):
    return jnp.sum(kernels.splash(*qkv, segment_BT).astype(jnp.float32))

  with platforms.pretend("tpu"):
    program = jax.make_jaxpr(kernels.full_precision(jax.grad(add_up, argnums=(0, 1, 2))))(*(x_BTNH,) * 3)
  assert platforms.find_precisions(program, dtype) == precisions
