"""Tokens of each slot that left early and wait for the deeper layers, and which of them run in a pass.

A slot's *pending* tokens stand right before the *newest* one, the one it reads now:
index i of its ring is at position `position - count + i`. They have run the layers
up to an exit; each keeps its state there. When the newest goes deeper, they go along.

When a pending token runs changes no number, so passes are put together as they cost
least. Larger batches are cheaper per token, so slots at a step wait one tick when
other slots are about to reach it; and rows that a matmul computes anyway take pending
tokens of other slots.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp

from mor import types
from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import packing
from mor.decode import slots as slots_lib
from mor.decode import tick as tick_lib
from mor.exits import policy as exits_lib
from mor.model.routers import base as router_base

NONE, TRUST, VERIFY = range(len(exits_lib.MODES))
FIRST_RATE = 0.75  # of drafts that are confirmed, before any was judged
PROBE = 16  # tokens between two looks for an exit that is not worth it
PAST = 16  # looks that the measured rates remember, about


@struct.dataclass
class Draft:
  """A token that an exit chose, of a slot or of S pending ones.

  Attributes:
    token: its id; -1 where the exit was not looked at.
    depth: steps that processed the token before it.
    hidden: the state it was read from.
    sure: its confidence.
    top: the exit's likeliest token.
    logprob: of the token, under the exit's distribution.
  """

  token: jax.Array
  depth: jax.Array
  hidden: jax.Array
  sure: jax.Array
  top: jax.Array
  logprob: jax.Array


@struct.dataclass
class Ring:
  """All slots' pending tokens, and what each request wants of exits.

  Attributes:
    mode_B: index of `exits.MODES`.
    threshold_B: a confidence above it exits.
    rate_B: share of looks that exit (trust), of drafts that are confirmed (verify).
    skip_B: tokens until exits are looked at again.
    look_B: whether the newest token looks at its exits.
    settled_B: whether the newest token has its successor, `draft`, and goes deep all the same.
    draft: what the newest token's exit chose.
    stored_BR: rows of the cache in which the newest token has an entry.
    count_B: pending tokens.
    wait_B: ticks for which a slot has found no room in a pass.
    step_BS: the step each pending token runs next, if its routing keeps it.
    depth_BS: steps that processed it.
    h_BSD, entry_BSD, routed: its states, and arrays of its routing by name, as `slots.Slots` has them.
    drafts: what their exits chose.
    stored_BSR: rows in which each has an entry.
  """

  mode_B: jax.Array
  threshold_B: jax.Array
  rate_B: jax.Array
  skip_B: jax.Array
  look_B: jax.Array
  settled_B: jax.Array
  draft: Draft
  stored_BR: jax.Array
  count_B: jax.Array
  wait_B: jax.Array
  step_BS: jax.Array
  depth_BS: jax.Array
  h_BSD: jax.Array
  entry_BSD: jax.Array
  routed: dict[str, jax.Array]
  drafts: Draft
  stored_BSR: jax.Array

  def pending(self) -> jax.Array:
    """Marks the entries `[B, S]` in use."""
    return jnp.arange(self.step_BS.shape[1])[None, :] < self.count_B[:, None]

  def behind(self) -> jax.Array:
    """Marks pending tokens that have not reached the full depth (their router's, in a MoR)."""
    return self.pending() & self.routed["keep_BT"][:, :, 0]

  def position(self, position_B: jax.Array) -> jax.Array:
    """Returns the position of each pending token, `[B, S]`."""
    return (position_B - self.count_B)[:, None] + jnp.arange(self.step_BS.shape[1])[None, :]


@struct.dataclass
class ExitReport:
  """What exits tell of a slot's new tokens, W at most.

  Attributes:
    early_BW: whether an exit chose the token, unverified.
    drafts_B, kept_B: drafts that the full depth has judged, and that it confirmed.
    sure_BW, agreed_BW: of a monitored exit its confidence, -1 for none, and whether its
      likeliest token was the full depth's.
  """

  early_BW: types.Array
  drafts_B: types.Array
  kept_B: types.Array
  sure_BW: types.Array
  agreed_BW: types.Array


def nothing_new(slots: slots_lib.Slots, exits: exits_lib.Exits) -> slots_lib.NewTokens:
  """Returns no token for any slot, which may get one more at once than its ring holds."""
  num_slots, size = slots.ring.step_BS.shape
  wide = num_slots, 1 + size
  many = num_slots, wide[1] if exits.monitor else 0
  int_B = jnp.zeros(num_slots, jnp.int32)
  report = ExitReport(jnp.zeros(wide, bool), int_B, int_B, jnp.full(many, -1, jnp.float32), jnp.zeros(many, bool))
  return slots_lib.NewTokens(jnp.full(wide, -1, jnp.int32), jnp.zeros(wide, jnp.int32), jnp.zeros(wide, jnp.float32),
                             int_B, report)


def attach(decoder: decoder_lib.Decoder, slots: slots_lib.Slots, exits: exits_lib.Exits) -> slots_lib.Slots:
  """Gives empty slots their empty rings."""
  num_slots, size, width = slots.phase_B.shape[0], exits.places, decoder.model.d_model

  def zeros(dtype, *shape):
    return jnp.zeros((num_slots, *shape), dtype)

  def make_draft(*shape):
    return Draft(
        token=zeros(jnp.int32, *shape) - 1, depth=zeros(jnp.int32, *shape), hidden=zeros(jnp.float32, *shape, width),
        sure=zeros(jnp.float32, *shape), top=zeros(jnp.int32, *shape) - 1, logprob=zeros(jnp.float32, *shape))

  def make():
    return Ring(
        mode_B=zeros(jnp.int32), threshold_B=zeros(jnp.float32), rate_B=zeros(jnp.float32),
        skip_B=zeros(jnp.int32), look_B=zeros(bool), settled_B=zeros(bool), draft=make_draft(),
        stored_BR=zeros(bool, decoder.tables.num_rows), count_B=zeros(jnp.int32), wait_B=zeros(jnp.int32),
        step_BS=zeros(jnp.int32, size), depth_BS=zeros(jnp.int32, size), h_BSD=zeros(jnp.float32, size, width),
        entry_BSD=zeros(jnp.float32, size, width),
        routed={name: zeros(a.dtype, size, *a.shape[1:]) for name, a in list_arrays(slots.routed).items()},
        drafts=make_draft(size), stored_BSR=zeros(bool, size, decoder.tables.num_rows))

  return slots.replace(ring=jax.jit(make)())  # jitted, so that each is a buffer of its own


@functools.partial(jax.jit, donate_argnums=0)
def admit(slots: slots_lib.Slots, admission: packing.Words) -> slots_lib.Slots:
  """Gives free slots their requests, and their rings the fields that a request sets, by name; both come as one array."""
  ring, (admission, fields) = slots.ring, packing.unpack(admission)
  fields = {"count_B": 0, "wait_B": 0} | fields
  ring = ring.replace(**{name: getattr(ring, name).at[admission.slot_G].set(value, mode="drop")
                         for name, value in fields.items()})
  return slots_lib.place(slots.replace(ring=ring), admission)


def list_arrays(routed: router_base.Routing) -> dict[str, jax.Array]:
  """Returns what a routing says of each token, by name."""
  names = ("keep_BT", "score_BT", "gate_BT", "entry_BT")
  return {name: getattr(routed, name) for name in names if getattr(routed, name) is not None}


@struct.dataclass
class Packed:
  """P places for pending tokens of all slots, in order; `run_P` are in use."""

  slot_P: jax.Array
  index_P: jax.Array
  run_P: jax.Array

  def take(self, a_BS: jax.Array) -> jax.Array:
    """Returns values of the tokens, `[P, …]`."""
    return a_BS[self.slot_P, self.index_P]

  def put(self, a_BS: jax.Array, new_P: jax.Array) -> jax.Array:
    """Returns `a` with new values for the tokens that run."""
    index_P = jnp.where(self.run_P, self.index_P, a_BS.shape[1])
    return a_BS.at[self.slot_P, index_P].set(new_P, mode="drop")


def pack(on_BS: jax.Array, room: int) -> Packed:
  """Returns where the tokens of `on_BS`, `room` at most, stand in a flat batch."""
  num_slots, size = on_BS.shape
  flat_P = jnp.nonzero(on_BS.reshape(-1), size=room, fill_value=num_slots * size)[0].astype(jnp.int32)
  return Packed(jnp.minimum(flat_P // size, num_slots - 1), flat_P % size, flat_P < num_slots * size)


def join(work: tick_lib.Work, ring: Ring, packed: Packed, position_B: jax.Array) -> tick_lib.Work:
  """Returns the newest tokens' work with the packed pending tokens behind it."""
  def add(newest, pending):
    return jnp.concatenate([newest, packed.take(pending)])

  tokens = cache_lib.Tokens(
      jnp.concatenate([work.tokens.slot_M, packed.slot_P]), add(work.tokens.position_M, ring.position(position_B)),
      add(work.tokens.step_M, ring.step_BS), jnp.concatenate([work.tokens.run_M, packed.run_P]))
  routed = work.routed.replace(**jax.tree.map(add, list_arrays(work.routed), ring.routed))
  return tick_lib.Work(tokens, add(work.h_MD, ring.h_BSD), add(work.entry_MD, ring.entry_BSD), routed)


def put_back(ring: Ring, packed: Packed, passed: tick_lib.Passed, stored_PR: jax.Array) -> Ring:
  """Writes packed pending tokens back after a pass, which has stored entries in some rows of the cache."""
  routed = passed.routed.replace(keep_BT=passed.routed.keep_BT & passed.go_M[:, None])  # the last step keeps none
  depth_P = packed.take(ring.depth_BS) + passed.kept_M.astype(jnp.int32)
  return ring.replace(
      h_BSD=packed.put(ring.h_BSD, passed.h_MD), step_BS=packed.put(ring.step_BS, passed.step_M),
      routed=jax.tree.map(packed.put, ring.routed, list_arrays(routed)),
      depth_BS=packed.put(ring.depth_BS, depth_P),
      stored_BSR=packed.put(ring.stored_BSR, packed.take(ring.stored_BSR) | stored_PR))


def push(ring: Ring, slots: slots_lib.Slots, leave_B: jax.Array) -> Ring:
  """Adds the newest tokens of `leave_B` to the pending ones."""
  size = ring.step_BS.shape[1]
  batch_B, at_B = jnp.arange(leave_B.shape[0]), jnp.where(leave_B, ring.count_B, size)

  def put(old, new):
    return old.at[batch_B, at_B].set(new, mode="drop")

  return ring.replace(
      count_B=ring.count_B + leave_B.astype(jnp.int32), step_BS=put(ring.step_BS, slots.step_B),
      depth_BS=put(ring.depth_BS, slots.depth_B), h_BSD=put(ring.h_BSD, slots.h_BD),
      entry_BSD=put(ring.entry_BSD, slots.entry_BD),
      routed=jax.tree.map(put, ring.routed, list_arrays(slots.routed)),
      drafts=jax.tree.map(put, ring.drafts, ring.draft), stored_BSR=put(ring.stored_BSR, ring.stored_BR))


def fit(need_B: jax.Array, wants_B: jax.Array, wait_B: jax.Array, room: int) -> jax.Array:
  """Marks the slots of `wants_B` whose `need_B` tokens have room together; the longest waiting come first."""
  order_B = jnp.argsort(-wait_B, stable=True)
  end_B = jnp.cumsum(jnp.where(wants_B, need_B, 0)[order_B])
  fits_B = jnp.zeros_like(wants_B).at[order_B].set(end_B <= room, unique_indices=True)
  return wants_B & (fits_B | (need_B == 0))


def drafts_all(slots: slots_lib.Slots) -> jax.Array:
  """Marks sampled `verify` requests. They draft every token, so their samples do not depend on scheduling."""
  return (slots.ring.mode_B == VERIFY) & (slots.rows.temperature_B > 0)


def has_pending(slots: slots_lib.Slots) -> jax.Array:
  """Returns True if any token waits for the deeper layers."""
  return jnp.any(_held(slots) & (slots.ring.count_B > 0))


def crowded(slots: slots_lib.Slots) -> jax.Array:
  """Marks slots that are done but for pending tokens, which found no room at the head."""
  return (slots.phase_B == slots_lib.LEAVE) & (slots.ring.count_B > 0)


def needs_exits(slots: slots_lib.Slots, setup: exits_lib.Setup) -> jax.Array:
  """Returns True if a tick must run the exit path: a token is pending, reaches an exit that it checks, or has a draft."""
  ring = slots.ring
  comes_B = ring.look_B & (ring.mode_B != NONE) & (slots.step_B < setup.steps[-1])
  comes_B &= slots.phase_B == slots_lib.RUN
  follows_B = (ring.count_B > 0) | ring.settled_B | drafts_all(slots)
  if setup.exits.monitor:
    follows_B |= ring.draft.depth > 0
  return jnp.any((_held(slots) & follows_B) | comes_B | (slots.phase_B == slots_lib.CHECK))


def should_wait(slots: slots_lib.Slots, step: int, num_B: jax.Array, room: int,
                costs: exits_lib.ExitCosts) -> jax.Array:
  """Returns True if the slots at a step should wait one tick for slots that have just left at an exit.

  They wait if a turn to the exit costs less than what so many tokens cost in this
  pass, and while they leave room for more.

  Args:
    slots: of which those at `step` would run it.
    step: after the first exit.
    num_B: pending tokens of each slot at the start of the tick.
    room: for pending tokens in the pass.
    costs: costs of tokens.
  """
  ring, newest_B = slots.ring, slots_lib.at_step(slots, step)
  along_BS = newest_B[:, None] & ring.behind() & (ring.step_BS == step)
  num_rows = jnp.sum(newest_B) + jnp.sum(along_BS)
  num_left = jnp.sum(ring.count_B > num_B)  # each a place nearer to a full ring, so none waits forever
  return (num_left * costs.full > num_rows * costs.turn) & (num_rows < slots.phase_B.shape[0] + room)


@struct.dataclass
class Selection:
  """The tokens of a pass.

  Attributes:
    wants_B: slots that want to run: their newest token, or the pending ones that a slot waits for.
    fits_B: those of them whose pending tokens have room.
    goes_B: the same, and slots that send pending tokens alone.
    step_B: the step of each.
    along_BS: pending tokens that run.
  """

  wants_B: jax.Array
  fits_B: jax.Array
  goes_B: jax.Array
  step_B: jax.Array
  along_BS: jax.Array


def select_tokens(slots: slots_lib.Slots, room: int, num_steps: int, step: int | None) -> Selection:
  """Selects the tokens of a pass: the newest, pending ones of their slots, and others' if rows are left.

  Args:
    slots: before the pass.
    room: pending tokens that the pass has room for; without room none may be pending.
    num_steps: of the model.
    step: the one step of all tokens, if it is one.
  """
  ring, num_slots, newest_B = slots.ring, slots.phase_B.shape[0], slots_lib.at_step(slots, step)
  if not room:
    return Selection(newest_B, newest_B, newest_B, slots.step_B, jnp.zeros_like(ring.step_BS, bool))
  drain_B = slots.phase_B == slots_lib.DRAIN
  least_B = jnp.min(jnp.where(ring.behind(), ring.step_BS, num_steps), axis=1)
  wants_B, step_B = newest_B | drain_B, jnp.where(drain_B, least_B, slots.step_B)
  along_BS = wants_B[:, None] & ring.behind() & (ring.step_BS == step_B[:, None])
  num_B = jnp.sum(along_BS, axis=1, dtype=jnp.int32)
  fits_B = fit(num_B, wants_B, ring.wait_B, room)
  along_BS &= fits_B[:, None]
  if step is None:
    return Selection(wants_B, fits_B, fits_B, step_B, along_BS)
  # A matmul computes whole widths: its spare rows take tokens that would have to come along later.
  num_rows, widths = jnp.sum(along_BS) + jnp.sum(newest_B & fits_B), control.list_widths(num_slots, num_slots + room)
  spare = jnp.asarray(widths)[jnp.sum(num_rows > jnp.asarray(widths))] - num_rows
  other_BS = (_held(slots) & ~fits_B)[:, None] & ring.behind() & (ring.step_BS == step)
  spare = jnp.minimum(spare, room - jnp.sum(along_BS))
  other_BS &= jnp.cumsum(other_BS.reshape(-1)).reshape(other_BS.shape) <= spare
  some_B = jnp.any(other_BS, axis=1)
  return Selection(wants_B, fits_B, fits_B | some_B, jnp.where(some_B, step, step_B), along_BS | other_BS)


def _held(slots):
  return (slots.phase_B != slots_lib.FREE) & (slots.phase_B != slots_lib.DONE)


def follow_rate(rate_B: jax.Array, exited_B: jax.Array) -> jax.Array:
  """Returns a trusting request's rate after one more look."""
  return rate_B + (exited_B - rate_B) / PAST


def judge_rate(rate_B: jax.Array, kept_B: jax.Array, num_B: jax.Array) -> jax.Array:
  """Returns a verified request's rate after some more drafts."""
  return (PAST * rate_B + kept_B) / (PAST + num_B)


def best_length(rate_B: jax.Array, most: int, costs: exits_lib.ExitCosts) -> jax.Array:
  """Returns how many drafts give the most tokens for what they cost, if each is confirmed at the measured rate."""
  kept_BS = jnp.cumprod(jnp.broadcast_to(rate_B[:, None], (rate_B.shape[0], most)), axis=1)
  tokens_BS = 1.0 + jnp.cumsum(kept_BS, axis=1)
  cost_1S = (costs.full + costs.look + costs.draft * jnp.arange(1, most + 1))[None, :]
  gain_BS = tokens_BS * costs.full / cost_1S
  return jnp.where(jnp.max(gain_BS, axis=1) > 1.0, 1 + jnp.argmax(gain_BS, axis=1), 0).astype(jnp.int32)
