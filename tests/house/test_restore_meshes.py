"""A state saved on one mesh is the same on another."""

import jax
import numpy as np
import pytest

from mor import checkpoint
from mor import sharding
from mor.train import loop
from mor.train import step as step_lib
from tests.helpers import tiny

PAIRS = {
    "data_to_fsdp": (dict(data=8), dict(data=2, fsdp=4)),
    "fsdp_to_tensor": (dict(data=2, fsdp=4), dict(data=4, tensor=2)),
    "all_axes_to_one_device": (dict(data=1, fsdp=2, tensor=2, sequence=2), dict(data=1)),
    "one_device_to_all_axes": (dict(data=1), dict(data=1, fsdp=2, tensor=2, sequence=2)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_state_is_restored_bitwise_on_another_mesh(pair, tmp_path):
  before, after = (tiny.config(model=dict(vocab_size=62, num_layers=5), mesh=mesh) for mesh in PAIRS[pair])
  state = step_lib.init_state(before, sharding.make_mesh(before.mesh))
  fresh = jax.tree.map(lambda x: x + np.ones_like(x), state)  # moments, too, are not zero
  placed = jax.device_put(fresh, step_lib.state_shardings(before, sharding.make_mesh(before.mesh)))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(3, placed, before)
    checkpoints.wait()
    checkpoints.check(after)
    mesh = sharding.make_mesh(after.mesh)
    restored, start = loop.restore_or_init(after, mesh, checkpoints)
  assert start == 3
  assert jax.tree.structure(restored) == jax.tree.structure(placed)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(placed), strict=True):
    np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b))
  assert restored.params["stack"]["ffw"]["gate"].sharding.mesh == mesh
