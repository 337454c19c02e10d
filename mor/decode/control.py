"""Control flow for arrays of which often only some rows are in use.

On a CPU a program *adapts*: time follows the rows that are computed, and a branch costs
nothing. XLA runs a `cond` by copying what passes through it, and computes every row of
a matmul. So `run_once` is a branch that works on a cache in place. A function of rows is
compiled at a few static numbers of rows, its *widths*, and runs at the smallest width
that holds the rows in use.

An accelerator computes a few hundred rows in the time in which it reads the weights,
and each branch or loop of unknown length waits for the host (on a GPU, 10 to 20 us).
So there every function runs on all rows, and nothing branches but what saves a pass of
the stack: the deeper passes of a plain model that is cut into steps at its exits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from mor.model import kernels

Carry = TypeVar("Carry")

_TILE = 5  # rows that a matmul computes at once on a CPU: measured, bfloat16 with AVX2


def adapts() -> bool:
  """Returns True if programs adapt to the rows in use while they run; see the module docstring."""
  return kernels.platform() == "cpu"


def run_once(on: jax.Array, function: Callable[[Carry], Carry], carry: Carry) -> Carry:
  """Returns `function(carry)` if `on`, else `carry`: a loop of one turn, because `cond` would copy the carry."""
  def body(turn_carry):
    return jnp.bool_(False), function(turn_carry[1])

  return jax.lax.while_loop(lambda turn_carry: turn_carry[0], body, (on, carry))[1]


def choose(known: bool | None, on: jax.Array, function: Callable[[], Any], other: Callable[[], Any]) -> Any:
  """Returns `function()` or `other()`: as `known` says while tracing, or, if that is None, by a branch, as `on` says."""
  if known is None:
    return jax.lax.cond(on, function, other)
  return function() if known else other()


def skip_idle(on: jax.Array, function: Callable[[Carry], Carry], carry: Carry) -> Carry:
  """Returns `function(carry)`, which changes nothing unless `on`: a program that adapts skips it then."""
  return run_once(on, function, carry) if adapts() else function(carry)


def repeat(num_turns: int, goes_on: Callable[[Carry], jax.Array], function: Callable[[jax.Array, Carry], Carry],
           carry: Carry) -> tuple[jax.Array, Carry]:
  """Runs turns while `goes_on(carry)`, `num_turns` at most; further turns would change nothing.

  A program that does not adapt runs all turns.

  Returns:
    The number of turns before which `goes_on` held, and the carry.
  """
  if adapts():
    def is_on(turn_carry):
      return (turn_carry[0] < num_turns) & goes_on(turn_carry[1])

    def run_turn(turn_carry):
      return turn_carry[0] + 1, function(*turn_carry)

    return jax.lax.while_loop(is_on, run_turn, (jnp.int32(0), carry))

  def run_any_turn(k, counted):
    return counted[0] + goes_on(counted[1]).astype(jnp.int32), function(k, counted[1])

  return jax.lax.fori_loop(0, num_turns, run_any_turn, (jnp.int32(0), carry))


class Narrow(NamedTuple):
  """The first `num` rows of a batch are in use; matmuls run at the smallest of `widths` that holds them."""

  num: jax.Array
  widths: tuple[int, ...]


def list_widths(num: int, size: int) -> tuple[int, ...]:
  """Returns the numbers of rows to compile: multiples of the tile, denser around the typical count.

  A program that does not adapt has one, all rows.

  Args:
    num: typical count of rows in use.
    size: rows of the batch, the last width.
  """
  if not adapts():
    return (size,)

  def whole(rows):
    return -(-rows // _TILE) * _TILE

  step = whole(-(-num // 4))
  width = step if size == num else whole(-(-num // 2))
  found = {1, size} if num == 1 else {size}
  while width < size:
    found.add(width)
    width = whole(max(width + step, 3 * width // 2 if width >= 2 * num else 0))
  return tuple(sorted(found))


def run_first(function: Callable, narrow: Narrow | None, *args: Any) -> Any:
  """Runs a function of `[1, M, …]` or `[M]` arrays on the first rows; the other rows of its results are 0."""
  if narrow is None:
    return function(*args)
  size = narrow.widths[-1]

  def run_at(width):
    def cut(a):
      return a if isinstance(a, int) else a[:width] if a.ndim == 1 else a[:, :width]

    def pad(a):
      return jnp.pad(a, ((0, 0), (0, size - width)) + ((0, 0),) * (a.ndim - 2))

    return lambda: jax.tree.map(pad, function(*jax.tree.map(cut, args)))

  return _switch(run_at, narrow.num, narrow.widths)


def pick_rows(on_M: jax.Array, new: Any, old: Any) -> Any:
  """Returns trees' rows of `new` where on, else of `old`."""
  return jax.tree.map(lambda a, b: jnp.where(on_M.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)


def run_some(function: Callable[[jax.Array | slice], Any], on_M: jax.Array, widths: Sequence[int], others: Any) -> Any:
  """Runs a function on the rows that are on, and perhaps on more.

  Args:
    function: `index_W` -> a tree of `[W, …]` arrays; a program that does not adapt gives a slice of all rows.
    on_M: rows in use.
    widths: numbers of rows at which the function is compiled, the last one M.
    others: a tree of `[M, …]` arrays, the results of all other rows.

  Returns:
    A tree like `others`.
  """
  if not adapts():
    return pick_rows(on_M, function(slice(None)), others)
  order_M = jnp.argsort(~on_M, stable=True)

  def run_at(width):
    index_W = order_M[:width]

    def put(old, new):
      return old.at[index_W].set(new, unique_indices=True)

    return lambda: jax.tree.map(put, others, function(index_W)) if width else others

  return _switch(run_at, jnp.sum(on_M), (0, *widths))


def ceil_power(num: int) -> int:
  """Returns the least power of two that is not below a count, so that sizes of programs are few."""
  return 1 << max(num - 1, 0).bit_length()


def _switch(run_at, num, widths):
  which = jnp.sum(num > jnp.asarray(widths[:-1]))
  return jax.lax.switch(which, [run_at(width) for width in widths])
