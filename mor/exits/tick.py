"""What a slot does at an exit, and when its pending tokens have reached the full depth.

A token whose confidence passes the threshold leaves (`push`): its exit's token is read
next, and it waits in the ring. Otherwise it goes deeper, and the pending ones go along
(synchronized parallel decoding); it does so too when the ring is full, and when the
exit's token would end the text. At the full depth nothing is pending any more, and
every entry of the cache is what the full depth alone would have stored. Then

  trust    the exits' tokens were given out as they came
  verify   the drafts that the full depth agrees with are given out, and its own token
           after the last of them; what had been read beyond is forgotten

So each token of a request depends on the tokens before it alone: when a pass takes it
along, and how many wait with it, changes no number.

Source: FREE, arXiv:2310.05424 (synchronized parallel decoding, trust); self-speculation
from one pass over the pending states, LayerSkip, arXiv:2404.16710; see also `exits.py`.
"""

from flax import struct
import jax
import jax.numpy as jnp

from mor.decode import cache as cache_lib
from mor.decode import decoder as decoder_lib
from mor.decode import slots as slots_lib
from mor.decode import weights as weights_lib
from mor.exits import copied as exit_fill
from mor.exits import heads as exit_heads
from mor.exits import policy as exits_lib
from mor.exits import ring as ring_lib


@struct.dataclass
class Context:
  """What exits need beside the slots.

  Attributes:
    draft: whether requests to be verified draft at all, if they do not sample.
    costs: of looking and drafting, static.
  """

  draft: jax.Array
  costs: exits_lib.Costs = struct.field(pytree_node=False)


def start(slots: slots_lib.Slots, start_B: jax.Array, context: Context) -> slots_lib.Slots:
  """New tokens, which have seen no exit yet."""
  ring = slots.ring
  bound_B = exit_heads.bound(slots)
  look_B = (ring.mode_B != ring_lib.NONE) & (ring.skip_B == 0) & (context.draft | (ring.mode_B == ring_lib.TRUST))
  return slots.replace(ring=ring.replace(
      look_B=jnp.where(start_B, look_B | bound_B, ring.look_B),
      skip_B=jnp.where(start_B, jnp.maximum(ring.skip_B - 1, 0), ring.skip_B),
      settled_B=ring.settled_B & ~start_B,
      stored_BR=ring.stored_BR & ~start_B[:, None],
      draft=ring.draft.replace(token=jnp.where(start_B, -1, ring.draft.token),
                               depth=jnp.where(start_B, 0, ring.draft.depth))))


def finish(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, vocab_size: int,
           context: Context, room: int) -> tuple[slots_lib.Slots, slots_lib.New, jax.Array, jax.Array]:
  """The slots at an exit or at the full depth, and `room` pending tokens; without room there must be none.

  Returns:
    The slots, their new tokens, and True for those that found no page, and no room.
  """
  ring, num_slots = slots.ring, slots.phase_B.shape[0]
  wants_B, check_B = slots.phase_B == slots_lib.LEAVE, slots.phase_B == slots_lib.CHECK
  read_BS = ring.pending() & ((ring.mode_B == ring_lib.VERIFY) | decoder.exits.monitor)[:, None]
  along_BS = ring.pending() if decoder.tables.schedule.coda else read_BS
  leave_B = ring_lib.fit(jnp.sum(along_BS, axis=1), wants_B, ring.wait_B, room)
  packed = ring_lib.pack(along_BS & leave_B[:, None], room)
  join = lambda newest, pending: jnp.concatenate([newest, packed.take(pending)])

  h_MD, position_M = join(slots.h_BD, ring.h_BSD), join(slots.position_B, ring.position(slots.position_B))
  slot_M = jnp.concatenate([jnp.arange(num_slots), packed.slot_P])
  tokens = cache_lib.Tokens(slot_M, position_M, jnp.zeros_like(slot_M), jnp.concatenate([leave_B, packed.run_P]),
                            alone=room == 0)
  cache, out_MD = decoder.edge("coda", weights, slots.cache, h_MD, tokens)
  slots = slots.replace(cache=cache)
  verify_B, check_M = ring.mode_B == ring_lib.VERIFY, jnp.concatenate([check_B, jnp.zeros_like(packed.run_P)])
  offset_BS = jnp.where(verify_B[:, None], jnp.arange(ring.step_BS.shape[1])[None, :], 0)
  flat = exit_heads.Flat(
      slot_M=slot_M, need_M=jnp.concatenate([leave_B, packed.run_P & packed.take(read_BS)]),
      offset_M=join(jnp.where(verify_B, ring.count_B, 0), offset_BS), check_M=check_M,
      hidden_MD=jnp.where(check_M[:, None], h_MD, out_MD), draft=jax.tree.map(join, ring.draft, ring.drafts),
      previous=jax.tree.map(lambda a: jnp.pad(a, ((0, room),) + ((0, 0),) * (a.ndim - 1)), exit_heads.previous(slots)))
  read, at_exit = _read(decoder, weights, slots, flat, check_B, vocab_size)
  slots, exited, stalled_B = _look(decoder, weights, slots, check_B, at_exit, context)
  slots, full = _judge(decoder, slots, leave_B, packed, read, context)
  crowded_B = wants_B & ~leave_B
  ring = slots.ring.replace(wait_B=slots.ring.wait_B + crowded_B.astype(jnp.int32))
  return slots.replace(ring=ring), _choose(leave_B, full, exited), stalled_B, crowded_B


def _read(decoder, weights, slots, flat, check_B, vocab_size):
  """What the head says of all tokens, and what the exits of `check_B` say, perhaps by less than the whole head."""
  exits, num_slots, bound_B = decoder.exits, check_B.shape[0], exit_heads.bound(slots)
  blind = exits.measure in exits_lib.NO_LOGITS
  sure_B = exit_heads.measure(decoder, slots) if blind else jnp.zeros(num_slots, jnp.float32)
  wants_B = check_B & ((sure_B > slots.ring.threshold_B) | bound_B | exits.monitor) if blind else check_B
  head_B = wants_B & bound_B if exits.first else wants_B
  need_M = flat.need_M.at[:num_slots].max(head_B)
  read = exit_heads.read(decoder, weights, slots, flat.replace(need_M=need_M), vocab_size)
  at_exit = jax.tree.map(lambda a: a[:num_slots], read)
  if exits.first:
    first_B = wants_B & ~head_B
    at_exit = _choose(first_B, exit_heads.read_first(decoder, weights, slots, first_B, vocab_size), at_exit)
  if blind:
    at_exit = at_exit.replace(sure=sure_B, token=jnp.where(wants_B, at_exit.token, -1))
  return read, at_exit


def _choose(on_B, new, old):
  """Rows of `new` where on, else of `old`."""
  return jax.tree.map(lambda a, b: jnp.where(on_B.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)


# At an exit.


def _look(decoder, weights, slots, check_B, read, context):
  """Who leaves, who goes deeper, and what those who left read next."""
  exits, ring = decoder.exits, slots.ring
  trust_B, size = ring.mode_B == ring_lib.TRUST, ring.step_BS.shape[1]
  ring = ring.replace(draft=_choose(check_B, ring_lib.Draft(
      read.token, slots.depth_B, slots.h_BD, read.sure, read.top, read.logprob), ring.draft))
  sure_B = check_B & (read.sure > ring.threshold_B) & (read.token >= 0)
  stop_B = jnp.any(read.token[:, None] == slots.stop_BE, axis=1)
  last_B = slots.left_B - jnp.where(trust_B, 0, ring.count_B) <= 1
  cache, stalled_B = slots.cache, jnp.zeros_like(check_B)
  if exits.kv == "exact":
    best_B = jnp.maximum(ring_lib.best_length(ring.rate_B, size, context.costs), 1)
    most_B = jnp.where(trust_B, size, best_B)
    leave_B = sure_B & (ring.count_B < most_B) & ~stop_B & ~last_B
    ring = _push(slots, ring.replace(settled_B=ring.settled_B | (sure_B & ~leave_B)), leave_B)
  else:
    cache, leave_B = exit_fill.fill(decoder, weights, slots, sure_B)
    stalled_B = sure_B & ~leave_B
  looked_B = check_B & trust_B & ~stalled_B
  rate_B = jnp.where(looked_B, ring_lib.followed(ring.rate_B, sure_B.astype(jnp.float32)), ring.rate_B)
  idle_B = looked_B & ~sure_B & (rate_B < context.costs.worth)
  ring = ring.replace(rate_B=rate_B, skip_B=jnp.where(idle_B, ring_lib.PROBE, ring.skip_B))

  told_B, one_B = leave_B & trust_B, leave_B.astype(jnp.int32)
  finish_B = jnp.where(told_B, jnp.where(stop_B, 1, jnp.where(last_B, 2, 0)), 0)
  new = slots_lib.nothing_new(decoder, told_B.shape[0])
  first = lambda old, value: old.at[:, 0].set(jnp.where(told_B, value, old[:, 0]))
  new = new.replace(token_BW=first(new.token_BW, read.token), depth_BW=first(new.depth_BW, slots.depth_B),
                    early_BW=first(new.early_BW, True), logprob_BW=first(new.logprob_BW, read.logprob),
                    finish_B=finish_B)
  slots = slots.replace(
      cache=cache, ring=ring, token_B=jnp.where(leave_B, read.token, slots.token_B),
      position_B=slots.position_B + one_B,
      phase_B=jnp.where(leave_B, jnp.where(finish_B > 0, slots_lib.DONE, slots_lib.START),
                        jnp.where(check_B & ~stalled_B, slots_lib.RUN, slots.phase_B)))
  return _told(slots, new), new, stalled_B


def _push(slots, ring, leave_B):
  """The newest tokens of `leave_B` become pending."""
  size = ring.step_BS.shape[1]
  row_B, at_B = jnp.arange(leave_B.shape[0]), jnp.where(leave_B, ring.count_B, size)
  put = lambda old, new: old.at[row_B, at_B].set(new, mode="drop")
  return ring.replace(
      count_B=ring.count_B + leave_B.astype(jnp.int32), step_BS=put(ring.step_BS, slots.step_B),
      depth_BS=put(ring.depth_BS, slots.depth_B), h_BSD=put(ring.h_BSD, slots.h_BD),
      entry_BSD=put(ring.entry_BSD, slots.entry_BD),
      routed=jax.tree.map(put, ring.routed, ring_lib.arrays(slots.routed)),
      drafts=jax.tree.map(put, ring.drafts, ring.draft), stored_BSR=put(ring.stored_BSR, ring.stored_BR))


def _told(slots, new):
  """Counts the new tokens."""
  given_BW = new.token_BW >= 0
  num_B = jnp.sum(given_BW, axis=1, dtype=jnp.int32)
  column_BW = jnp.where(given_BW, new.token_BW, slots.seen_BV.shape[1])
  seen_BV = slots.seen_BV.at[jnp.arange(num_B.shape[0])[:, None], column_BW].set(True, mode="drop")
  return slots.replace(index_B=slots.index_B + num_B, left_B=slots.left_B - num_B, seen_BV=seen_BV)


# At the full depth.


def _judge(decoder, slots, leave_B, packed, read, context):
  """The new tokens of those who left at the full depth, with their drafts confirmed or forgotten."""
  ring, exits = slots.ring, decoder.exits
  num_slots, size = ring.step_BS.shape
  row_B, verify_B = jnp.arange(num_slots), ring.mode_B == ring_lib.VERIFY
  index_1W, count_B1 = jnp.arange(1 + size)[None, :], ring.count_B[:, None]

  def spread(newest, pending):
    """By place in the request: pending tokens, then the newest one."""
    pad = ((0, 0), (0, 1)) + ((0, 0),) * (pending.ndim - 2)
    return jnp.pad(pending, pad).at[row_B, ring.count_B].set(newest)

  def found(name):
    """Of the head, which has not read everything."""
    all_M = getattr(read, name)
    empty = jnp.zeros(ring.step_BS.shape + all_M.shape[1:], all_M.dtype)
    return spread(all_M[:num_slots], packed.put(empty, all_M[num_slots:]))

  full_BW, draft = found("token"), jax.tree.map(spread, ring.draft, ring.drafts)
  same_BW = (full_BW == draft.token) & (index_1W < count_B1)
  kept_B = jnp.where(verify_B & leave_B, jnp.sum(jnp.cumprod(same_BW, axis=1), axis=1), 0)
  # A trusting request has given its pending tokens' successors out already.
  first_B, num_B = jnp.where(verify_B, 0, ring.count_B), jnp.where(leave_B, kept_B + 1, 0)
  early_BW = jnp.broadcast_to((ring.settled_B & (ring.mode_B == ring_lib.TRUST))[:, None], full_BW.shape)
  told = dict(token_BW=jnp.where(early_BW, draft.token, full_BW), early_BW=early_BW,
              depth_BW=jnp.where(early_BW, draft.depth, spread(slots.depth_B, ring.depth_BS)),
              logprob_BW=jnp.where(early_BW, draft.logprob, found("logprob")))
  order_BW = jnp.minimum(first_B[:, None] + index_1W, size)
  told = {name: jnp.take_along_axis(a_BW, order_BW, axis=1) for name, a_BW in told.items()}
  told["token_BW"] = jnp.where(index_1W < num_B[:, None], told["token_BW"], -1)
  last_B = told["token_BW"][row_B, jnp.maximum(num_B - 1, 0)]
  stop_B = jnp.any(last_B[:, None] == slots.stop_BE, axis=1)
  finish_B = jnp.where(leave_B, jnp.where(stop_B, 1, jnp.where(slots.left_B == num_B, 2, 0)), 0)
  new = slots_lib.nothing_new(decoder, num_slots).replace(
      **told, finish_B=finish_B, kept_B=kept_B,
      drafts_B=jnp.where(leave_B & verify_B, jnp.minimum(ring.count_B, kept_B + 1), 0))
  if exits.monitor:
    looked_BW = jnp.where(index_1W < count_B1, True, (ring.draft.depth > 0)[:, None])
    looked_BW &= (draft.top >= 0) & (index_1W <= jnp.where(verify_B, kept_B, ring.count_B)[:, None])
    looked_BW &= (leave_B & (ring.mode_B != ring_lib.NONE))[:, None]
    new = new.replace(sure_BW=jnp.where(looked_BW, draft.sure, -1.0), agreed_BW=looked_BW & (draft.top == found("top")))

  next_B = jnp.where(verify_B, slots.position_B - ring.count_B + kept_B, slots.position_B) + 1
  beyond_BW = (index_1W > kept_B[:, None]) & (index_1W <= count_B1)
  dropped_BR = jnp.sum(spread(ring.stored_BR, ring.stored_BSR) & beyond_BW[:, :, None], axis=1, dtype=jnp.int32)
  wrong_B = leave_B & verify_B & (kept_B < ring.count_B)
  cache = decoder.tables.crop(slots.cache, next_B, dropped_BR, wrong_B)
  ring = _after(ring, new, leave_B, context)
  slots = slots.replace(
      cache=cache, ring=ring.replace(count_B=jnp.where(leave_B, 0, ring.count_B)),
      token_B=jnp.where(leave_B, last_B, slots.token_B), position_B=jnp.where(leave_B, next_B, slots.position_B),
      phase_B=jnp.where(leave_B, jnp.where(finish_B > 0, slots_lib.DONE, slots_lib.START), slots.phase_B))
  return _told(slots, new), new


def _after(ring, new, leave_B, context):
  """What a request to be verified learns of its drafts."""
  size, judged_B = ring.step_BS.shape[1], leave_B & (new.drafts_B > 0)
  rate_B = jnp.where(judged_B, ring_lib.judged(ring.rate_B, new.kept_B, new.drafts_B), ring.rate_B)
  idle_B = judged_B & (ring_lib.best_length(rate_B, size, context.costs) == 0)
  return ring.replace(rate_B=rate_B, skip_B=jnp.where(idle_B, ring_lib.PROBE, ring.skip_B))
