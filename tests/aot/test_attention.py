"""The attention kernels compile for every chip, at the shapes of the models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.aot import chips
from mor.decode import packed

# Heads, key heads, head size and format of the entries.
SHAPES = {
    "mor-135m": (9, 3, 64, "bfloat16"),
    "mor-360m": (15, 5, 64, "bfloat16"),
    "mor-730m in float32": (24, 8, 64, "float32"),
    "mor-1.7b": (32, 32, 64, "bfloat16"),
    "mor-1.7b in float32": (32, 32, 64, "float32"),
    "heads of 128": (32, 8, 128, "bfloat16"),
    "one head of 512 in float32": (8, 1, 512, "float32"),
}
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100:1", "h200:1")
SLOTS, PAGE, PAGES = 32, 64, 32  # of the models' context


def compile_attention(topology, shape, hides, num_slots=SLOTS, num_pages=3 * SLOTS * PAGES,
                      pages_per_row=PAGES):
  """Compiles one call, skipping the test where the compiler is missing."""
  try:
    device = chips.devices(topology)[0]
  except OSError as error:
    pytest.skip(str(error))
  num_heads, num_kv_heads, head_dim, kv_format = SHAPES[shape]
  kernel = "gpu" if device.platform == "gpu" else "tpu"
  storage = packed.PackedPages(PAGE, num_kv_heads, head_dim, kv_format, kernel)
  assert storage.explain_misfit() is None
  mesh = jax.sharding.Mesh(np.array([device]), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def shaped(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

  args = [shaped(jnp.float32, num_slots, num_heads, head_dim),
          shaped(storage.dtype, num_pages, num_kv_heads, PAGE, storage.width),
          shaped(jnp.int32, num_slots, pages_per_row), shaped(jnp.int32, num_slots)]
  if hides:
    args.append(shaped(jnp.bool_, num_slots, pages_per_row * PAGE))
  with jax.set_mesh(mesh):
    return jax.jit(packed.find_kernel(kernel).attend).lower(*args).compile()


@pytest.mark.aot
@pytest.mark.parametrize("hides", [False, True], ids=["whole", "hidden"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_compile_for_every_chip(topology, shape, hides):
  compiled = compile_attention(topology, shape, hides)
  assert "packed_attention" in compiled.as_text()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 10, "the pool is copied"


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "h200:1"])
def test_kernels_compile_for_rows_shorter_than_a_turn(topology):
  compile_attention(topology, "mor-135m", True, num_pages=9, pages_per_row=1)


@pytest.mark.aot
def test_a_pool_that_needs_64_bits_to_address_compiles():
  compile_attention("h200:1", "mor-1.7b", False, num_slots=128, num_pages=3 * 128 * PAGES)
