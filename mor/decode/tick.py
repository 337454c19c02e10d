"""One tick of continuous depth-wise batching, as pure functions of the slots.

Every occupied slot runs the shared stack once, at its own recursion step; those
whose token is done leave through coda, head and sampling, and start their next
token at step 0 in the next tick, while the others go one step deeper:

  start    embed, prelude, entrance of the router     (slots with a new token)
  pass     the shared stack                           (slots in the recursion)
  finish   coda, head, sampling                       (slots whose token leaves)

All parameters are shared over steps, so one batch serves all depths. With R = 1 the
tick is a decoding step and this is continuous sequence-wise batching. A plain model
that is cut into steps at its exits has a pass for each of them, in order, which
nobody runs who has left before.

A slot that finds no free page waits, untouched, and tries again in the next tick.
The edges take all slots (a product of few rows costs as much), sorted so that attention
reads active ones only; the head runs on the smallest of a few widths that holds the
leavers. With exits (`ring.py`, `early_exit.py`) pending tokens of slots take part in the
passes as further rows of the same batch; `exit_pass.py` says when, and whose.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import prefill
from mor.decode import sampling
from mor.decode import slots as slots_lib
from mor.decode import weights as weights_lib
from mor.exits import pending as exit_pass
from mor.exits import ring as ring_lib
from mor.exits import tick as early_exit


def tick(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, *, vocab_size: int,
         together: bool, context: early_exit.Context | None = None) -> tuple[slots_lib.Slots, tuple[Any, ...]]:
  """See the module docstring.

  Args:
    decoder: the model's tables.
    weights: of the model.
    slots: before the tick.
    vocab_size: tokens beyond it are never drawn.
    together: whether a token that is done waits for all others (a batch that waits
      for its deepest row), static.
    context: what exits need beside the slots.

  Returns:
    The slots after it, and `Out`'s new tokens, who ran, and who waited for what.
  """
  exits = decoder.exits
  slots, stalled_B = _start(decoder, weights, slots, context)
  steps = (None,) if decoder.tables.schedule.cyclic else range(decoder.num_steps)
  flag_B = jnp.zeros_like(stalled_B)
  plain = functools.partial(_plain, decoder, weights, steps, stalled_B, vocab_size, together)
  if not exits:
    return plain(slots)

  def part(slots, step=None, room=0):
    slots, ran_B, waits_B, crowded_B = _pass(decoder, weights, slots, room, step)
    room = room if step in (None, steps[-1]) else 0  # nobody is at the full depth before
    slots, new, pages_B, room_B = early_exit.finish(decoder, weights, slots, vocab_size, context, room)
    return slots, (new, ran_B, stalled_B | waits_B | pages_B, crowded_B | room_B)

  room, nothing = exits.room(flag_B.shape[0]), (slots_lib.nothing_new(decoder, flag_B.shape[0]), flag_B, flag_B, flag_B)

  def parts(slots):
    if decoder.tables.schedule.cyclic:
      return _at_need(part, room, slots, nothing)
    num_B = slots.ring.count_B
    slots, out = part(slots, 0)  # where nobody is pending yet
    for step in steps[1:]:
      runs = jnp.any(slots_lib.running(slots, step)) & ~exit_pass.holds(slots, step, num_B, room, context.costs)
      if step == steps[-1]:
        runs |= jnp.any(exit_pass.crowded(slots))
      slots, out = _if(runs, functools.partial(part, step=step, room=room), slots, out)
    return slots, out

  # Tokens that look at no exit, and have nobody pending before them, pay nothing for exits.
  used = exit_pass.used(decoder, slots)
  carry = control.run_once(~used, lambda carry: plain(carry[0]), (slots, nothing))
  return control.run_once(used, lambda carry: parts(carry[0]), carry)


def _plain(decoder, weights, steps, stalled_B, vocab_size, together, slots):
  """All steps for the newest tokens alone."""
  def one(carry, step):
    slots, ran_B, waits_B = carry
    slots, ran, waits, _ = _pass(decoder, weights, slots, None, step)
    return slots, ran_B | ran, waits_B | waits

  flag_B = jnp.zeros_like(stalled_B)
  carry = one((slots, flag_B, flag_B), steps[0])
  for step in steps[1:]:
    # Apart, or XLA:CPU makes both passes' writes to a buffer one, and copies it for what reads it in between.
    carry = control.run_once(jnp.any(slots_lib.running(carry[0], step)), functools.partial(one, step=step), carry)
  slots, ran_B, waits_B = carry
  leave_B = slots.phase_B == slots_lib.LEAVE
  if together:
    leave_B &= ~jnp.any((slots.phase_B == slots_lib.RUN) | (slots.phase_B == slots_lib.START))
  slots, new = _finish(decoder, weights, slots, leave_B, vocab_size)
  return slots, (new, ran_B, stalled_B | waits_B, flag_B)


def _at_need(part, room, slots, nothing):
  """`part` with room for pending tokens where there are any."""
  if not room:
    return part(slots)
  some = exit_pass.waiting(slots)
  carry = control.run_once(~some, lambda carry: part(carry[0]), (slots, nothing))
  return control.run_once(some, lambda carry: part(carry[0], room=room), carry)


def _if(on, part, slots, out):
  """`part` where on."""
  def run(carry):
    slots, old = carry
    slots, new = part(slots)
    # A slot gets its tokens in one part of a tick only; a number of the others is 0.
    got_B = new[0].token_BW[:, 0] >= 0
    pick = lambda new, old: jnp.where(got_B.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    merged = jax.tree.map(pick, new[0], old[0])
    return slots, (merged, *(a | b for a, b in zip(new[1:], old[1:])))

  return control.run_once(on, run, (slots, out))


def _start(decoder, weights, slots, context):
  """New tokens enter the recursion."""
  wants_B = slots.phase_B == slots_lib.START
  cache, start_B = decoder.tables.reserve_edge(slots.cache, wants_B)
  h_BD = decoder.embed(weights, slots.token_B)
  zero_B = jnp.zeros_like(slots.step_B)
  cache, h_BD = decoder.edge(
      "prelude", weights, cache, h_BD, cache_lib.one_each(slots.position_B, zero_B, start_B))
  step_B = jnp.where(start_B, 0, slots.step_B)
  routed = decoder.decide(weights, h_BD, h_BD, start_B, slots.position_B, zero_B, (0,))
  runs_B = decoder.runs(routed.keep_BT[:, 0], start_B, zero_B)
  start_B1 = start_B[:, None]
  slots = slots.replace(
      cache=cache, step_B=step_B, depth_B=jnp.where(start_B, 0, slots.depth_B),
      h_BD=jnp.where(start_B1, h_BD, slots.h_BD), entry_BD=jnp.where(start_B1, h_BD, slots.entry_BD),
      routed=jax.tree.map(lambda new, old: jnp.where(start_B1, new, old), routed, slots.routed),
      phase_B=jnp.where(start_B, jnp.where(runs_B, slots_lib.RUN, slots_lib.LEAVE), slots.phase_B))
  if context:
    slots = early_exit.start(slots, start_B, context)
  return slots, wants_B & ~start_B


def _pass(decoder, weights, slots, room, static_step=None):
  """The shared stack for newest and `room` pending tokens, and each one's next decision; None is without exits."""
  ring, num_steps, num_slots = slots.ring, decoder.num_steps, slots.phase_B.shape[0]
  newest_B = slots.phase_B == slots_lib.RUN
  if static_step is not None:
    newest_B &= slots.step_B == static_step
  wants_B = fits_B = goes_B = newest_B
  step_B, count_B = slots.step_B, 1
  if room:
    wants_B, fits_B, goes_B, step_B, along_BS = exit_pass.company(slots, newest_B, room, num_steps, static_step)
    newest_B &= fits_B
    count_B = jnp.sum(along_BS, axis=1, dtype=jnp.int32) + newest_B
  cache, run_B = decoder.tables.reserve_stack(slots.cache, step_B, goes_B, count_B)
  newest_B &= run_B
  state = (slots.h_BD, slots.entry_BD, ring_lib.arrays(slots.routed), slots.position_B)
  tokens = cache_lib.one_each(slots.position_B, slots.step_B, newest_B)
  if room:
    packed = ring_lib.pack(along_BS & run_B[:, None], room)
    waiting = (ring.h_BSD, ring.entry_BSD, ring.routed, ring.position(slots.position_B))
    state = jax.tree.map(lambda new, old: jnp.concatenate([new, packed.take(old)]), state, waiting)
    tokens = cache_lib.Tokens(
        jnp.concatenate([tokens.slot_M, packed.slot_P]), state[3],
        jnp.concatenate([slots.step_B, packed.take(ring.step_BS)]), jnp.concatenate([newest_B, packed.run_P]))
  h_MD, entry_MD, routed = *state[:2], slots.routed.replace(**state[2])
  few = room is not None and static_step is not None  # others wait for another step
  cache, y_MD = decoder.run_pass(weights, cache, h_MD, tokens, static_step, few)
  run_M1 = tokens.run_M[:, None]
  h_MD = jnp.where(run_M1, decoder.merge(h_MD, y_MD, entry_MD, routed), h_MD)
  kept_M = tokens.run_M & routed.keep_BT[:, 0]
  step_M = tokens.step_M + tokens.run_M.astype(jnp.int32)
  alive_M = kept_M & (step_M < num_steps)
  if num_steps == 1:
    go_M = jnp.zeros_like(alive_M)
  else:
    steps = tuple(range(1, num_steps))
    decided = decoder.decide(weights, h_MD, entry_MD, alive_M, tokens.position_M, step_M, steps)
    go_M = alive_M & decided.keep_BT[:, 0]
    routed = jax.tree.map(lambda new, old: jnp.where(run_M1, new, old), decided, routed)
  first = lambda a: a[:num_slots]
  slots = slots.replace(
      cache=cache, h_BD=first(h_MD), step_B=first(step_M), routed=jax.tree.map(first, routed),
      depth_B=slots.depth_B + first(kept_M).astype(jnp.int32),
      phase_B=jnp.where(newest_B, jnp.where(first(go_M), slots_lib.RUN, slots_lib.LEAVE), slots.phase_B))
  if room is not None:
    stored_MR = exit_pass.stored(decoder, tokens)
    waits_B = jnp.where(fits_B & run_B, 0, ring.wait_B + wants_B.astype(jnp.int32))
    ring = ring.replace(wait_B=waits_B, stored_BR=ring.stored_BR | first(stored_MR))
    if room:
      rest = lambda a: a[num_slots:]
      routed = routed.replace(keep_BT=routed.keep_BT & go_M[:, None])  # the last step keeps nobody
      ring = ring.replace(
          h_BSD=packed.put(ring.h_BSD, rest(h_MD)), step_BS=packed.put(ring.step_BS, rest(step_M)),
          routed=jax.tree.map(lambda old, new: packed.put(old, rest(new)), ring.routed, ring_lib.arrays(routed)),
          depth_BS=packed.put(ring.depth_BS, packed.take(ring.depth_BS) + rest(kept_M).astype(jnp.int32)),
          stored_BSR=packed.put(ring.stored_BSR, packed.take(ring.stored_BSR) | rest(stored_MR)))
    slots = exit_pass.arrive(decoder, slots.replace(ring=ring), newest_B)
  return slots, run_B, fits_B & ~run_B, wants_B & ~fits_B


def _finish(decoder, weights, slots, leave_B, vocab_size):
  """Coda, head and sampling of the slots that leave."""
  tokens = cache_lib.one_each(slots.position_B, slots.step_B, leave_B)
  cache, h_BD = decoder.edge("coda", weights, slots.cache, slots.h_BD, tokens)
  token_B, logprob_B = next_tokens(decoder, weights, slots, h_BD, leave_B, vocab_size)
  stop_B = jnp.any(token_B[:, None] == slots.stop_BE, axis=1)
  finish_B = jnp.where(leave_B, jnp.where(stop_B, 1, jnp.where(slots.left_B == 1, 2, 0)), 0)
  one_B = leave_B.astype(jnp.int32)
  new = slots_lib.nothing_new(decoder, token_B.shape[0])
  first = lambda a_BW, a_B: a_BW.at[:, 0].set(a_B)
  new = new.replace(
      token_BW=first(new.token_BW, jnp.where(leave_B, token_B, -1)), depth_BW=first(new.depth_BW, slots.depth_B),
      logprob_BW=first(new.logprob_BW, logprob_B), finish_B=finish_B)
  return slots.replace(
      cache=cache,
      token_B=jnp.where(leave_B, token_B, slots.token_B), position_B=slots.position_B + one_B,
      index_B=slots.index_B + one_B, left_B=slots.left_B - one_B,
      seen_BV=slots.seen_BV.at[jnp.arange(token_B.shape[0]), token_B].max(leave_B),
      phase_B=jnp.where(leave_B, jnp.where(finish_B > 0, slots_lib.DONE, slots_lib.START), slots.phase_B),
  ), new


def next_tokens(decoder, weights, slots, h_BD, leave_B, vocab_size):
  """Tokens and log-probabilities of the leavers, by a head as wide as they need."""
  num_slots = leave_B.shape[0]

  def head(index_M):
    logits_MV = decoder.head(weights, h_BD[index_M])
    rows_M = jax.tree.map(lambda a: a[index_M], slots.rows)
    token_M = sampling.sample(logits_MV, rows_M, slots.seen_BV[index_M], slots.index_B[index_M], vocab_size)
    logprob_M = jax.lax.cond(
        jnp.any(slots.logprob_B), lambda: sampling.log_probability(logits_MV, token_M, vocab_size),
        lambda: jnp.zeros(token_M.shape, jnp.float32))
    return token_M, logprob_M

  nobody = jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots, jnp.float32)
  return control.run_some(head, leave_B, control.list_widths(num_slots, num_slots), nobody)


@functools.partial(jax.jit, static_argnames=("decoder", "num_ticks", "vocab_size", "together"), donate_argnums=2)
def run(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, *, num_ticks: int,
        vocab_size: int, together: bool,
        context: early_exit.Context | None = None) -> tuple[slots_lib.Slots, slots_lib.Out]:
  """Several ticks, fewer where no slot is occupied; then done slots are freed."""
  num_slots = slots.phase_B.shape[0]
  one = slots_lib.nothing_new(decoder, num_slots)
  flag_B = jnp.zeros(num_slots, bool)
  outs = jax.tree.map(lambda a: jnp.repeat(a[None], num_ticks, axis=0), (one, flag_B, flag_B, flag_B))

  def busy(carry):
    k, slots, _ = carry
    return (k < num_ticks) & jnp.any((slots.phase_B != slots_lib.FREE) & (slots.phase_B != slots_lib.DONE))

  def body(carry):
    k, slots, outs = carry
    slots, out = tick(decoder, weights, slots, vocab_size=vocab_size, together=together, context=context)
    return k + 1, slots, jax.tree.map(lambda old, new: old.at[k].set(new), outs, out)

  k, slots, outs = jax.lax.while_loop(busy, body, (jnp.int32(0), slots, outs))
  slots = slots_lib.free(decoder, slots, slots.phase_B == slots_lib.DONE)
  return slots, slots_lib.Out(*outs, k, slots.cache.free.num, slots.cache.edge_free.num)


@functools.partial(jax.jit, static_argnames=("decoder", "context"), donate_argnums=2)
def store(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, slot: jax.Array,
          tokens_1T: jax.Array, start: jax.Array, length: jax.Array, *,
          context: bool) -> tuple[slots_lib.Slots, jax.Array]:
  """Prefills one chunk of a slot's prompt.

  Returns:
    The slots, and whether the pages sufficed; without that they are of no use.
  """
  cache = slots.cache
  tables = ("edge_page_BP", "edge_length_B", "page_BRP", "length_BR", "hidden_BRS")
  one = {name: jax.lax.dynamic_slice_in_dim(getattr(cache, name), slot, 1) for name in tables}
  row, _, ok = prefill.run(decoder, weights, cache.replace(**one), tokens_1T, start[None], length[None], context)
  back = {name: jax.lax.dynamic_update_slice_in_dim(getattr(cache, name), getattr(row, name), slot, 0)
          for name in tables}
  return slots.replace(cache=row.replace(**back)), ok
