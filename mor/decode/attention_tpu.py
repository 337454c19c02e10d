"""Attention of decoded tokens over packed pages: the TPU kernel.

One program for each query token, in order. It walks the pages that the token's KV row uses, several a turn, and
copies the next turn's pages into one half of a buffer while it computes on the other half; the last turn of a row
copies the first pages of the next row. Pages that a row does not use are never read.

An entry holds a key in its first `head_dim` lanes and the value in the next ones (see `packed.py`). The query is
zero in the value's lanes, so its product with whole entries is that with the keys; the weights' product with whole
entries holds the sum of the values in its own lanes. No lane is ever cut out, so any head size will do.

  top, total, out = online softmax over the turns (Milakov and Gimelshein, arXiv:1805.02867)

Source: `jax.experimental.pallas.ops.tpu.paged_attention` for the double buffer over rows; it has no hidden entries,
and refuses heads of 64.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from mor.decode import storage as storage_lib

LANES = 128
_SUBLANES = 8  # of float32; a tile of 16-bit numbers has twice as many
_MOST_ENTRIES = 512  # of one turn
_MOST_BYTES = 11 * 2**20  # of the buffer and what products make of it; a kernel gets 16 MiB by default
_MOST_PAGES = 200_000  # page numbers of one call; the scalar memory holds 262,144


def round_width(width: int) -> int:
  """Returns the lanes that an entry of `width` numbers takes."""
  return -(-width // LANES) * LANES


def explain_misfit(page_size: int, num_kv_heads: int, width: int, dtype: jnp.dtype) -> str | None:
  """Returns why the kernel cannot serve such pages, with the remedy, or None if it can."""
  rows = _SUBLANES * 4 // dtype.itemsize
  if page_size % rows:
    return f"page_size={page_size} is no multiple of {rows}, the rows of a tile of {dtype.name}; use one"
  entries = math.lcm(page_size, LANES)
  needed = _count_bytes(entries, num_kv_heads, width, dtype)
  if needed > _MOST_BYTES:
    return (f"page_size={page_size} with {num_kv_heads} key heads of {width} lanes needs {needed / 2**20:.0f} MiB on the "
            f"chip for {entries} entries, more than {_MOST_BYTES / 2**20:.0f}; use smaller pages")
  return None


def attend(q_MNH: jax.Array, kv_PKEW: jax.Array, page_MP: jax.Array, length_M: jax.Array,
           hidden_MS: jax.Array | None = None, interpret: Any = False) -> jax.Array:
  """Attends with each query over the entries of its own row.

  Args:
    q_MNH: queries, float32.
    kv_PKEW: packed pages.
    page_MP: pages of each query's row.
    length_M: entries of the row, of which the query sees those that are not hidden; 0 gives zeros.
    hidden_MS: True for an entry that is not seen, or None.
    interpret: True to run without a TPU, or `pltpu.InterpretParams`, which look for races.

  Returns:
    Sums of values `[M, N, H]` in float32.
  """
  num, num_heads, head_dim = q_MNH.shape
  most = _MOST_PAGES // page_MP.shape[1]
  if num > most:
    parts = [jax.tree.map(lambda a, i=i: a[i:i + most], (q_MNH, page_MP, length_M, hidden_MS)) for i in range(0, num, most)]
    return jnp.concatenate([attend(q, kv_PKEW, *rows, interpret=interpret) for q, *rows in parts])
  _, num_kv_heads, page_size, width = kv_PKEW.shape
  group = num_heads // num_kv_heads
  padded = -(-group // _SUBLANES) * _SUBLANES
  block = choose_block(page_MP.shape[1], page_size, num_kv_heads, width, kv_PKEW.dtype)
  q_MKGW = jnp.pad(q_MNH.astype(kv_PKEW.dtype).reshape(num, num_kv_heads, group, head_dim),
                   ((0, 0), (0, 0), (0, padded - group), (0, width - head_dim)))
  args, specs = [q_MKGW], [_row(num_kv_heads, padded, width)]
  if hidden_MS is not None:
    size = hidden_MS.shape[1] + -hidden_MS.shape[1] % (block * page_size)
    args.append(jnp.pad(hidden_MS.astype(jnp.float32), ((0, 0), (0, size - hidden_MS.shape[1])))[:, None])
    specs.append(_row(1, size))
  kernel = functools.partial(_kernel, pages_per_row=page_MP.shape[1], block=block, scale=head_dim ** -0.5,
                             hides=hidden_MS is not None)
  out_MKGW = pl.pallas_call(
      kernel, out_shape=jax.ShapeDtypeStruct(q_MKGW.shape, jnp.float32),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(num,), in_specs=[*specs, pl.BlockSpec(memory_space=pl.ANY)],
          out_specs=_row(num_kv_heads, padded, width),
          scratch_shapes=[pltpu.VMEM((2, num_kv_heads, block * page_size, width), kv_PKEW.dtype),
                          pltpu.SemaphoreType.DMA((2,)), pltpu.SMEM((1,), jnp.int32)]),
      compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),  # a row copies for the next one
      interpret=interpret, name="packed_attention",
  )(length_M, page_MP.reshape(-1), *args, kv_PKEW)
  return out_MKGW[:, :, :group, head_dim:2 * head_dim].reshape(q_MNH.shape)


def choose_block(pages_per_row: int, page_size: int, num_kv_heads: int, width: int, dtype: jnp.dtype) -> int:
  """Returns the pages of a turn: whole vectors of entries (also of a shorter row), as many as time and room allow."""
  unit = math.lcm(page_size, LANES)
  most = _MOST_BYTES // _count_bytes(1, num_kv_heads, width, dtype)
  units = min(_MOST_ENTRIES, most) // unit
  return max(1, min(units, -(-pages_per_row * page_size // unit))) * unit // page_size


def _count_bytes(entries: int, num_kv_heads: int, width: int, dtype: jnp.dtype) -> int:
  numbers = 2 * num_kv_heads * entries * width  # two halves
  return numbers * (2 if dtype == jnp.bfloat16 else 10)  # exact products split float32 into parts


def _row(*shape: int) -> pl.BlockSpec:
  """Returns a block that is all that belongs to one query token."""
  return pl.BlockSpec((1, *shape), lambda m, *_: (m,) + (0,) * len(shape))


@dataclasses.dataclass(frozen=True)
class _Copies:
  """Copies of pages from the pool into the two halves of the buffer, `block` pages a turn."""

  kv_ref: Any
  page_ref: Any
  length_ref: Any
  buffer_ref: Any
  semaphore_ref: Any
  pages_per_row: int
  block: int

  def count_pages(self, row):
    page_size = self.kv_ref.shape[2]
    return (self.length_ref[row] + page_size - 1) // page_size

  def start(self, row, turn, half):
    self._each(lambda copy: copy.start(), row, turn, half)

  def wait(self, row, turn, half):
    self._each(lambda copy: copy.wait(), row, turn, half)

  def _each(self, act, row, turn, half):
    page_size = self.kv_ref.shape[2]

    def one(j, _):
      page = self.page_ref[row * self.pages_per_row + turn * self.block + j]
      target = self.buffer_ref.at[half, :, pl.ds(pl.multiple_of(j * page_size, page_size), page_size)]
      act(pltpu.make_async_copy(self.kv_ref.at[page], target, self.semaphore_ref.at[half]))

    jax.lax.fori_loop(0, jnp.minimum(self.count_pages(row) - turn * self.block, self.block), one, None)


def _kernel(length_ref, page_ref, q_ref, *refs, pages_per_row, block, scale, hides):
  hidden_ref = refs[0] if hides else None
  kv_ref, out_ref, buffer_ref, semaphore_ref, half_ref = refs[1:] if hides else refs
  copies = _Copies(kv_ref, page_ref, length_ref, buffer_ref, semaphore_ref, pages_per_row, block)
  row, num_rows, entries = pl.program_id(0), pl.num_programs(0), buffer_ref.shape[2]

  def start_next_row(half):
    @pl.when(row + 1 < num_rows)
    def _():
      copies.start(jnp.minimum(row + 1, num_rows - 1), 0, half)

  @pl.when(row == 0)
  def _():
    half_ref[0] = 0
    buffer_ref[...] = jnp.zeros_like(buffer_ref)  # what no copy writes must be finite
    copies.start(0, 0, 0)

  first, turns = half_ref[0], (copies.count_pages(row) + block - 1) // block

  @pl.when(turns == 0)
  def _():
    start_next_row(first)

  def attend_turn(turn, carry):
    half = jax.lax.rem(first + turn, 2)

    @pl.when(turn + 1 < turns)
    def _():
      copies.start(row, turn + 1, 1 - half)

    @pl.when(turn + 1 == turns)
    def _():
      start_next_row(1 - half)

    copies.wait(row, turn, half)
    start = pl.multiple_of(turn * entries, entries)
    seen_1S = start + jax.lax.broadcasted_iota(jnp.int32, (1, entries), 1) < length_ref[row]
    if hides:
      seen_1S &= hidden_ref[0, :, pl.ds(start, entries)] == 0
    return _accumulate(carry, q_ref[0], buffer_ref[half], seen_1S, scale)

  heads, group, width = q_ref.shape[1:]
  carry = (jnp.full((heads, group, 1), storage_lib.LOW, jnp.float32), jnp.zeros((heads, group, 1), jnp.float32),
           jnp.zeros((heads, group, width), jnp.float32))
  _, total_KG1, out_KGW = jax.lax.fori_loop(0, turns, attend_turn, carry)
  out_ref[0] = out_KGW / jnp.maximum(total_KG1, 1e-30)
  half_ref[0] = jax.lax.rem(first + turns, 2)


def _accumulate(carry, q_KGW, kv_KSW, seen_1S, scale):
  """Takes the entries of one turn into the online softmax."""
  top_KG1, total_KG1, out_KGW = carry
  exact = kv_KSW.dtype == jnp.float32  # float32 means it: no passes of bfloat16
  precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision)
  score_KGS = jnp.where(seen_1S[None], dot("KGW,KSW->KGS", q_KGW, kv_KSW) * scale, storage_lib.LOW)
  new_KG1 = jnp.maximum(top_KG1, jnp.max(score_KGS, axis=-1, keepdims=True))
  weight_KGS = jnp.exp(score_KGS - new_KG1).astype(kv_KSW.dtype)
  scale_KG1 = jnp.exp(top_KG1 - new_KG1)
  total_KG1 = total_KG1 * scale_KG1 + jnp.sum(weight_KGS.astype(jnp.float32), axis=-1, keepdims=True)
  return new_KG1, total_KG1, out_KGW * scale_KG1 + dot("KGS,KSW->KGW", weight_KGS, kv_KSW)
