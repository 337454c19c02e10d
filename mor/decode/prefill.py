"""Prompt tokens through the model at once, for their keys and values.

One chunk of T tokens a sequence, after the tokens that the cache holds already.
Every step runs all T (masked execution; see `model/recursion.py`) with the router's
causal decision, and stores the entries that decoding token by token would store; the
chunk reads its own entries as they are stored. Sums are in another order, though, and
paged decoding rounds queries and attention weights to bfloat16 if keys are: entries in
bfloat16 may differ in their last bit.
Hidden states leave no trace: the last token of a prompt is decoded, not prefilled.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import slots as slots_lib
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.model import kernels
from mor.model.kv import view as kv_view



def run(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, cache: cache_lib.Cache, tokens_BT: jax.Array,
        start_B: jax.Array, length_B: jax.Array, context_pages: int) -> tuple[cache_lib.Cache, jax.Array, jax.Array]:
  """Stores a chunk of prompts.

  Args:
    decoder: the model's tables.
    weights: of the model.
    cache: of B sequences.
    tokens_BT: the chunk, padded at the end.
    start_B: position of each sequence's first token.
    length_B: tokens of the chunk; 0 leaves a sequence alone.
    context_pages: pages of a KV row, from its first on, that hold the entries before the chunk; static. 0 if every
      `start_B` is 0.

  Returns:
    The cache, the depth `[B, T]` of each token, and whether the pages sufficed;
    otherwise the cache is of no use.
  """
  chunk = _Chunk(decoder, tokens_BT, start_B, length_B, context_pages)
  h_BTD = decoder.embed(weights, tokens_BT.reshape(-1)).reshape(*tokens_BT.shape, -1)
  cache = chunk.reserve_edge(cache)
  cache, h_BTD = chunk.edge("prelude", weights, cache, h_BTD)
  cache, h_BTD, depth_BT = chunk.recursion(weights, cache, h_BTD)
  cache, _ = chunk.edge("coda", weights, cache, h_BTD)
  return cache, depth_BT, chunk.ok


class _Chunk:
  """The queries of one chunk, and what they see."""

  def __init__(self, decoder, tokens_BT, start_B, length_B, context_pages):
    self.decoder, self.storage, self.context_pages = decoder, decoder.tables.storage, context_pages
    batch, seq_len = self.shape = tokens_BT.shape
    self.start_B, self.length_B = start_B, length_B
    self.valid_BT = jnp.arange(seq_len)[None, :] < length_B[:, None]
    self.position_BT = start_B[:, None] + jnp.arange(seq_len)[None, :]
    self.batch_BT = jnp.broadcast_to(jnp.arange(batch)[:, None], self.shape)
    self.rotation = decoder.rotation(self.position_BT.reshape(-1))
    self.ok = jnp.bool_(True)

  def reserve_edge(self, cache):
    if not self.decoder.tables.num_edges:
      return cache
    free, page_BP, ok_B = cache_lib.reserve_pages(
        cache.edge_free, cache.edge_page_BP, self.start_B, self.length_B, self.storage.page_size)
    self.ok &= jnp.all(ok_B)
    return cache.replace(edge_free=free, edge_page_BP=page_BP, edge_length_B=cache.edge_length_B + self.length_B)

  def edge(self, group: str, weights, cache, h_BTD):
    """Runs prelude or coda over the whole chunk."""
    if not getattr(weights, group):
      return cache, h_BTD
    first = 0 if group == "prelude" else self.decoder.tables.schedule.prelude
    buffers, place = list(cache.edge), self._place(cache.edge_page_BP, self.position_BT, self.valid_BT, cache.edge[0])
    rows = self._see(cache.edge_page_BP, self.start_B)
    for i, layer in enumerate(getattr(weights, group), start=first):
      def attend(q, fresh, i=i):
        out, fresh = self._order(self._attend(q, fresh, self.valid_BT, [(buffers[i], rows)]), fresh)
        buffers[i] = self._write(buffers[i], place, fresh)
        return out
      h_BTD = self._layer(layer, h_BTD, attend)
    return cache.replace(edge=tuple(buffers)), h_BTD

  def recursion(self, weights, cache, h_BTD):
    """Runs all steps: decide, run the stack, store, merge."""
    decoder, entry_BTD = self.decoder, h_BTD
    self.before = cache  # the chunk's own keys are fresh, not read back
    plan = decoder.router.enter(weights.router, h_BTD, self.valid_BT, balance=weights.balance,
                                position_BT=self.position_BT)
    alive_BT, depth_BT, shared = self.valid_BT, jnp.zeros(self.shape, jnp.int32), {}
    for r in range(decoder.tables.schedule.num_steps):
      routed = decoder.router.decide(plan, h_BTD, alive_BT, r)
      plan = decoder.router.follow(plan, routed.score_BT)
      run_BT = alive_BT if r == 0 and decoder.tables.plan.shares else routed.keep_BT
      cache, y_BTD = self._step(weights, cache, h_BTD, run_BT, r, shared)
      routed_M = routed.replace(keep_BT=_flatten(routed.keep_BT), gate_BT=_flatten(routed.gate_BT),
                                entry_BT=_flatten(routed.entry_BT))
      h_MD = decoder.merge(_flatten(h_BTD), _flatten(y_BTD), _flatten(entry_BTD), routed_M)
      h_BTD = h_MD.reshape(h_BTD.shape)
      alive_BT = routed.keep_BT
      depth_BT += alive_BT.astype(jnp.int32)
    return cache, h_BTD, depth_BT

  def _step(self, weights, cache, h_BTD, run_BT, r: int, shared: dict):
    """Runs the stack once; `shared` keeps the fresh keys of layers that later ones read."""
    decoder = self.decoder
    own_rows = {rule.own_R[r] for rule in decoder.tables.rules} - {-1}
    place = None
    if own_rows:
      (own,) = own_rows
      cache, place = self._store(cache, own, run_BT)
    buffers = list(cache.stack)
    seen_BT = self.valid_BT if decoder.tables.plan.shares else run_BT
    for i, parameters in enumerate(decoder.tables.schedule.rows[r]):
      rule = decoder.tables.rules[i]
      own, base, base_buffer = rule.own_R[r], rule.base_R[r], rule.base_buffer_R[r]

      def attend(q, fresh, i=i, own=own, base=base, base_buffer=base_buffer):
        rows = []
        if base >= 0:
          hidden_BS = self.before.hidden_BRS[:, own] if own >= 0 else None
          rows.append((buffers[base_buffer], self._context(base, hidden_BS)))
        if own >= 0:
          rows.append((buffers[i], self._context(own, None)))
        if base >= 0:
          fresh = self._overlay(shared[base, base_buffer], fresh if own >= 0 else None, run_BT)
        out, fresh = self._order(self._attend(q, fresh, seen_BT, rows), fresh)
        if own >= 0:
          buffers[i] = self._write(buffers[i], place, fresh)
          shared.setdefault((own, i), fresh)
        return out

      h_BTD = self._layer(weights.stack[parameters], h_BTD, attend, weights.deltas[i], r)
    return cache.replace(stack=tuple(buffers)), h_BTD

  def _store(self, cache, row: int, run_BT):
    """Makes room in a table row for the tokens of `run_BT`, and says where each goes."""
    length_B, count_B = cache.length_BR[:, row], jnp.sum(run_BT, axis=1, dtype=jnp.int32)
    free, page_BP, ok_B = cache_lib.reserve_pages(
        cache.free, cache.page_BRP[:, row], length_B, count_B, self.storage.page_size)
    self.ok &= jnp.all(ok_B)
    cache = cache.replace(free=free, page_BRP=cache.page_BRP.at[:, row].set(page_BP),
                          length_BR=cache.length_BR.at[:, row].add(count_B))
    if self.decoder.tables.overlays:
      cache = cache.replace(hidden_BRS=cache.hidden_BRS.at[self.batch_BT, row, self.position_BT].max(
          run_BT, mode="drop"))
    index_BT = length_B[:, None] + jnp.cumsum(run_BT, axis=1) - 1
    return cache, self._place(page_BP, index_BT, run_BT, cache.stack[0])

  def _context(self, row: int, hidden_BS):
    return self._see(self.before.page_BRP[:, row], self.before.length_BR[:, row], hidden_BS)

  def _see(self, page_BP, length_B, hidden_BS=None):
    """Returns the entries before the chunk, in the pages that hold them."""
    hidden_BS = None if hidden_BS is None else hidden_BS[:, :self.context_pages * self.storage.page_size]
    return storage_lib.SeenEntries(page_BP[:, :self.context_pages], length_B, hidden_BS)

  def _overlay(self, base, fresh, run_BT):
    """Returns the first step's keys, with this step's own where it processed the token."""
    if fresh is None:
      return base
    keep_BT11 = run_BT[:, :, None, None]
    return kv_view.KV(jnp.where(keep_BT11, fresh.k_BSKH, base.k_BSKH), jnp.where(keep_BT11, fresh.v_BSKH, base.v_BSKH))

  def _layer(self, weights, h_BTD, attend, deltas=None, step=0):
    batch, seq_len = self.shape

    def split(x):
      return x.reshape(batch, seq_len, *x.shape[1:])

    def flat_attend(q_MNH, k_MKH, v_MKH):
      k_MKH, v_MKH = storage_lib.hide_broken(k_MKH, v_MKH)  # padding must not harm what it follows
      k_MKH, v_MKH = (storage_lib.round_as_stored(x, self.storage.kv_format) for x in (k_MKH, v_MKH))
      return attend(split(q_MNH), kv_view.KV(split(k_MKH), split(v_MKH))).reshape(q_MNH.shape)

    h_1MD = self.decoder.layer(weights, h_BTD.reshape(1, batch * seq_len, -1), self.rotation, flat_attend, deltas,
                                step)
    return h_1MD.reshape(h_BTD.shape)

  def _attend(self, q_BTNH, fresh, seen_BT, context: list[tuple[Any, Any]]):
    """Attends over stored entries and the chunk's own keys."""
    segment_BT = self.valid_BT.astype(jnp.int32)
    mask_BTS = kv_view.visible(self.position_BT, jnp.ones_like(segment_BT), self.position_BT, seen_BT.astype(jnp.int32))
    k, v, mask = [], [], []
    for buffer, rows in context if self.context_pages else []:
      k_BSKH, v_BSKH, seen_BS = self.storage.read(buffer, rows)
      k.append(k_BSKH)
      v.append(v_BSKH)
      mask.append(jnp.broadcast_to(seen_BS[:, None, :], (*self.shape, seen_BS.shape[1])))
    k, v, mask = [*k, fresh.k_BSKH], [*v, fresh.v_BSKH], [*mask, mask_BTS]
    attend = kernels.xla
    if self.storage.kv_format == "bfloat16" and not control.adapts():
      # Entries and their copies for the chunk are bfloat16 numbers: nothing is rounded, and nothing is read in float32.
      attend, (k, v) = _attend_narrow, ([x.astype(jnp.bfloat16) for x in parts] for parts in (k, v))
    k_BSKH, v_BSKH = (jnp.concatenate(parts, axis=1) for parts in (k, v))
    with jax.named_scope("attend"):
      return attend(q_BTNH, k_BSKH, v_BSKH, jnp.concatenate(mask, axis=2))

  def _order(self, out, fresh):
    """Lets a chunk's entries be written after the context is read: in no order, XLA copies the buffer for a reader."""
    if not self.context_pages or control.adapts():  # on a CPU a barrier would only cost
      return out, fresh
    return jax.lax.optimization_barrier((out, fresh))

  def _place(self, page_BP, index_BT, write_BT, buffer):
    size = self.storage.page_size
    page_BT = jnp.take_along_axis(page_BP, jnp.maximum(index_BT, 0) // size, axis=1, mode="clip")
    return jnp.where(write_BT, page_BT, buffer.num_pages).reshape(-1), (index_BT % size).reshape(-1)

  def _write(self, buffer, place, fresh):
    k_MKH, v_MKH = (x.reshape(-1, *x.shape[2:]) for x in (fresh.k_BSKH, fresh.v_BSKH))
    return self.storage.write(buffer, *place, k_MKH, v_MKH)


def _attend_narrow(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
  """Attends over keys and values in bfloat16, to which queries and weights are rounded; sums are in float32."""
  k_heads, head_dim = k_BSKH.shape[2:]
  q_BTKGH = q_BTNH.reshape(*q_BTNH.shape[:2], k_heads, -1, head_dim).astype(k_BSKH.dtype)
  score_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  score_BKGTS = jnp.where(mask_BTS[:, None, None], score_BKGTS * head_dim ** -0.5, storage_lib.LOW)
  weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(v_BSKH.dtype)
  out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weight_BKGTS, v_BSKH, preferred_element_type=jnp.float32)
  return out_BTKGH.reshape(q_BTNH.shape)


def _flatten(x):
  """Returns `[B, T]` or `[B, T, D]` arrays as those of B * T flat tokens."""
  return None if x is None else x.reshape(-1, x.shape[2] if x.ndim > 2 else 1)


@functools.partial(jax.jit, static_argnames=("decoder", "context_pages"), donate_argnums=2)
@kernels.full_precision
def store(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, slot_G: jax.Array,
          tokens_GT: jax.Array, start_G: jax.Array, length_G: jax.Array, *,
          context_pages: int) -> tuple[slots_lib.Slots, jax.Array]:
  """Stores one chunk of the prompt of each of G slots.

  Args:
    decoder: the model's tables.
    weights: of the model.
    slots: of which no two of the G are the same.
    slot_G: the slots; the number of all slots where a row of the batch is padding, whose length is 0.
    tokens_GT: the chunks, padded at the end.
    start_G: position of each chunk's first token.
    length_G: tokens of each chunk.
    context_pages: as in `run`.

  Returns:
    The slots, and whether the pages have sufficed for all prefills so far; without that they are of no use.
  """
  cache = slots.cache
  tables = ("edge_page_BP", "edge_length_B", "page_BRP", "length_BR", "hidden_BRS")
  some = {name: getattr(cache, name).at[slot_G].get(mode="clip") for name in tables}
  rows, _, ok = run(decoder, weights, cache.replace(**some), tokens_GT, start_G, length_G, context_pages)
  back = {name: getattr(cache, name).at[slot_G].set(getattr(rows, name), mode="drop")
          for name in tables}
  sufficed = slots.sufficed & ok
  return slots.replace(cache=rows.replace(**back), sufficed=sufficed), sufficed
