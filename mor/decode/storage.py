"""Where decoded keys and values live: the storages of XLA's own operations.

Every storage (see also `packed.py`) has the same three functions:

  make(num_pages)                      empty buffers of one layer
  write(buffer, page_M, offset_M, …)   one entry for each of M tokens
  attend(q_MNH, parts)                 M queries, each over its own rows' entries

An *entry* is the key and value of one token in one (recursion step, layer). A
*row* is the entries of one (sequence, step), in the order of their positions; it
is one list of pages. The tokens that a step did not process have no entry, so a
row's length differs from the sequence's. Entry j of a row lies in its page
j // page_size at offset j % page_size; a write to a page past the end is dropped.

`Dense` reads whole rows with plain attention: the reference. Its pages are as long
as the context, one a row. `Paged` reads a row page by page, so time follows what a
row stores; with a pool of small pages for all rows, memory does too. A page number
means the same page in every layer's buffer.

A query sees the entries of one row or of two, each in its layer's buffer: its own
and, beneath it, a base (see `kv/plans.py`) whose overlaid entries are hidden.

Number formats: float32, or bfloat16, which is stored as its bits in uint16
(XLA:CPU widens a bfloat16 scatter to the whole buffer; elsewhere the same bits
cost nothing).
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

FORMATS = {"float32": jnp.float32, "bfloat16": jnp.uint16}
_GROUP = 8  # rows of one loop over pages
_MERGED = 4  # key heads that one product serves at most
LOW = -1e30  # a score that no query sees; finite, so that no row is NaN


@struct.dataclass
class Buffer:
  """Keys (rotated) and values of one layer; see the storages for shapes."""

  k: jax.Array
  v: jax.Array

  @property
  def num_pages(self) -> int:
    return self.k.shape[0]


@struct.dataclass
class SeenEntries:
  """Which entries each of M queries sees.

  Attributes:
    page_MP: pages of the row; for `Dense`, `[M, 1]` numbers of rows.
    length_M: entries seen; 0 sees none.
    hidden_MS: True for an entry that is overlaid, or None.
  """

  page_MP: jax.Array
  length_M: jax.Array
  hidden_MS: jax.Array | None = None

  def mark_seen(self, size: int) -> jax.Array:
    """Returns True for the entries `[M, size]` that are seen."""
    seen_MS = jnp.arange(size)[None, :] < self.length_M[:, None]
    return seen_MS if self.hidden_MS is None else seen_MS & ~self.hidden_MS


def encode(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns numbers in the storage's format."""
  if like.dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
  return x.astype(like.dtype)


def decode(x: jax.Array) -> jax.Array:
  """Returns numbers of the storage's format as bfloat16 or float32."""
  return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def count_page_bytes(storage: Any) -> int:
  """Returns the bytes that one more page takes in the buffers of one layer."""
  leaves = jax.eval_shape(lambda: jax.tree.leaves(storage.make(1)))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def round_as_stored(x: jax.Array, kv_format: str) -> jax.Array:
  """Returns float32 numbers as the storage gives them back."""
  if kv_format == "float32":
    return x
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA may leave out a conversion and its inverse


def hide_broken(k_MKH: jax.Array, v_MKH: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns entries of which those that are not finite have NaN keys and zero values.

  A query that sees such an entry gets NaN from its key. Any other query multiplies the value by 0, and 0 times
  NaN is NaN: without the zeros a page that is used again would harm the next sequence.
  """
  ok_MK1 = jnp.all(jnp.isfinite(k_MKH) & jnp.isfinite(v_MKH), axis=-1, keepdims=True)
  return jnp.where(ok_MK1, k_MKH, jnp.nan), jnp.where(ok_MK1, v_MKH, 0.0)


@dataclasses.dataclass(frozen=True)
class Dense:
  """Buffers `[pages, page_size, K, H]`."""

  page_size: int
  num_kv_heads: int
  head_dim: int
  kv_format: str
  sorts_rows = False  # a row costs the same wherever it stands

  def make(self, num_pages: int) -> Buffer:
    shape = (num_pages, self.page_size, self.num_kv_heads, self.head_dim)
    return Buffer(jnp.zeros(shape, FORMATS[self.kv_format]), jnp.zeros(shape, FORMATS[self.kv_format]))

  def write(self, buffer: Buffer, page_M: jax.Array, offset_M: jax.Array, k_MKH: jax.Array,
            v_MKH: jax.Array) -> Buffer:
    """Puts one entry for each token; see the module docstring."""
    k_MKH, v_MKH = hide_broken(k_MKH, v_MKH)
    k = buffer.k.at[page_M, offset_M].set(encode(k_MKH, buffer.k), mode="drop")
    v = buffer.v.at[page_M, offset_M].set(encode(v_MKH, buffer.v), mode="drop")
    return Buffer(k, v)

  def attend(self, q_MNH: jax.Array, parts: Sequence[tuple[Buffer, SeenEntries]], cuts: Sequence[int] = (),
             num: jax.Array | None = None) -> jax.Array:
    """Attends over all entries of the rows, hidden ones masked."""
    return attend_whole(self, q_MNH, parts)

  def read(self, buffer: Buffer, rows: SeenEntries) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns whole rows: keys and values `[M, S, K, H]` in float32, and which entries are seen."""
    return _read(self, buffer, rows)


@dataclasses.dataclass(frozen=True)
class Paged:
  """Buffers `[pages, page_size * K * H]`, read with an online softmax.

  Rows go in groups, each as long as its longest row, so sort them by length; a
  group of empty rows costs nothing. Measured on XLA:CPU against four-axis pages
  with one product a key head: a page of two axes gathers 2-3x faster, groups of 8
  rows and one product for all key heads (each query zero for the others') take
  half the rest. Beyond `_MERGED` key heads the zeros would cost more than they save.
  """

  page_size: int
  num_kv_heads: int
  head_dim: int
  kv_format: str
  sorts_rows = True  # the longest first

  def make(self, num_pages: int) -> Buffer:
    shape = (num_pages, self.page_size * self.num_kv_heads * self.head_dim)
    return Buffer(jnp.zeros(shape, FORMATS[self.kv_format]), jnp.zeros(shape, FORMATS[self.kv_format]))

  def write(self, buffer: Buffer, page_M: jax.Array, offset_M: jax.Array, k_MKH: jax.Array,
            v_MKH: jax.Array) -> Buffer:
    """Puts one entry for each token; see the module docstring."""
    k_MKH, v_MKH = hide_broken(k_MKH, v_MKH)
    width = self.num_kv_heads * self.head_dim

    def put(old, new):
      entries = old.reshape(old.shape[0], self.page_size, width)
      return entries.at[page_M, offset_M].set(encode(new, old).reshape(-1, width), mode="drop").reshape(old.shape)

    return Buffer(put(buffer.k, k_MKH), put(buffer.v, v_MKH))

  def attend(self, q_MNH: jax.Array, parts: Sequence[tuple[Buffer, SeenEntries]], cuts: Sequence[int] = (),
             num: jax.Array | None = None) -> jax.Array:
    """Attends over the pages in use only, with an online softmax.

    Args:
      q_MNH: queries, those that see much first.
      parts: what they see.
      cuts: rows at which a group ends, if it were larger.
      num: rows in use, at the front; None is all.
    """
    size, ends = q_MNH.shape[0], sorted(cut for cut in cuts if cut < min(_GROUP, q_MNH.shape[0]))
    starts = [0, *ends]
    if num is None:
      starts += range(starts[-1] + _GROUP, size, _GROUP)

    def group(start, size):
      def take(a):
        return jax.lax.dynamic_slice_in_dim(a, start, size)

      return self._attend(take(q_MNH), [(buffer, jax.tree.map(take, rows)) for buffer, rows in parts])

    out = [group(start, min(end, start + _GROUP) - start) for start, end in zip(starts, [*starts[1:], size])]
    first, last = starts[-1], starts[-1] + _GROUP
    if last >= size:
      return jnp.concatenate(out)

    def more(g, out_MNH):
      start = jnp.minimum(first + g * _GROUP, size - _GROUP)  # the last ones overlap
      return jax.lax.dynamic_update_slice_in_dim(out_MNH, group(start, _GROUP), start, 0)

    out_MNH = jnp.concatenate([*out, jnp.zeros((size - last, *q_MNH.shape[1:]), out[0].dtype)])
    return jax.lax.fori_loop(1, (num - first + _GROUP - 1) // _GROUP, more, out_MNH)

  def read(self, buffer: Buffer, rows: SeenEntries) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns whole rows: keys and values `[M, S, K, H]` in float32, and which entries are seen."""
    return _read(self, buffer, rows)

  def _attend(self, q_MNH, parts):
    num, num_heads = q_MNH.shape[:2]
    scores, values, split = self._products(q_MNH.astype(jnp.dtype(self.kv_format)))

    def page(buffer, row, j, carry):
      top_MN, sum_MN, out = carry
      page_M = jax.lax.dynamic_index_in_dim(row.page_MP, j, 1, keepdims=False)
      k, v = (decode(x.at[page_M].get(mode="promise_in_bounds")) for x in (buffer.k, buffer.v))
      index_1E = j * self.page_size + jnp.arange(self.page_size)[None, :]
      seen_ME = index_1E < row.length_M[:, None]
      if row.hidden_MS is not None:
        seen_ME &= ~jax.lax.dynamic_slice_in_dim(row.hidden_MS, j * self.page_size, self.page_size, 1)
      score_MNE = jnp.where(seen_ME[:, None, :], scores(k) * self.head_dim ** -0.5, LOW)
      new_MN = jnp.maximum(top_MN, jnp.max(score_MNE, axis=-1))
      # Rounded where it is made: XLA:CPU rounds a buffer of its own 50 times slower.
      weight_MNE = jnp.exp(score_MNE - new_MN[:, :, None]).astype(v.dtype)
      scale_MN = jnp.exp(top_MN - new_MN)
      return (new_MN, sum_MN * scale_MN + jnp.sum(weight_MNE.astype(jnp.float32), axis=-1),
              out * scale_MN[:, :, None] + values(weight_MNE, v))

    carry = (jnp.full((num, num_heads), LOW, jnp.float32), jnp.zeros((num, num_heads), jnp.float32), split(None))
    for buffer, row in parts:
      num_pages = (jnp.max(row.length_M) + self.page_size - 1) // self.page_size
      carry = jax.lax.fori_loop(0, num_pages, functools.partial(page, buffer, row), carry)
    _, sum_MN, out = carry
    return split(out / jnp.maximum(sum_MN, 1e-30)[:, :, None])

  def _products(self, q_MNH):
    """Returns scores(k), values(weights, v), and split: the zero sum (None) or a sum -> `[M, N, H]`."""
    num, num_heads = q_MNH.shape[:2]
    k_heads, group, width = self.num_kv_heads, num_heads // self.num_kv_heads, self.head_dim

    def dot(spec, a, b):
      return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    if k_heads > _MERGED:
      q_MKGH = q_MNH.reshape(num, k_heads, group, width)

      def by_head(x):
        return x.reshape(num, self.page_size, k_heads, width)

      def scores_by_head(k):
        return dot("MKGH,MEKH->MKGE", q_MKGH, by_head(k)).reshape(num, num_heads, -1)

      def values_by_head(w, v):
        return dot("MKGE,MEKH->MKGH", w.reshape(num, k_heads, group, -1), by_head(v)).reshape(num, num_heads, width)

      def start_or_keep(x):
        return jnp.zeros((num, num_heads, width), jnp.float32) if x is None else x

      return scores_by_head, values_by_head, start_or_keep
    own_KK = jnp.eye(k_heads, dtype=q_MNH.dtype)
    q_MNX = jnp.einsum("MKGH,KJ->MKGJH", q_MNH.reshape(num, k_heads, group, width), own_KK).reshape(num, num_heads, -1)

    def flat(x):
      return x.reshape(num, self.page_size, k_heads * width)

    def scores(k):
      return dot("MNX,MEX->MNE", q_MNX, flat(k))

    def values(w, v):
      return dot("MNE,MEX->MNX", w, flat(v))

    def split(x):
      if x is None:
        return jnp.zeros((num, num_heads, k_heads * width), jnp.float32)
      x = x.reshape(num, k_heads, group, k_heads, width)
      return jnp.stack([x[:, k, :, k] for k in range(k_heads)], axis=1).reshape(num, num_heads, width)

    return scores, values, split


def attend_whole(storage: Any, q_MNH: jax.Array, parts: Sequence[tuple[Any, SeenEntries]]) -> jax.Array:
  """Attends over all entries of the rows, read as a whole and hidden ones masked."""
  whole = [storage.read(buffer, rows) for buffer, rows in parts]
  k_MSKH, v_MSKH, seen_MS = (jnp.concatenate(arrays, axis=1) for arrays in zip(*whole))
  q_MKGH = q_MNH.reshape(q_MNH.shape[0], storage.num_kv_heads, -1, storage.head_dim)
  score_MKGS = jnp.einsum("MKGH,MSKH->MKGS", q_MKGH, k_MSKH) * storage.head_dim ** -0.5
  weight_MKGS = jax.nn.softmax(jnp.where(seen_MS[:, None, None, :], score_MKGS, LOW), axis=-1)
  return jnp.einsum("MKGS,MSKH->MKGH", weight_MKGS, v_MSKH).reshape(q_MNH.shape)


def _read(storage, buffer, rows):
  def get(x):
    x = decode(x.at[rows.page_MP].get(mode="clip")).astype(jnp.float32)
    return x.reshape(x.shape[0], -1, storage.num_kv_heads, storage.head_dim)
  k_MSKH = get(buffer.k)
  return k_MSKH, get(buffer.v), rows.mark_seen(k_MSKH.shape[1])
