"""One tick of continuous depth-wise batching, as pure functions of the slots.

Every occupied slot runs the shared stack once, at its own recursion step; those
whose token is done leave through coda, head and sampling, and start their next
token at step 0 in the next tick, while the others go one step deeper:

  start    embed, prelude, entrance of the router     (slots with a new token)
  pass     the shared stack                           (slots in the recursion)
  finish   coda, head, sampling                       (slots whose token leaves)

All parameters are shared over steps, so one batch serves all depths. With R = 1 the
tick is a decoding step and this is continuous sequence-wise batching.

A slot that finds no free page waits, untouched, and tries again in the next tick.
The edges and the head take all slots at full width where that is as fast (matrix
products do not grow with rows there), sorted so that attention reads active slots
only; the head runs on the smallest of a few widths that holds the leavers.
"""

import functools

import jax
import jax.numpy as jnp

from mor.inference import decoder as decoder_lib
from mor.inference import prefill
from mor.inference import sampling
from mor.inference import slots as slots_lib
from mor.inference import weights as weights_lib

def tick(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, *, vocab_size: int,
         together: bool) -> tuple[slots_lib.Slots, tuple[jax.Array, ...]]:
  """See the module docstring.

  Args:
    decoder: the model's tables.
    weights: of the model.
    slots: before the tick.
    vocab_size: tokens beyond it are never drawn.
    together: whether a token that is done waits for all others (a batch that waits
      for its deepest row), static.

  Returns:
    The slots after it, and a row of `Out`'s arrays.
  """
  slots, stalled_B = _start(decoder, weights, slots)
  slots, ran_B, no_page_B = _pass(decoder, weights, slots)
  leave_B = slots.phase_B == slots_lib.LEAVE
  if together:
    leave_B &= ~jnp.any((slots.phase_B == slots_lib.RUN) | (slots.phase_B == slots_lib.START))
  slots, (token_B, finish_B, logprob_B) = _finish(decoder, weights, slots, leave_B, vocab_size)
  out = (jnp.where(leave_B, token_B, -1), slots.depth_B, finish_B, logprob_B, ran_B, stalled_B | no_page_B)
  return slots, out


def _start(decoder, weights, slots):
  """New tokens enter the recursion."""
  wants_B = slots.phase_B == slots_lib.START
  cache, start_B = decoder.tables.reserve_edge(slots.cache, wants_B)
  h_BD = decoder.embed(weights, slots.token_B)
  cache, h_BD = decoder.edge("prelude", weights, cache, h_BD, slots.position_B, start_B)
  step_B = jnp.where(start_B, 0, slots.step_B)
  routed = decoder.decide(weights, h_BD, h_BD, start_B, slots.position_B, jnp.zeros_like(step_B), (0,))
  runs_B = decoder.runs(routed.keep_BT[:, 0], start_B, jnp.zeros_like(step_B))
  start_B1 = start_B[:, None]
  return slots.replace(
      cache=cache, step_B=step_B, depth_B=jnp.where(start_B, 0, slots.depth_B),
      h_BD=jnp.where(start_B1, h_BD, slots.h_BD), entry_BD=jnp.where(start_B1, h_BD, slots.entry_BD),
      routed=jax.tree.map(lambda new, old: jnp.where(start_B1, new, old), routed, slots.routed),
      phase_B=jnp.where(start_B, jnp.where(runs_B, slots_lib.RUN, slots_lib.LEAVE), slots.phase_B),
  ), wants_B & ~start_B


def _pass(decoder, weights, slots):
  """The shared stack, and each token's next decision."""
  wants_B, num_steps = slots.phase_B == slots_lib.RUN, decoder.num_steps
  cache, run_B = decoder.tables.reserve_stack(slots.cache, slots.step_B, wants_B)
  cache, y_BD = decoder.run_pass(weights, cache, slots.h_BD, slots.position_B, slots.step_B, run_B)
  run_B1 = run_B[:, None]
  h_BD = jnp.where(run_B1, decoder.merge(slots.h_BD, y_BD, slots.entry_BD, slots.routed), slots.h_BD)
  kept_B = run_B & slots.routed.keep_BT[:, 0]
  step_B = slots.step_B + run_B.astype(jnp.int32)
  alive_B = kept_B & (step_B < num_steps)
  if num_steps == 1:
    go_B, routed = jnp.zeros_like(alive_B), slots.routed
  else:
    steps = tuple(range(1, num_steps))
    routed = decoder.decide(weights, h_BD, slots.entry_BD, alive_B, slots.position_B, step_B, steps)
    go_B = alive_B & routed.keep_BT[:, 0]
    routed = jax.tree.map(lambda new, old: jnp.where(run_B1, new, old), routed, slots.routed)
  slots = slots.replace(
      cache=cache, h_BD=h_BD, step_B=step_B, routed=routed, depth_B=slots.depth_B + kept_B.astype(jnp.int32),
      phase_B=jnp.where(run_B, jnp.where(go_B, slots_lib.RUN, slots_lib.LEAVE), slots.phase_B))
  return slots, run_B, wants_B & ~run_B


def _finish(decoder, weights, slots, leave_B, vocab_size):
  """Coda, head and sampling of the slots that leave."""
  cache, h_BD = decoder.edge("coda", weights, slots.cache, slots.h_BD, slots.position_B, leave_B)
  token_B, logprob_B = next_tokens(decoder, weights, slots, h_BD, leave_B, vocab_size)
  stop_B = jnp.any(token_B[:, None] == slots.stop_BE, axis=1)
  finish_B = jnp.where(leave_B, jnp.where(stop_B, 1, jnp.where(slots.left_B == 1, 2, 0)), 0)
  one_B = leave_B.astype(jnp.int32)
  return slots.replace(
      cache=cache,
      token_B=jnp.where(leave_B, token_B, slots.token_B), position_B=slots.position_B + one_B,
      index_B=slots.index_B + one_B, left_B=slots.left_B - one_B,
      seen_BV=slots.seen_BV.at[jnp.arange(token_B.shape[0]), token_B].max(leave_B),
      phase_B=jnp.where(leave_B, jnp.where(finish_B > 0, slots_lib.DONE, slots_lib.START), slots.phase_B),
  ), (token_B, finish_B, logprob_B)


def next_tokens(decoder, weights, slots, h_BD, leave_B, vocab_size):
  """Tokens and log-probabilities of the leavers, by a head as wide as they need."""
  num_slots = leave_B.shape[0]
  widths = sorted({0, *(-(-num_slots * quarter // 4) for quarter in (1, 2, 3, 4))})
  order_B = jnp.argsort(~leave_B, stable=True)

  def head(width):
    if not width:
      return lambda: (jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots, jnp.float32))

    def run():
      index_M = order_B[:width]
      logits_MV = decoder.head(weights, h_BD[index_M])
      rows_M = jax.tree.map(lambda a: a[index_M], slots.rows)
      token_M = sampling.sample(logits_MV, rows_M, slots.seen_BV[index_M], slots.index_B[index_M], vocab_size)
      logprob_M = jax.lax.cond(
          jnp.any(slots.logprob_B), lambda: sampling.log_probability(logits_MV, token_M, vocab_size),
          lambda: jnp.zeros(width, jnp.float32))
      put = lambda new_M: jnp.zeros(num_slots, new_M.dtype).at[index_M].set(new_M, unique_indices=True)
      return put(token_M), put(logprob_M)
    return run

  which = jnp.sum(jnp.sum(leave_B) > jnp.asarray(widths[:-1]))
  return jax.lax.switch(which, [head(width) for width in widths])


@functools.partial(jax.jit, static_argnames=("decoder", "num_ticks", "vocab_size", "together"), donate_argnums=2)
def run(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, *, num_ticks: int,
        vocab_size: int, together: bool) -> tuple[slots_lib.Slots, slots_lib.Out]:
  """Several ticks, fewer where no slot is occupied; then done slots are freed."""
  num_slots = slots.phase_B.shape[0]
  blank = lambda dtype: jnp.zeros((num_ticks, num_slots), dtype)
  outs = (blank(jnp.int32) - 1, blank(jnp.int32), blank(jnp.int32), blank(jnp.float32), blank(bool), blank(bool))

  def busy(carry):
    k, slots, _ = carry
    return (k < num_ticks) & jnp.any((slots.phase_B != slots_lib.FREE) & (slots.phase_B != slots_lib.DONE))

  def body(carry):
    k, slots, outs = carry
    slots, out = tick(decoder, weights, slots, vocab_size=vocab_size, together=together)
    return k + 1, slots, tuple(old.at[k].set(new) for old, new in zip(outs, out))

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
