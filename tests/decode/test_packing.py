"""A tree of small arrays as one array: bit for bit, from host to device and back."""

import jax
import jax.numpy as jnp
import numpy as np

from mor.decode import packing

TREE = {"float": np.array([[1.5, -0.0, np.inf], [np.nan, 1e-40, -3e38]], np.float32), "flag": np.array([True, False]),
        "none": np.zeros((2, 0), bool), "seed": np.array([2**32 - 1, 7], np.uint32), "scalar": np.array(-2, np.int32)}


def assert_same(tree) -> None:
  for got, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(TREE), strict=True):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert np.asarray(got).tobytes() == expected.tobytes()


def test_from_the_host_to_the_device_and_back():
  """One array goes in and one comes out; the layout is static."""
  sent = packing.pack(TREE)
  assert isinstance(sent.word_N, np.ndarray) and sent.word_N.shape == (11,)
  seen = []

  @jax.jit
  def run(packed):
    tree = packing.unpack(packed)
    seen.append(tree)
    return packing.pack(jax.tree.map(jnp.asarray, tree))

  got = run(sent)
  assert len(jax.tree.leaves(got)) == 1 and len(seen) == 1
  assert run(packing.pack(TREE)).layout == sent.layout and len(seen) == 1
  assert_same(packing.unpack(jax.device_get(got)))
  assert_same(packing.unpack(sent))


def test_numbers_on_the_host_are_views():
  packed = packing.pack(TREE)
  assert all(np.shares_memory(leaf, packed.word_N) for leaf in jax.tree.leaves(packing.unpack(packed))
             if leaf.size and leaf.dtype != bool)
