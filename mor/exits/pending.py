"""Which tokens run in a pass of a tick: the newest of some slots, and pending ones.

A token that left at an exit waits in the ring until its slot's newest one goes deeper,
and then goes along (`early_exit.py`). When that is changes no number, so the pass is
put together as it costs least: slots wait for each other where more rows cost less
each, and rows that a product computes anyway take pending tokens of other slots.
"""

import jax
import jax.numpy as jnp

from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import slots as slots_lib
from mor.exits import heads as exit_heads
from mor.exits import policy as exits_lib
from mor.exits import ring as ring_lib


def waiting(slots: slots_lib.Slots) -> jax.Array:
  """Whether any token waits for the deeper layers."""
  return jnp.any(_held(slots) & (slots.ring.count_B > 0))


def crowded(slots: slots_lib.Slots) -> jax.Array:
  """Slots that are done but for pending tokens, which found no room at the head."""
  return (slots.phase_B == slots_lib.LEAVE) & (slots.ring.count_B > 0)


def used(decoder: decoder_lib.Decoder, slots: slots_lib.Slots) -> jax.Array:
  """Whether any token waits, comes to an exit at which it looks, or is followed by what an exit has said."""
  ring = slots.ring
  comes_B = ring.look_B & (ring.mode_B != ring_lib.NONE) & (slots.step_B < decoder.exit_steps[-1])
  comes_B &= slots.phase_B == slots_lib.RUN
  follows_B = (ring.count_B > 0) | ring.settled_B | exit_heads.bound(slots)
  if decoder.exits.monitor:
    follows_B |= ring.draft.depth > 0
  return jnp.any((_held(slots) & follows_B) | comes_B | (slots.phase_B == slots_lib.CHECK))


def holds(slots: slots_lib.Slots, step: int, num_B: jax.Array, room: int, costs: exits_lib.Costs) -> jax.Array:
  """Whether the slots at a step wait a tick for those that have just left at an exit, and will soon come along.

  A pass of more rows costs less by the row. They wait where a turn to the exit costs less
  than what so many tokens cost in this pass, and while they leave room for more.

  Args:
    slots: of which those at `step` would run it.
    step: after the first exit.
    num_B: pending tokens of each slot at the start of the tick.
    room: for pending tokens in the pass.
    costs: of tokens.
  """
  ring, newest_B = slots.ring, slots_lib.running(slots, step)
  along_BS = newest_B[:, None] & ring.behind() & (ring.step_BS == step)
  num_rows = jnp.sum(newest_B) + jnp.sum(along_BS)
  num_left = jnp.sum(ring.count_B > num_B)  # each a place nearer to a full ring, so none waits forever
  return (num_left * costs.full > num_rows * costs.turn) & (num_rows < slots.phase_B.shape[0] + room)


def company(slots: slots_lib.Slots, newest_B: jax.Array, room: int, num_steps: int,
            step: int | None) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Which pending tokens run in a pass: those of slots that go on, and where rows are left others'.

  Args:
    slots: before the pass.
    newest_B: slots whose newest token wants to run.
    room: pending tokens that the pass has room for.
    num_steps: of the model.
    step: the one step of all of them, if it is one.

  Returns:
    Slots that want to run, those of them that do, the same and those with pending tokens alone, the step of each, and
    the pending tokens `[B, S]`.
  """
  ring, num_slots = slots.ring, slots.phase_B.shape[0]
  drain_B = slots.phase_B == slots_lib.DRAIN
  least_B = jnp.min(jnp.where(ring.behind(), ring.step_BS, num_steps), axis=1)
  wants_B, step_B = newest_B | drain_B, jnp.where(drain_B, least_B, slots.step_B)
  along_BS = wants_B[:, None] & ring.behind() & (ring.step_BS == step_B[:, None])
  num_B = jnp.sum(along_BS, axis=1, dtype=jnp.int32)
  fits_B = ring_lib.fit(num_B, wants_B, ring.wait_B, room)
  along_BS &= fits_B[:, None]
  if step is None:
    return wants_B, fits_B, fits_B, step_B, along_BS
  # A product computes whole widths: its spare rows take tokens that would have to come along later.
  num_rows, widths = jnp.sum(along_BS) + jnp.sum(newest_B & fits_B), control.list_widths(num_slots, num_slots + room)
  spare = jnp.asarray(widths)[jnp.sum(num_rows > jnp.asarray(widths))] - num_rows
  other_BS = (_held(slots) & ~fits_B)[:, None] & ring.behind() & (ring.step_BS == step)
  spare = jnp.minimum(spare, room - jnp.sum(along_BS))
  other_BS &= jnp.cumsum(other_BS.reshape(-1)).reshape(other_BS.shape) <= spare
  some_B = jnp.any(other_BS, axis=1)
  return wants_B, fits_B, fits_B | some_B, jnp.where(some_B, step, step_B), along_BS | other_BS


def arrive(decoder: decoder_lib.Decoder, slots: slots_lib.Slots, ran_B: jax.Array) -> slots_lib.Slots:
  """Stops newest tokens at exits that they look at, and lets those that leave wait for the ones behind."""
  ring = slots.ring
  at_exit_B = jnp.any(slots.step_B[:, None] == jnp.asarray(decoder.exit_steps)[None, :], axis=1)
  check_B = ran_B & (slots.phase_B == slots_lib.RUN) & at_exit_B & ring.look_B & ~ring.settled_B
  check_B &= ring.mode_B != ring_lib.NONE  # whose `look_B` may be of the request before
  phase_B = jnp.where(check_B, slots_lib.CHECK, slots.phase_B)
  behind_B = jnp.any(ring.behind(), axis=1)
  phase_B = jnp.where((phase_B == slots_lib.LEAVE) & behind_B, slots_lib.DRAIN, phase_B)
  return slots.replace(phase_B=jnp.where((phase_B == slots_lib.DRAIN) & ~behind_B, slots_lib.LEAVE, phase_B))


def stored(decoder: decoder_lib.Decoder, tokens: cache_lib.Tokens) -> jax.Array:
  """The rows `[M, R]` of the cache in which a pass has put each token's entry."""
  own_M, stores_M = decoder.tables.stores(tokens.step_M)
  return (own_M[:, None] == jnp.arange(decoder.tables.num_rows)[None, :]) & (stores_M & tokens.run_M)[:, None]


def _held(slots):
  return (slots.phase_B != slots_lib.FREE) & (slots.phase_B != slots_lib.DONE)
