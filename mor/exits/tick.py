"""One tick with early exit, around the functions of `decode/tick.py`.

A token whose confidence passes the threshold leaves: its exit's token is read next,
and it waits in the ring. Otherwise it goes deeper, and the pending ones go along
(synchronized parallel decoding); it does so too when the ring is full, and when the
exit's token would end the text. At the full depth nothing is pending any more, and
every entry of the cache is what the full depth alone would have stored. Then

  trust    the exits' tokens were given out as they came
  verify   the drafts that the full depth agrees with are given out, and its own token
           after the last of them; what had been read beyond is forgotten

So each token of a request depends on the tokens before it alone: when a pass takes it
along, and how many wait with it, changes no number. A tick in which no token needs an
exit runs `decode.tick.proceed`, and pays nothing for them.

Files that a tick visits, in order: exits/tick, exits/ring, decode/tick, decode/cache,
decode/decoder, decode/storage, decode/slots, decode/control, decode/weights,
decode/sampling, exits/heads, exits/confidence, decode/packing.

Source: FREE, arXiv:2310.05424 (synchronized parallel decoding, trust); self-speculation
from one pass over the pending states, LayerSkip, arXiv:2404.16710; see also `policy.py`.
"""

import functools

import jax
import jax.numpy as jnp

from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import packing
from mor.decode import slots as slots_lib
from mor.decode import tick as tick_lib
from mor.decode import variant as variant_lib
from mor.decode import weights as weights_lib
from mor.exits import heads
from mor.exits import policy as exits_lib
from mor.exits import ring as ring_lib
from mor.model import kernels


def tick(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, *, vocab_size: int,
         setup: exits_lib.Setup, variant: variant_lib.Variant) -> tuple[slots_lib.Slots, slots_lib.Ticked]:
  """Runs one tick; see the module docstring.

  Args:
    decoder: the model's tables.
    weights: of the model.
    slots: before the tick, with rings.
    vocab_size: tokens beyond it are never drawn.
    setup: what exits need beside the slots.
    variant: what the program must be able to do, static; without exits no slot may need one.
  """
  slots, started_B, stalled_B = tick_lib.start(decoder, weights, slots)
  slots = begin(slots, started_B, setup)
  nothing, nobody_B = ring_lib.nothing_new(slots, setup.exits), jnp.zeros_like(stalled_B)

  def proceed(carry):
    slots, ticked = tick_lib.proceed(decoder, weights, carry[0], vocab_size=vocab_size, variant=variant)
    wide = {name: getattr(nothing, name).at[:, :1].set(getattr(ticked.new, name))
            for name in ("token_BW", "depth_BW", "logprob_BW")}
    return slots, ticked.replace(new=nothing.replace(**wide, finish_B=ticked.new.finish_B))

  carry = slots, slots_lib.Ticked(nothing, nobody_B, nobody_B, nobody_B)
  run_parts = _run_shared if decoder.tables.schedule.cyclic else _run_steps
  part = functools.partial(_run_part, decoder, weights, vocab_size=vocab_size, setup=setup, variant=variant)
  run_exits = functools.partial(run_parts, decoder, part, setup)
  if variant.exits is None:
    needed = ring_lib.needs_exits(slots, setup)
    carry = control.run_once(~needed, proceed, carry)
    slots, ticked = control.run_once(needed, run_exits, carry)
  else:
    slots, ticked = (run_exits if variant.exits else proceed)(carry)
  return slots, ticked.replace(stalled_B=ticked.stalled_B | stalled_B)


def _run_shared(decoder, part, setup, carry):
  """Runs one pass of slots at different steps, with room for pending tokens if there are any."""
  del decoder
  if not setup.room:
    return part(carry[0])
  if not control.adapts():
    return part(carry[0], room=setup.room)
  some = ring_lib.has_pending(carry[0])
  carry = control.run_once(~some, lambda carry: part(carry[0]), carry)
  return control.run_once(some, lambda carry: part(carry[0], room=setup.room), carry)


def _run_steps(decoder, part, setup, carry):
  """Runs a pass for each step of a plain model in turn, if slots are there and should not wait."""
  first, *deeper = tick_lib.list_steps(decoder)
  num_B = carry[0].ring.count_B
  carry = part(carry[0], first)  # before which nothing is pending

  def run(carry, step):
    slots, old = carry
    slots, new = part(slots, step, setup.room)
    # A slot gets its tokens in one part of a tick only; a number of the others is 0.
    tokens = control.pick_rows(new.new.token_BW[:, 0] != -1, new.new, old.new)
    return slots, slots_lib.Ticked(tokens, old.ran_B | new.ran_B, old.stalled_B | new.stalled_B,
                                   old.crowded_B | new.crowded_B)

  for step in deeper:
    slots = carry[0]
    waits = ring_lib.should_wait(slots, step, num_B, setup.room, setup.costs)
    on = jnp.any(slots_lib.at_step(slots, step)) & ~waits
    if step == deeper[-1]:
      on |= jnp.any(ring_lib.crowded(slots))
    carry = control.run_once(on, functools.partial(run, step=step), carry)
  return carry


def _run_part(decoder, weights, slots, step=None, room=0, *, vocab_size, setup, variant):
  """Runs a pass, then the slots that it has brought to an exit or to the full depth."""
  slots, ran_B, waits_B, crowded_B = _run_pass(decoder, weights, slots, room, step, setup)
  if step is not None and step != decoder.num_steps - 1:
    room = 0  # no slot is at the full depth before
  slots, new, pages_B, room_B = _finish(decoder, weights, slots, room, vocab_size, setup, variant)
  return slots, slots_lib.Ticked(new, ran_B, waits_B | pages_B, crowded_B | room_B)


def begin(slots: slots_lib.Slots, started_B: jax.Array, setup: exits_lib.Setup) -> slots_lib.Slots:
  """Prepares the rings for new tokens, which have seen no exit yet."""
  ring = slots.ring
  look_B = (ring.mode_B != ring_lib.NONE) & (ring.skip_B == 0) & (setup.draft | (ring.mode_B == ring_lib.TRUST))
  return slots.replace(ring=ring.replace(
      look_B=jnp.where(started_B, look_B | ring_lib.drafts_all(slots), ring.look_B),
      skip_B=jnp.where(started_B, jnp.maximum(ring.skip_B - 1, 0), ring.skip_B),
      settled_B=ring.settled_B & ~started_B,
      stored_BR=ring.stored_BR & ~started_B[:, None],
      draft=ring.draft.replace(token=jnp.where(started_B, -1, ring.draft.token),
                               depth=jnp.where(started_B, 0, ring.draft.depth))))


def _run_pass(decoder, weights, slots, room, step, setup):
  """Advances newest and pending tokens by the shared stack; returns who ran, who found no page, and who no room."""
  ring, num_slots = slots.ring, slots.phase_B.shape[0]
  chosen = ring_lib.select_tokens(slots, room, decoder.num_steps, step)
  newest_B = slots_lib.at_step(slots, step) & chosen.fits_B
  count_B = jnp.sum(chosen.along_BS, axis=1, dtype=jnp.int32) + newest_B
  cache, run_B = decoder.tables.reserve_stack(slots.cache, chosen.step_B, chosen.goes_B, count_B)
  newest_B &= run_B
  work, packed = tick_lib.newest_work(slots, newest_B), None
  if room:
    packed = ring_lib.pack(chosen.along_BS & run_B[:, None], room)
    work = ring_lib.join(work, ring, packed, slots.position_B)
  cache, passed = tick_lib.advance(decoder, weights, cache, work, step, sparse=step is not None)
  newest, pending = (jax.tree.map(lambda a: a[part], passed) for part in (slice(num_slots), slice(num_slots, None)))
  slots = tick_lib.settle(slots.replace(cache=cache), newest, newest_B)
  own_M, stores_M = decoder.tables.stores(work.tokens.step_M)
  stored_MR = own_M[:, None] == jnp.arange(decoder.tables.num_rows)[None, :]
  stored_MR &= (stores_M & work.tokens.run_M)[:, None]
  ring = ring.replace(wait_B=jnp.where(chosen.fits_B & run_B, 0, ring.wait_B + chosen.wants_B.astype(jnp.int32)),
                      stored_BR=ring.stored_BR | stored_MR[:num_slots])
  if room:
    ring = ring_lib.put_back(ring, packed, pending, stored_MR[num_slots:])
  slots = arrive(slots.replace(ring=ring), newest_B, setup)
  return slots, run_B, chosen.fits_B & ~run_B, chosen.wants_B & ~chosen.fits_B


def arrive(slots: slots_lib.Slots, ran_B: jax.Array, setup: exits_lib.Setup) -> slots_lib.Slots:
  """Stops newest tokens at exits that they check, and lets those that leave wait for the pending ones behind."""
  ring = slots.ring
  at_exit_B = jnp.any(slots.step_B[:, None] == jnp.asarray(setup.steps)[None, :], axis=1)
  check_B = ran_B & at_exit_B & ring.look_B & ~ring.settled_B
  check_B &= ring.mode_B != ring_lib.NONE  # whose `look_B` may be of the request before
  behind_B = jnp.any(ring.behind(), axis=1)
  slots = slots_lib.move(slots, check_B, slots_lib.RUN, slots_lib.CHECK)
  slots = slots_lib.move(slots, behind_B, slots_lib.LEAVE, slots_lib.DRAIN)
  return slots_lib.move(slots, ~behind_B, slots_lib.DRAIN, slots_lib.LEAVE)


def _finish(decoder, weights, slots, room, vocab_size, setup, variant):
  """Runs coda and head for the slots at an exit or at the full depth, and `room` pending tokens.

  Without room no token may be pending at the full depth.

  Returns:
    The slots, their new tokens, and who found no page, and no room.
  """
  ring, wants_B = slots.ring, slots.phase_B == slots_lib.LEAVE
  check_B = slots.phase_B == slots_lib.CHECK
  read_BS = ring.pending() & ((ring.mode_B == ring_lib.VERIFY) | setup.exits.monitor)[:, None]
  along_BS = ring.pending() if decoder.tables.schedule.coda else read_BS
  leave_B = ring_lib.fit(jnp.sum(along_BS, axis=1), wants_B, ring.wait_B, room)
  packed = ring_lib.pack(along_BS & leave_B[:, None], room)
  slots, inputs = _run_coda(decoder, weights, slots, leave_B, check_B, packed, read_BS)
  read, at_exit = heads.read(decoder, weights, slots, inputs, check_B, vocab_size, setup.exits, variant)
  nothing = ring_lib.nothing_new(slots, setup.exits)
  slots, exited, stalled_B = look(decoder, weights, slots, check_B, at_exit, nothing, setup)
  slots, full, position_B = _judge(decoder, slots, leave_B, packed, read, nothing, setup)
  crowded_B = wants_B & ~leave_B
  slots = slots.replace(ring=slots.ring.replace(wait_B=slots.ring.wait_B + crowded_B.astype(jnp.int32)))
  slots, new = tick_lib.emit(slots, control.pick_rows(leave_B, full, exited), position_B, variant)
  return slots, new, stalled_B, crowded_B


def _run_coda(decoder, weights, slots, leave_B, check_B, packed, read_BS):
  """Runs the coda for newest tokens that leave and their pending ones; returns what a head needs of all of them."""
  ring, num_slots, room = slots.ring, leave_B.shape[0], packed.run_P.shape[0]

  def join(newest, pending):
    return jnp.concatenate([newest, packed.take(pending)])

  h_MD, position_M = join(slots.h_BD, ring.h_BSD), join(slots.position_B, ring.position(slots.position_B))
  slot_M = jnp.concatenate([jnp.arange(num_slots), packed.slot_P])
  tokens = cache_lib.Tokens(slot_M, position_M, jnp.zeros_like(slot_M), jnp.concatenate([leave_B, packed.run_P]),
                            alone=room == 0)
  cache, out_MD = decoder.edge("coda", weights, slots.cache, h_MD, tokens)
  slots = slots.replace(cache=cache)
  verify_B, check_M = ring.mode_B == ring_lib.VERIFY, jnp.concatenate([check_B, jnp.zeros_like(packed.run_P)])
  offset_BS = jnp.where(verify_B[:, None], jnp.arange(ring.step_BS.shape[1])[None, :], 0)
  previous = jax.tree.map(lambda a: jnp.pad(a, ((0, room),) + ((0, 0),) * (a.ndim - 1)), heads.find_previous(slots))
  return slots, heads.HeadInputs(
      slot_M=slot_M, need_M=jnp.concatenate([leave_B, packed.run_P & packed.take(read_BS)]),
      offset_M=join(jnp.where(verify_B, ring.count_B, 0), offset_BS), check_M=check_M,
      hidden_MD=jnp.where(check_M[:, None], h_MD, out_MD), draft=jax.tree.map(join, ring.draft, ring.drafts),
      previous=previous)


def look(decoder, weights, slots, check_B, read, nothing, setup):
  """Decides who leaves at an exit, and who goes deeper.

  Returns:
    The slots, the tokens of trusting requests that left, and who found no page to leave.
  """
  ring, trust_B, size = slots.ring, slots.ring.mode_B == ring_lib.TRUST, slots.ring.step_BS.shape[1]
  ring = ring.replace(draft=control.pick_rows(check_B, ring_lib.Draft(
      read.token, slots.depth_B, slots.h_BD, read.sure, read.top, read.logprob), ring.draft))
  sure_B = check_B & (read.sure > ring.threshold_B) & (read.token >= 0)
  cache, stalled_B = slots.cache, jnp.zeros_like(check_B)
  if setup.exits.kv == "exact":
    num_B = jnp.where(trust_B, 1, 1 + ring.count_B)  # new tokens, if all drafts were confirmed
    ends_B = slots_lib.find_finish(read.token, slots.stop_BE, slots.left_B, num_B) != slots_lib.GOES_ON
    most_B = jnp.where(trust_B, size, jnp.maximum(ring_lib.best_length(ring.rate_B, size, setup.costs), 1))
    leave_B = sure_B & (ring.count_B < most_B) & ~ends_B
    ring = ring.replace(settled_B=ring.settled_B | (sure_B & ~leave_B))
    ring = ring_lib.push(ring, slots, leave_B)
  else:
    cache, leave_B = fill(decoder, weights, slots, sure_B)
    stalled_B = sure_B & ~leave_B
  looked_B = check_B & trust_B & ~stalled_B
  rate_B = jnp.where(looked_B, ring_lib.follow_rate(ring.rate_B, sure_B.astype(jnp.float32)), ring.rate_B)
  idle_B = looked_B & ~sure_B & (rate_B < setup.costs.worth)
  ring = ring.replace(rate_B=rate_B, skip_B=jnp.where(idle_B, ring_lib.PROBE, ring.skip_B))

  told_B, draft_B = leave_B & trust_B, leave_B & ~trust_B
  slots = slots.replace(cache=cache, ring=ring, token_B=jnp.where(draft_B, read.token, slots.token_B),
                        position_B=slots.position_B + draft_B.astype(jnp.int32))
  slots = slots_lib.move(slots, draft_B, slots_lib.CHECK, slots_lib.START)
  slots = slots_lib.move(slots, ~leave_B & ~stalled_B, slots_lib.CHECK, slots_lib.RUN)
  first = dict(token_BW=read.token, depth_BW=slots.depth_B, logprob_BW=read.logprob)
  told = nothing.replace(**{name: getattr(nothing, name).at[:, 0].set(value) for name, value in first.items()})
  told = told.replace(exits=told.exits.replace(early_BW=told.exits.early_BW.at[:, 0].set(True)))
  return slots, control.pick_rows(told_B, told, nothing), stalled_B


def fill(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots,
         exit_B: jax.Array) -> tuple[cache_lib.Cache, jax.Array]:
  """Stores approximate entries of tokens that leave: the deeper layers' own projections of the state at the exit.

  Returns:
    The cache, and True for the tokens that found their pages: the others do not leave yet.
  """
  tables = decoder.tables
  own_rows = [max(rule.own_R[r] for rule in tables.rules) for r in range(decoder.num_steps)]
  deeper = [(r, row) for r, row in enumerate(own_rows) if r > 0 and row >= 0]  # steps, and where each stores
  writes_BR = jnp.zeros((exit_B.shape[0], tables.num_rows), bool)
  for r, row in deeper:
    writes_BR = writes_BR.at[:, row].max(exit_B & (slots.step_B <= r))
  cache, exit_B = tables.reserve_rows(slots.cache, writes_BR, exit_B)
  writes_BR &= exit_B[:, None]
  write = functools.partial(_write, decoder, weights, slots, exit_B, writes_BR, deeper)
  return control.skip_idle(jnp.any(exit_B), write, cache), exit_B


def _write(decoder, weights, slots, exit_B, writes_BR, deeper, cache):
  """Stores entries in the deeper steps and in the coda."""
  tables, position_B = decoder.tables, slots.position_B
  rotation = decoder.rotation(position_B)
  stack, edge = list(cache.stack), list(cache.edge)
  for r, row in deeper:
    page_B, offset_B = tables.place(cache.page_BRP[:, row], cache.length_BR[:, row], writes_BR[:, row], cache.stack[0])
    for i, parameters in enumerate(tables.schedule.rows[r]):
      k_BKH, v_BKH = decoder.keys(weights.stack[parameters], slots.h_BD, rotation, weights.deltas[i], r)
      stack[i] = tables.storage.write(stack[i], page_B, offset_B, k_BKH, v_BKH)
  for i, layer in enumerate(weights.coda, start=tables.schedule.prelude):
    page_B, offset_B = tables.place(cache.edge_page_BP, position_B, exit_B, cache.edge[i])
    edge[i] = tables.storage.write(edge[i], page_B, offset_B, *decoder.keys(layer, slots.h_BD, rotation))
  hidden_BRS = cache.hidden_BRS
  if tables.overlays:
    batch_B1, row_1R = jnp.arange(exit_B.shape[0])[:, None], jnp.arange(tables.num_rows)[None, :]
    hidden_BRS = hidden_BRS.at[batch_B1, row_1R, position_B[:, None]].max(writes_BR, mode="drop")
  return cache.replace(stack=tuple(stack), edge=tuple(edge), hidden_BRS=hidden_BRS,
                       length_BR=cache.length_BR + writes_BR.astype(jnp.int32))


def _judge(decoder, slots, leave_B, packed, read, nothing, setup):
  """Confirms or forgets the drafts of slots at the full depth; returns their new tokens, and the last one's position."""
  ring = slots.ring
  num_slots, size = ring.step_BS.shape
  batch_B, verify_B = jnp.arange(num_slots), ring.mode_B == ring_lib.VERIFY
  index_1W, count_B1 = jnp.arange(1 + size)[None, :], ring.count_B[:, None]

  def spread(newest, pending):
    """Returns values by place in the request: pending tokens, then the newest one."""
    pad = ((0, 0), (0, 1)) + ((0, 0),) * (pending.ndim - 2)
    return jnp.pad(pending, pad).at[batch_B, ring.count_B].set(newest)

  def find(name):
    """Returns what the head says, which has not read everything."""
    all_M = getattr(read, name)
    empty = jnp.zeros(ring.step_BS.shape + all_M.shape[1:], all_M.dtype)
    return spread(all_M[:num_slots], packed.put(empty, all_M[num_slots:]))

  full_BW, draft = find("token"), jax.tree.map(spread, ring.draft, ring.drafts)
  same_BW = (full_BW == draft.token) & (index_1W < count_B1)
  kept_B = jnp.where(verify_B & leave_B, jnp.sum(jnp.cumprod(same_BW, axis=1), axis=1), 0)
  # A trusting request has given its pending tokens' successors out already.
  first_B, num_B = jnp.where(verify_B, 0, ring.count_B), jnp.where(leave_B, kept_B + 1, 0)
  early_BW = jnp.broadcast_to((ring.settled_B & (ring.mode_B == ring_lib.TRUST))[:, None], full_BW.shape)
  told = (jnp.where(early_BW, draft.token, full_BW), early_BW,
          jnp.where(early_BW, draft.depth, spread(slots.depth_B, ring.depth_BS)),
          jnp.where(early_BW, draft.logprob, find("logprob")))
  order_BW = jnp.minimum(first_B[:, None] + index_1W, size)
  token_BW, early_BW, depth_BW, logprob_BW = (jnp.take_along_axis(a_BW, order_BW, axis=1) for a_BW in told)
  report = nothing.exits.replace(
      early_BW=early_BW, kept_B=kept_B,
      drafts_B=jnp.where(leave_B & verify_B, jnp.minimum(ring.count_B, kept_B + 1), 0))
  if setup.exits.monitor:
    looked_BW = jnp.where(index_1W < count_B1, True, (ring.draft.depth > 0)[:, None])
    looked_BW &= (draft.top >= 0) & (index_1W <= jnp.where(verify_B, kept_B, ring.count_B)[:, None])
    looked_BW &= (leave_B & (ring.mode_B != ring_lib.NONE))[:, None]
    report = report.replace(sure_BW=jnp.where(looked_BW, draft.sure, -1.0),
                            agreed_BW=looked_BW & (draft.top == find("top")))
  new = nothing.replace(token_BW=jnp.where(index_1W < num_B[:, None], token_BW, -1), depth_BW=depth_BW,
                        logprob_BW=logprob_BW, exits=report)
  slots, position_B = _forget(decoder, slots, leave_B, kept_B, spread(ring.stored_BR, ring.stored_BSR))
  return slots.replace(ring=_learn(slots.ring, report, leave_B, setup)), new, position_B


def _forget(decoder, slots, leave_B, kept_B, stored_BWR):
  """Empties the rings of slots at the full depth, and takes entries of wrong drafts out of the cache.

  Returns:
    The slots, and the position of each slot's next token.
  """
  ring, index_1W = slots.ring, jnp.arange(stored_BWR.shape[1])[None, :]
  verify_B = ring.mode_B == ring_lib.VERIFY
  last_B = jnp.where(leave_B & verify_B, slots.position_B - ring.count_B + kept_B, slots.position_B)
  beyond_BW = (index_1W > kept_B[:, None]) & (index_1W <= ring.count_B[:, None])
  dropped_BR = jnp.sum(stored_BWR & beyond_BW[:, :, None], axis=1, dtype=jnp.int32)
  wrong_B = leave_B & verify_B & (kept_B < ring.count_B)
  cache = decoder.tables.crop(slots.cache, last_B + 1, dropped_BR, wrong_B)
  ring = ring.replace(count_B=jnp.where(leave_B, 0, ring.count_B))
  return slots.replace(cache=cache, ring=ring), last_B + 1


def _learn(ring, report, leave_B, setup):
  """Measures how often a verified request's drafts are confirmed."""
  size, judged_B = ring.step_BS.shape[1], leave_B & (report.drafts_B > 0)
  rate_B = jnp.where(judged_B, ring_lib.judge_rate(ring.rate_B, report.kept_B, report.drafts_B), ring.rate_B)
  idle_B = judged_B & (ring_lib.best_length(rate_B, size, setup.costs) == 0)
  return ring.replace(rate_B=rate_B, skip_B=jnp.where(idle_B, ring_lib.PROBE, ring.skip_B))


@functools.partial(jax.jit, static_argnames=("decoder", "num_ticks", "vocab_size", "variant"), donate_argnums=2)
@kernels.full_precision
def run(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, *, num_ticks: int,
        vocab_size: int, setup: exits_lib.Setup,
        variant: variant_lib.Variant = variant_lib.Variant()) -> tuple[slots_lib.Slots, packing.Words]:
  """Runs several ticks of an engine with exits."""
  one_tick = functools.partial(tick, decoder, weights, vocab_size=vocab_size, setup=setup,
                               variant=variant)
  return tick_lib.repeat(one_tick, decoder, slots, ring_lib.nothing_new(slots, setup.exits), num_ticks)
