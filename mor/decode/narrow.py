"""Products of the rows that matter, in a batch of which often only some do.

A product is compiled at a few static numbers of rows, its *widths*, and runs at the
smallest that holds the rows in use.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_TILE = {"cpu": 5}  # rows that a product computes at once, by backend: measured, bfloat16 with AVX2
_OTHER_TILE = 8


class Narrow(NamedTuple):
  """The first `num` rows of a batch matter; products are computed at the smallest of `widths` that holds them."""

  num: jax.Array
  widths: tuple[int, ...]


def widths(num: int, size: int) -> tuple[int, ...]:
  """Of a batch of `size` rows, of which often about `num` are in use: whole tiles, the closer the nearer to `num`."""
  tile = _TILE.get(jax.default_backend(), _OTHER_TILE)
  whole = lambda rows: -(-rows // tile) * tile
  step = whole(-(-num // 4))
  width = step if size == num else whole(-(-num // 2))
  found = {1, size} if num == 1 else {size}
  while width < size:
    found.add(width)
    width = whole(max(width + step, 3 * width // 2 if width >= 2 * num else 0))
  return tuple(sorted(found))


def first(function: Callable, narrow: Narrow | None, *args: Any) -> Any:
  """A function of `[1, M, …]` or `[M]` arrays on the first rows; the other rows of its results are 0."""
  if narrow is None:
    return function(*args)
  size = narrow.widths[-1]

  def at(width):
    cut = lambda a: a if isinstance(a, int) else a[:width] if a.ndim == 1 else a[:, :width]
    pad = lambda a: jnp.pad(a, ((0, 0), (0, size - width)) + ((0, 0),) * (a.ndim - 2))
    return lambda: jax.tree.map(pad, function(*jax.tree.map(cut, args)))

  return _switch(at, narrow.num, narrow.widths)


def some(function: Callable[[jax.Array], Any], on_M: jax.Array, widths: Sequence[int], others: Any) -> Any:
  """`function` of the indices of the rows that are on, and perhaps more; `others` has the results of all others.

  Args:
    function: `index_W` -> a tree of `[W, …]` arrays.
    on_M: the rows that matter.
    widths: of the function, the last one M.
    others: a tree of `[M, …]` arrays.
  """
  order_M = jnp.argsort(~on_M, stable=True)

  def at(width):
    index_W = order_M[:width]
    put = lambda old, new: old.at[index_W].set(new, unique_indices=True)
    return lambda: jax.tree.map(put, others, function(index_W)) if width else others

  return _switch(at, jnp.sum(on_M), (0, *widths))


def _switch(at, num, widths):
  which = jnp.sum(num > jnp.asarray(widths[:-1]))
  return jax.lax.switch(which, [at(width) for width in widths])
