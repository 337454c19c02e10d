"""One tick of continuous depth-wise batching, as pure functions of the slots.

Every occupied slot runs the shared stack once, at its own recursion step; those
whose token is done leave through coda, head and sampling, and start their next
token at step 0 in the next tick, while the others go one step deeper:

  start    embed, prelude, entrance of the router     (slots with a new token)
  advance  the shared stack                           (slots in the recursion)
  emit     coda, head, sampling, the end of a request (slots whose token leaves)

All parameters are shared over steps, so one batch serves all depths. With R = 1 the
tick is a decoding step and this is continuous sequence-wise batching. A plain model
that is cut into steps at its exits has a pass for each of them, in order.

A slot that finds no free page waits, untouched, and tries again in the next tick.
The edges take all slots (a matmul of few rows costs as much), sorted so that attention
reads active ones only; the head runs on the smallest of a few widths that holds the
leavers. `exits/tick.py` builds a tick with early exit around these functions.

An accelerator runs a tick without branches: all ticks of a dispatch, the head over all
slots. See `control.py`.

Files of `decode/` that a tick visits, in order: tick, slots, cache, decoder, storage,
control, weights, sampling, packing.
"""

from collections.abc import Callable
import functools

from flax import struct
import jax
import jax.numpy as jnp

from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import packing
from mor.decode import sampling
from mor.decode import slots as slots_lib
from mor.decode import variant as variant_lib
from mor.decode import weights as weights_lib
from mor.model import kernels
from mor.model.routers import base as router_base


@struct.dataclass
class Work:
  """M flat tokens before a pass of the shared stack, whosever they are.

  Attributes:
    tokens: slot, position and step of each, and whether it runs.
    h_MD, entry_MD: hidden states, now and at the entrance of the recursion.
    routed: the router's decision for that step.
  """

  tokens: cache_lib.Tokens
  h_MD: jax.Array
  entry_MD: jax.Array
  routed: router_base.Routing


@struct.dataclass
class Passed:
  """The same tokens after the pass; those that did not run are as before.

  Attributes:
    h_MD: hidden states.
    step_M: the step that each runs next.
    routed: the router's decision for that step.
    kept_M: whether the router let the stack process the token.
    go_M: whether the token runs one more step.
  """

  h_MD: jax.Array
  step_M: jax.Array
  routed: router_base.Routing
  kept_M: jax.Array
  go_M: jax.Array


def list_steps(decoder: decoder_lib.Decoder) -> tuple[int | None, ...]:
  """Returns the static steps of a tick's passes; None is one pass of slots at different steps."""
  return (None,) if decoder.tables.schedule.cyclic else tuple(range(decoder.num_steps))


def count_ticks(decoder: decoder_lib.Decoder) -> int:
  """Returns the ticks of a dispatch where none are asked for: the fewest rounds of all steps in 4, or in 12.

  Whole rounds keep tokens that never leave early in phase. On an accelerator a tick takes less time than the host needs
  for its share of a dispatch, so there a dispatch has more of them. A request is admitted between two dispatches, and its
  tokens are seen at the end of one: it waits longer for its first token, in return.
  """
  steps = decoder.num_steps if decoder.tables.schedule.cyclic else 1  # passes of a tick that may have something to do
  return steps * -(-(4 if control.adapts() else 12) // steps)


def start(decoder: decoder_lib.Decoder, weights: weights_lib.Weights,
          slots: slots_lib.Slots) -> tuple[slots_lib.Slots, jax.Array, jax.Array]:
  """Lets new tokens enter the recursion.

  Returns:
    The slots, which of them started, and which found no page.
  """
  wants_B = slots.phase_B == slots_lib.START
  cache, start_B = decoder.tables.reserve_edge(slots.cache, wants_B)
  h_BD = decoder.embed(weights, slots.token_B)
  zero_B = jnp.zeros_like(slots.step_B)
  cache, h_BD = decoder.edge(
      "prelude", weights, cache, h_BD, cache_lib.one_each(slots.position_B, zero_B, start_B))
  routed = decoder.decide(weights, h_BD, h_BD, start_B, slots.position_B, zero_B, (0,))
  runs_B = decoder.runs(routed.keep_BT[:, 0], start_B, zero_B)
  start_B1 = start_B[:, None]
  slots = slots.replace(
      cache=cache, step_B=jnp.where(start_B, 0, slots.step_B), depth_B=jnp.where(start_B, 0, slots.depth_B),
      h_BD=jnp.where(start_B1, h_BD, slots.h_BD), entry_BD=jnp.where(start_B1, h_BD, slots.entry_BD),
      routed=jax.tree.map(lambda new, old: jnp.where(start_B1, new, old), routed, slots.routed))
  slots = slots_lib.move(slots, start_B & runs_B, slots_lib.START, slots_lib.RUN)
  slots = slots_lib.move(slots, start_B & ~runs_B, slots_lib.START, slots_lib.LEAVE)
  return slots, start_B, wants_B & ~start_B


def advance(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, cache: cache_lib.Cache, work: Work,
            static_step: int | None = None, sparse: bool = False) -> tuple[cache_lib.Cache, Passed]:
  """Runs the shared stack once for flat tokens, each at its own step, and decides who goes deeper.

  Args:
    decoder: the model's tables.
    weights: of the model.
    cache: where the next entries' pages are reserved.
    work: the tokens.
    static_step: the one step of all of them, where known.
    sparse: whether many sequences have no token in the pass, static.
  """
  tokens = work.tokens
  cache, y_MD = decoder.run_pass(weights, cache, work.h_MD, tokens, static_step, sparse)
  run_M1 = tokens.run_M[:, None]
  h_MD = jnp.where(run_M1, decoder.merge(work.h_MD, y_MD, work.entry_MD, work.routed), work.h_MD)
  kept_M = tokens.run_M & work.routed.keep_BT[:, 0]
  step_M = tokens.step_M + tokens.run_M.astype(jnp.int32)
  alive_M = kept_M & (step_M < decoder.num_steps)
  if decoder.num_steps == 1:
    return cache, Passed(h_MD, step_M, work.routed, kept_M, jnp.zeros_like(alive_M))
  decided = decoder.decide(weights, h_MD, work.entry_MD, alive_M, tokens.position_M, step_M,
                           tuple(range(1, decoder.num_steps)), work.routed)
  routed = jax.tree.map(lambda new, old: jnp.where(run_M1, new, old), decided, work.routed)
  return cache, Passed(h_MD, step_M, routed, kept_M, alive_M & decided.keep_BT[:, 0])


def newest_work(slots: slots_lib.Slots, run_B: jax.Array) -> Work:
  """Returns the newest token of every slot, of which those of `run_B` run."""
  return Work(cache_lib.one_each(slots.position_B, slots.step_B, run_B), slots.h_BD, slots.entry_BD, slots.routed)


def settle(slots: slots_lib.Slots, passed: Passed, ran_B: jax.Array) -> slots_lib.Slots:
  """Writes the newest tokens of a pass back to their slots; those that are done leave."""
  slots = slots.replace(h_BD=passed.h_MD, step_B=passed.step_M, routed=passed.routed,
                        depth_B=slots.depth_B + passed.kept_M.astype(jnp.int32))
  return slots_lib.move(slots, ran_B & ~passed.go_M, slots_lib.RUN, slots_lib.LEAVE)


def proceed(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, *, vocab_size: int,
            variant: variant_lib.Variant, together: bool = False) -> tuple[slots_lib.Slots, slots_lib.Ticked]:
  """Runs a tick after its start: all passes for the newest tokens, and the tokens of those that leave."""
  def run_step(carry, step):
    slots, ran_B, waits_B = carry
    wants_B = slots_lib.at_step(slots, step)
    cache, run_B = decoder.tables.reserve_stack(slots.cache, slots.step_B, wants_B)
    cache, passed = advance(decoder, weights, cache, newest_work(slots, run_B), step)
    slots = settle(slots.replace(cache=cache), passed, run_B)
    return slots, ran_B | run_B, waits_B | (wants_B & ~run_B)

  nobody_B = jnp.zeros_like(slots.phase_B, bool)
  first, *deeper = list_steps(decoder)
  carry = run_step((slots, nobody_B, nobody_B), first)
  for step in deeper:
    # Apart, or XLA:CPU makes both passes' writes to a buffer one, and copies it for what reads it in between.
    on = jnp.any(slots_lib.at_step(carry[0], step))
    carry = control.skip_idle(on, functools.partial(run_step, step=step), carry)
  slots, ran_B, waits_B = carry
  leave_B = slots.phase_B == slots_lib.LEAVE
  if together:
    leave_B &= ~jnp.any((slots.phase_B == slots_lib.RUN) | (slots.phase_B == slots_lib.START))
  slots, new = finish(decoder, weights, slots, leave_B, vocab_size, variant)
  return slots, slots_lib.Ticked(new, ran_B, waits_B, nobody_B)


def finish(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, leave_B: jax.Array,
           vocab_size: int, variant: variant_lib.Variant) -> tuple[slots_lib.Slots, slots_lib.NewTokens]:
  """Runs coda, head and sampling for the slots that leave."""
  tokens = cache_lib.one_each(slots.position_B, slots.step_B, leave_B)
  cache, h_BD = decoder.edge("coda", weights, slots.cache, slots.h_BD, tokens)
  token_B, logprob_B = next_tokens(decoder, weights, slots, h_BD, leave_B, vocab_size, variant)
  new = slots_lib.nothing_new(token_B.shape[0]).replace(
      token_BW=jnp.where(leave_B, token_B, -1)[:, None], depth_BW=slots.depth_B[:, None],
      logprob_BW=logprob_B[:, None])
  return emit(slots.replace(cache=cache), new, slots.position_B + 1, variant)


def next_tokens(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, h_BD: jax.Array,
                leave_B: jax.Array, vocab_size: int, variant: variant_lib.Variant) -> tuple[jax.Array, jax.Array]:
  """Returns tokens and log-probabilities of the leavers, by a head as wide as they need."""
  num_slots = leave_B.shape[0]

  def read_head(index_M):
    logits_MV = decoder.head(weights, h_BD[index_M])
    rows_M = jax.tree.map(lambda a: a[index_M], slots.rows)
    token_M = sampling.sample(logits_MV, rows_M, slots.seen_BV[index_M], slots.index_B[index_M], vocab_size,
                              variant.sampling)
    logprob_M = control.choose(
        variant.logprobs, jnp.any(slots.logprob_B), lambda: sampling.log_probability(logits_MV, token_M, vocab_size),
        lambda: jnp.zeros(token_M.shape, jnp.float32))
    return token_M, logprob_M

  nothing = jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots, jnp.float32)
  return control.run_some(read_head, leave_B, control.list_widths(num_slots, num_slots), nothing)


def emit(slots: slots_lib.Slots, new: slots_lib.NewTokens,
         position_B: jax.Array, variant: variant_lib.Variant) -> tuple[slots_lib.Slots, slots_lib.NewTokens]:
  """Gives out new tokens, and decides whether they end their requests.

  Args:
    slots: whose slots with new tokens are at the full depth, or left at an exit.
    new: tokens, of which `finish_B` is not known yet.
    position_B: of the last of each slot's new tokens.
    variant: what the program must be able to do. If it cannot penalise, no request needs its tokens to be marked.
  """
  batch_B, given_BW = jnp.arange(slots.phase_B.shape[0]), new.token_BW != -1
  num_B = jnp.sum(given_BW, axis=1, dtype=jnp.int32)
  given_B, last_B = num_B > 0, new.token_BW[batch_B, jnp.maximum(num_B - 1, 0)]
  finish_B = jnp.where(given_B, slots_lib.find_finish(last_B, slots.stop_BE, slots.left_B, num_B), slots_lib.GOES_ON)
  if sampling.serves(variant.sampling, "filtered") is not False:
    column_BW = jnp.where(new.token_BW >= 0, new.token_BW, slots.seen_BV.shape[1])
    slots = slots.replace(seen_BV=slots.seen_BV.at[batch_B[:, None], column_BW].set(True, mode="drop"))
  slots = slots.replace(
      token_B=jnp.where(given_B, last_B, slots.token_B), position_B=jnp.where(given_B, position_B, slots.position_B),
      index_B=slots.index_B + num_B, left_B=slots.left_B - num_B)
  ends_B = finish_B != slots_lib.GOES_ON
  slots = slots_lib.move(slots, given_B & ends_B, (slots_lib.LEAVE, slots_lib.CHECK), slots_lib.DONE)
  slots = slots_lib.move(slots, given_B & ~ends_B, (slots_lib.LEAVE, slots_lib.CHECK), slots_lib.START)
  return slots, new.replace(finish_B=finish_B)


def tick(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, *, vocab_size: int,
         together: bool, variant: variant_lib.Variant) -> tuple[slots_lib.Slots, slots_lib.Ticked]:
  """Runs one tick; see the module docstring.

  Args:
    decoder: the model's tables.
    weights: of the model.
    slots: before the tick.
    vocab_size: tokens beyond it are never drawn.
    together: whether a token that is done waits for all others (a batch that waits
      for its deepest row), static.
    variant: what the program must be able to do, static.
  """
  slots, _, stalled_B = start(decoder, weights, slots)
  slots, ticked = proceed(decoder, weights, slots, vocab_size=vocab_size, variant=variant, together=together)
  return slots, ticked.replace(stalled_B=ticked.stalled_B | stalled_B)


Tick = Callable[[slots_lib.Slots], tuple[slots_lib.Slots, slots_lib.Ticked]]


def repeat(one_tick: Tick, decoder: decoder_lib.Decoder, slots: slots_lib.Slots, nothing: slots_lib.NewTokens,
           num_ticks: int) -> tuple[slots_lib.Slots, packing.Words]:
  """Runs several ticks; then done slots are freed.

  Ticks in which no slot is occupied come last. They change nothing, and are not counted.

  Args:
    one_tick: runs a tick.
    decoder: the model's tables.
    slots: before the ticks.
    nothing: no token for any slot.
    num_ticks: ticks at most.

  Returns:
    The slots, and an `Out` as one array.
  """
  nobody_B = jnp.zeros(slots.phase_B.shape[0], bool)
  ticks = jax.tree.map(lambda a: jnp.repeat(a[None], num_ticks, axis=0),
                       slots_lib.Ticked(nothing, nobody_B, nobody_B, nobody_B))

  def is_busy(carry):
    slots, _ = carry
    return jnp.any((slots.phase_B != slots_lib.FREE) & (slots.phase_B != slots_lib.DONE))

  def run_tick(k, carry):
    slots, ticks = carry
    slots, ticked = one_tick(slots)
    return slots, jax.tree.map(lambda old, new: old.at[k].set(new), ticks, ticked)

  num, (slots, ticks) = control.repeat(num_ticks, is_busy, run_tick, (slots, ticks))
  slots = slots_lib.free(decoder, slots, slots.phase_B == slots_lib.DONE)
  return slots, packing.pack(slots_lib.Out(ticks, num, slots.cache.free.num, slots.cache.edge_free.num, slots.sufficed))


@functools.partial(jax.jit, static_argnames=("decoder", "num_ticks", "vocab_size", "together", "variant"), donate_argnums=2)
@kernels.full_precision
def run(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, *, num_ticks: int,
        vocab_size: int, together: bool,
        variant: variant_lib.Variant = variant_lib.Variant()) -> tuple[slots_lib.Slots, packing.Words]:
  """Runs several ticks of an engine without exits."""
  one_tick = functools.partial(tick, decoder, weights, vocab_size=vocab_size, together=together,
                               variant=variant)
  return repeat(one_tick, decoder, slots, slots_lib.nothing_new(slots.phase_B.shape[0]), num_ticks)
