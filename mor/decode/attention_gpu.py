"""Attention of decoded tokens over packed pages: the GPU kernel, in Triton.

One program for each query token, key head and share of the row: rows are few, so each is read by several programs
(split-K; Dao et al., "Flash-Decoding for long-context inference", 2023), whose online softmaxes are merged after.
Shares are of the entries that a row holds, whatever room it has. What a row does not use is never read.

The query is zero in the lanes of values, so no lane is cut out; see `attention_tpu.py`. Triton takes powers of two
only, so entries are padded to one, and a page of any size is read by the page and offset of each entry.

jax deprecates Pallas's Triton back end from 0.11 on, in favour of Mosaic GPU. `round_width`, `explain_misfit` and
`attend` are all that the rest knows of this file.

Source: `jax.experimental.pallas.ops.gpu.paged_attention`; it has no hidden entries and wants pages of its own layout.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

from mor.decode import control
from mor.decode import storage as storage_lib

_LEAST_SIDE = 16  # of a tensor core's product
_MOST_ENTRIES = 64  # of one turn
_TURN_BYTES = 16 * 2**10  # of one turn, if that is enough entries; float32 would spill registers beyond
_MOST_BYTES = 64 * 2**10  # of one turn; more are in flight in the shared memory
_PROGRAMS = 1024  # which keep every multiprocessor busy, and even out rows of different lengths
_WARPS, _STAGES = 4, 2


def round_width(width: int) -> int:
  """Returns the numbers that an entry of `width` numbers takes."""
  return max(_LEAST_SIDE, control.ceil_power(width))


def explain_misfit(page_size: int, num_kv_heads: int, width: int, dtype: jnp.dtype) -> str | None:
  """Returns why the kernel cannot serve such pages, with the remedy, or None if it can."""
  del page_size, num_kv_heads  # any
  most = _MOST_BYTES // (_LEAST_SIDE * dtype.itemsize)
  if width > most:
    return f"entries of {width} {dtype.name} numbers are more than the {most} that a tile of {_MOST_BYTES} bytes holds"
  return None


def attend(q_MNH: jax.Array, kv_PKEW: jax.Array, page_MP: jax.Array, length_M: jax.Array,
           hidden_MS: jax.Array | None = None, interpret: bool = False) -> jax.Array:
  """Attends with each query over the entries of its own row; see `attention_tpu.attend`."""
  num, num_heads, head_dim = q_MNH.shape
  num_pages, num_kv_heads, page_size, width = kv_PKEW.shape
  group = num_heads // num_kv_heads
  padded = max(_LEAST_SIDE, control.ceil_power(group))
  block = choose_block(width, kv_PKEW.dtype)
  turns = -(-page_MP.shape[1] * page_size // block)
  splits = min(control.ceil_power(turns), control.ceil_power(-(-_PROGRAMS // (num * num_kv_heads))))
  q_MKGW = jnp.pad(q_MNH.astype(kv_PKEW.dtype).reshape(num, num_kv_heads, group, head_dim),
                   ((0, 0), (0, 0), (0, padded - group), (0, width - head_dim)))

  def row(size):
    return pl.BlockSpec((None, size), lambda m, k, split: (m, 0))

  args = [q_MKGW, kv_PKEW, page_MP, length_M[:, None]]
  specs = [pl.BlockSpec((None, None, padded, width), lambda m, k, split: (m, k, 0, 0)),
           pl.BlockSpec((num_pages, None, page_size, width), lambda m, k, split: (0, k, 0, 0)),
           row(page_MP.shape[1]), row(1)]
  if hidden_MS is not None:
    args.append(hidden_MS.astype(jnp.int8))
    specs.append(row(hidden_MS.shape[1]))

  def part(*shape):
    spec = pl.BlockSpec((None, None, None, padded, *shape), lambda m, k, split: (split, m, k) + (0,) * (1 + len(shape)))
    return spec, jax.ShapeDtypeStruct((splits, num, num_kv_heads, padded, *shape), jnp.float32)

  out_specs, out_shape = zip(part(width), part(), part())
  kernel = functools.partial(_kernel, block=block, page_size=page_size, group=group, head_dim=head_dim,
                             hides=hidden_MS is not None)
  out_XMKGW, *sums = pl.pallas_call(
      kernel, grid=(num, num_kv_heads, splits), in_specs=specs, out_specs=list(out_specs), out_shape=list(out_shape),
      compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=_STAGES), interpret=interpret,
      name="packed_attention")(*args)
  top_XMKG, total_XMKG = (x[:, :, :, :group] for x in sums)
  return _merge(out_XMKGW[:, :, :, :group, head_dim:2 * head_dim], top_XMKG, total_XMKG).reshape(q_MNH.shape)


def choose_block(width: int, dtype: jnp.dtype) -> int:
  """Returns the entries of a turn, a power of two."""
  return max(_LEAST_SIDE, min(_MOST_ENTRIES, _TURN_BYTES // (width * jnp.dtype(dtype).itemsize)))


def _merge(out_XMKGH, top_XMKG, total_XMKG):
  """Returns the attention over whole rows from that over X shares of them, none of which is divided by its total."""
  scale_XMKG = jnp.exp(top_XMKG - jnp.max(top_XMKG, axis=0, keepdims=True))
  total_MKG = jnp.maximum(jnp.sum(total_XMKG * scale_XMKG, axis=0), 1e-30)
  return jnp.sum(out_XMKGH * scale_XMKG[..., None], axis=0) / total_MKG[..., None]


def _kernel(q_ref, kv_ref, page_ref, length_ref, *refs, block, page_size, group, head_dim, hides):
  hidden_ref = refs[0] if hides else None
  out_ref, top_ref, total_ref = refs[1:] if hides else refs
  length, q_GW = length_ref[0], q_ref[...]
  padded, width = q_GW.shape
  exact = q_GW.dtype == jnp.float32  # float32 means it: no TF32
  dot = functools.partial(plgpu.dot, allow_tf32=False) if exact else plgpu.dot
  turns = (length + block - 1) // block
  share = (turns + pl.num_programs(2) - 1) // pl.num_programs(2)
  first = pl.program_id(2) * share

  def attend_turn(turn, carry):
    top_G, total_G, out_GW = carry
    index_S = turn * block + jnp.arange(block)
    seen_S = index_S < length
    page_S = plgpu.load(page_ref.at[index_S // page_size], mask=seen_S, other=0)
    entry_SW = tuple(jnp.broadcast_to(x_S[:, None], (block, width)) for x_S in (page_S, index_S % page_size, seen_S))
    lane_SW = jnp.broadcast_to(jnp.arange(width)[None, :], (block, width))
    kv_SW = plgpu.load(kv_ref.at[*entry_SW[:2], lane_SW], mask=entry_SW[2], other=0.0)
    if hides:
      seen_S &= plgpu.load(hidden_ref.at[index_S], mask=seen_S, other=1) == 0
    score_GS = jnp.where(seen_S[None, :], dot(q_GW, kv_SW.T) * head_dim ** -0.5, storage_lib.LOW)
    new_G = jnp.maximum(top_G, jnp.max(score_GS, axis=-1))
    weight_GS, scale_G = jnp.exp(score_GS - new_G[:, None]).astype(kv_SW.dtype), jnp.exp(top_G - new_G)
    out_GW = out_GW * scale_G[:, None] + dot(weight_GS, kv_SW)
    return new_G, total_G * scale_G + jnp.sum(weight_GS.astype(jnp.float32), axis=-1), out_GW

  carry = (jnp.full(padded, storage_lib.LOW, jnp.float32), jnp.zeros(padded, jnp.float32),
           jnp.zeros((padded, width), jnp.float32))
  top_G, total_G, out_GW = jax.lax.fori_loop(first, jnp.minimum(first + share, turns), attend_turn, carry)
  row_G1, lane_1W = jnp.arange(padded)[:, None], jnp.arange(width)[None, :]
  used_GW = (row_G1 < group) & (lane_1W >= head_dim) & (lane_1W < 2 * head_dim)
  plgpu.store(out_ref, out_GW, mask=used_GW)  # keys and padding are not worth their bytes
  top_ref[...], total_ref[...] = top_G, total_G
