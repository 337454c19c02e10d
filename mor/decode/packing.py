"""Many small arrays as one, so that they cross between host and device in one copy.

Each array is a run of 32-bit words: integers and floats as their bits, booleans as 0 and
1. What the words mean, the `Layout`, is static, so it travels with the type of a jitted
function's arguments and results, and neither side has to know it beforehand.

  def run(slots): return slots, packing.pack(out)      # on the device
  out = packing.unpack(jax.device_get(packed))         # on the host: NumPy views

Both functions take NumPy arrays as well as those of JAX.
"""

import dataclasses
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from mor import types

_WORDS = ("int32", "uint32", "float32")


@dataclasses.dataclass(frozen=True)
class Layout:
  """Structure of a tree, and shape and dtype of each of its arrays in order."""

  structure: jax.tree_util.PyTreeDef
  shapes: tuple[tuple[int, ...], ...]
  dtypes: tuple[str, ...]


@struct.dataclass
class Words:
  """A tree of arrays in one array of N words."""

  word_N: types.Array
  layout: Layout = struct.field(pytree_node=False)


def pack(tree: Any) -> Words:
  """Returns a tree of arrays as one array: of NumPy if all of them are, else of JAX."""
  leaves, structure = jax.tree.flatten(tree)
  dtypes = tuple(leaf.dtype.name for leaf in leaves)
  assert set(dtypes) <= {*_WORDS, "bool"}, dtypes
  on_host = all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in leaves)
  to_words, concatenate = (_to_numpy_words, np.concatenate) if on_host else (_to_words, jnp.concatenate)
  layout = Layout(structure, tuple(leaf.shape for leaf in leaves), dtypes)
  return Words(concatenate([to_words(leaf) for leaf in leaves]), layout)


def unpack(packed: Words) -> Any:
  """Returns the tree that `pack` took; NumPy arrays are views of the words, but for booleans."""
  word_N, layout = packed.word_N, packed.layout
  from_words = _from_numpy_words if isinstance(word_N, np.ndarray) else _from_words
  leaves, start = [], 0
  for shape, dtype in zip(layout.shapes, layout.dtypes):
    end = start + math.prod(shape)
    leaves.append(from_words(word_N[start:end], dtype).reshape(shape))
    start = end
  return jax.tree.unflatten(layout.structure, leaves)


def _to_words(x):
  x = x.reshape(-1)
  return x.astype(jnp.int32) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.int32)


def _from_words(word_X, dtype):
  return word_X != 0 if dtype == "bool" else jax.lax.bitcast_convert_type(word_X, dtype)


def _to_numpy_words(x):
  x = np.asarray(x).reshape(-1)
  return x.astype(np.int32) if x.dtype == bool else x.view(np.int32)


def _from_numpy_words(word_X, dtype):
  return word_X != 0 if dtype == "bool" else word_X.view(dtype)
