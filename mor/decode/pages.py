"""A pool's free pages, as a stack on the device.

Rows take pages when an entry needs one and give them back when their request
ends, inside jitted programs, so that the host never has to know how long a row is.
"""

from flax import struct
import jax
import jax.numpy as jnp


@struct.dataclass
class Free:
  """The first `num` of `page_P` are free."""

  page_P: jax.Array
  num: jax.Array


def make(num_pages: int) -> Free:
  """All pages free; the lowest number is taken first."""
  return Free(jnp.arange(num_pages, dtype=jnp.int32)[::-1], jnp.int32(num_pages))


def reserve(free: Free, page_BP: jax.Array, length_B: jax.Array, count_B: jax.Array,
            page_size: int) -> tuple[Free, jax.Array, jax.Array]:
  """Takes the pages that `count_B` more entries need.

  A row gets all that it needs or nothing; rows are served in order.

  Args:
    free: the pool's free pages.
    page_BP: pages of each row.
    length_B: entries in each row, whose pages it has.
    count_B: entries to make room for.
    page_size: entries in a page.

  Returns:
    The pages still free, `page_BP` with the new pages, and True for the rows that
    have room now.
  """
  return take(free, page_BP, _between(page_BP.shape[1], length_B, length_B + count_B, page_size))


def take(free: Free, page_BP: jax.Array, new_BP: jax.Array) -> tuple[Free, jax.Array, jax.Array]:
  """Takes a page for every True of `new_BP`; what it returns is what `reserve` does."""
  rank_BP = jnp.cumsum(new_BP.reshape(-1)).reshape(new_BP.shape) - 1
  last_B = jnp.max(jnp.where(new_BP, rank_BP, -1), axis=1)
  ok_B = last_B < free.num
  new_BP &= ok_B[:, None]
  taken_BP = free.page_P.at[free.num - 1 - rank_BP].get(mode="clip")
  left = free.num - jnp.sum(new_BP, dtype=jnp.int32)
  return Free(free.page_P, left), jnp.where(new_BP, taken_BP, page_BP), ok_B


def release(free: Free, page_BP: jax.Array, length_B: jax.Array, page_size: int, kept_B: jax.Array | int = 0) -> Free:
  """Gives back the pages of rows with `length_B` entries, of which the first `kept_B` stay."""
  used_BP = _between(page_BP.shape[1], jnp.broadcast_to(kept_B, length_B.shape), length_B, page_size)
  rank_BP = jnp.cumsum(used_BP.reshape(-1)).reshape(used_BP.shape) - 1
  target_BP = jnp.where(used_BP, free.num + rank_BP, free.page_P.shape[0])
  page_P = free.page_P.at[target_BP.reshape(-1)].set(page_BP.reshape(-1), mode="drop")
  return Free(page_P, free.num + jnp.sum(used_BP, dtype=jnp.int32))


def _between(num_pages: int, low_B: jax.Array, high_B: jax.Array, page_size: int) -> jax.Array:
  """The pages `[B, P]` that hold entries `high_B` needs and `low_B` does not."""
  pages_B1 = lambda entries_B: ((entries_B + page_size - 1) // page_size)[:, None]
  column_1P = jnp.arange(num_pages)[None, :]
  return (column_1P >= pages_B1(low_B)) & (column_1P < pages_B1(high_B))
