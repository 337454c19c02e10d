"""Tokens of each slot that left early and wait for the deeper layers.

A slot's *pending* tokens stand right before the *newest* one, the one it reads now:
index i of its ring is at position `position - count + i`. They have run the layers
up to an exit; each keeps its state there. When the newest goes deeper, they go along.
"""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from mor.decode import decoder as decoder_lib
from mor.exits import policy as exits_lib
from mor.model.routers import base as router_base

NONE, TRUST, VERIFY = range(len(exits_lib.MODES))
FIRST_RATE = 0.75  # of drafts that are confirmed, before any was judged
PROBE = 16  # tokens between two looks for an exit that is not worth it
_PAST = 16  # looks that the measured rates remember, about


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
    """True for the entries `[B, S]` in use."""
    return jnp.arange(self.step_BS.shape[1])[None, :] < self.count_B[:, None]

  def behind(self) -> jax.Array:
    """True for pending tokens that have not reached the full depth (their router's, in a MoR)."""
    return self.pending() & self.routed["keep_BT"][:, :, 0]

  def position(self, position_B: jax.Array) -> jax.Array:
    """Of each pending token, `[B, S]`."""
    return (position_B - self.count_B)[:, None] + jnp.arange(self.step_BS.shape[1])[None, :]


def make(decoder: decoder_lib.Decoder, num_slots: int, routed: router_base.Routing) -> Ring:
  """Empty rings; `routed` has the shapes of a routing of one token a slot."""
  width, size = decoder.model.d_model, decoder.exits.places
  zeros = lambda dtype, *shape: jnp.zeros((num_slots, *shape), dtype)
  draft = lambda *shape: Draft(
      token=zeros(jnp.int32, *shape) - 1, depth=zeros(jnp.int32, *shape), hidden=zeros(jnp.float32, *shape, width),
      sure=zeros(jnp.float32, *shape), top=zeros(jnp.int32, *shape) - 1, logprob=zeros(jnp.float32, *shape))
  return Ring(
      mode_B=zeros(jnp.int32), threshold_B=zeros(jnp.float32), rate_B=zeros(jnp.float32),
      skip_B=zeros(jnp.int32), look_B=zeros(bool), settled_B=zeros(bool), draft=draft(),
      stored_BR=zeros(bool, decoder.tables.num_rows), count_B=zeros(jnp.int32), wait_B=zeros(jnp.int32),
      step_BS=zeros(jnp.int32, size), depth_BS=zeros(jnp.int32, size), h_BSD=zeros(jnp.float32, size, width),
      entry_BSD=zeros(jnp.float32, size, width),
      routed={name: zeros(a.dtype, size, *a.shape[1:]) for name, a in arrays(routed).items()},
      drafts=draft(size), stored_BSR=zeros(bool, size, decoder.tables.num_rows))


def arrays(routed: router_base.Routing) -> dict[str, jax.Array]:
  """What a routing says of each token."""
  names = ("keep_BT", "score_BT", "gate_BT", "entry_BT")
  return {name: getattr(routed, name) for name in names if getattr(routed, name) is not None}


@struct.dataclass
class Packed:
  """P places for pending tokens of all slots, in order; `run_P` are in use."""

  slot_P: jax.Array
  index_P: jax.Array
  run_P: jax.Array

  def take(self, a_BS: jax.Array) -> jax.Array:
    return a_BS[self.slot_P, self.index_P]

  def put(self, a_BS: jax.Array, new_P: jax.Array) -> jax.Array:
    """`a` with new values for the tokens that run."""
    index_P = jnp.where(self.run_P, self.index_P, a_BS.shape[1])
    return a_BS.at[self.slot_P, index_P].set(new_P, mode="drop")


def pack(on_BS: jax.Array, room: int) -> Packed:
  """Where the tokens of `on_BS`, `room` at most, stand in a flat batch."""
  num_slots, size = on_BS.shape
  flat_P = jnp.nonzero(on_BS.reshape(-1), size=room, fill_value=num_slots * size)[0].astype(jnp.int32)
  return Packed(jnp.minimum(flat_P // size, num_slots - 1), flat_P % size, flat_P < num_slots * size)


def fit(need_B: jax.Array, wants_B: jax.Array, wait_B: jax.Array, room: int) -> jax.Array:
  """The slots of `wants_B` whose `need_B` tokens have room together; who has waited longest comes first."""
  order_B = jnp.argsort(-wait_B, stable=True)
  end_B = jnp.cumsum(jnp.where(wants_B, need_B, 0)[order_B])
  fits_B = jnp.zeros_like(wants_B).at[order_B].set(end_B <= room, unique_indices=True)
  return wants_B & (fits_B | (need_B == 0))


def followed(rate_B: jax.Array, exited_B: jax.Array) -> jax.Array:
  """A trusting request's rate after one more look."""
  return rate_B + (exited_B - rate_B) / _PAST


def settings(mode: str, threshold: float, rate: float = FIRST_RATE, skip: int = 0) -> dict[str, np.ndarray]:
  """What a request sets of its slot's ring."""
  return dict(mode_B=np.array(exits_lib.MODES.index(mode), np.int32), threshold_B=np.array(threshold, np.float32),
              rate_B=np.array(rate, np.float32), skip_B=np.array(skip, np.int32))


def first_rate(worth: float) -> float:
  """`rate_B` of a trusting request that has not looked yet: one that falls below `worth` after eight looks in vain."""
  return worth * (1.0 - 1.0 / _PAST) ** -7.5


def replay(exit_steps: tuple[int, ...], depths: list[int], early: list[bool], worth: float) -> tuple[float, int]:
  """`rate_B` and `skip_B` of a trusting request after the tokens that it has got.

  A token has looked at the exits before its depth, and has left at the last of them if it left early.
  """
  rate, skip = np.float32(first_rate(worth)), 0
  for depth, left in zip(depths, early):
    looks = skip == 0
    skip = max(skip - 1, 0)
    checked = [step for step in exit_steps if step <= depth - (not left)] if looks else []
    for step in checked:
      exited = left and step == checked[-1]
      rate += (np.float32(exited) - rate) / np.float32(_PAST)  # as `followed`, to the bit: 1 / _PAST is exact
      if not exited and rate < np.float32(worth):
        skip = PROBE
  return float(rate), skip


def judged(rate_B: jax.Array, kept_B: jax.Array, num_B: jax.Array) -> jax.Array:
  """A verified request's rate after some more drafts."""
  return (_PAST * rate_B + kept_B) / (_PAST + num_B)


def best_length(rate_B: jax.Array, most: int, costs: exits_lib.Costs) -> jax.Array:
  """How many drafts give the most tokens for what they cost, if each is confirmed at the measured rate."""
  kept_BS = jnp.cumprod(jnp.broadcast_to(rate_B[:, None], (rate_B.shape[0], most)), axis=1)
  tokens_BS = 1.0 + jnp.cumsum(kept_BS, axis=1)
  cost_1S = (costs.full + costs.look + costs.draft * jnp.arange(1, most + 1))[None, :]
  gain_BS = tokens_BS * costs.full / cost_1S
  return jnp.where(jnp.max(gain_BS, axis=1) > 1.0, 1 + jnp.argmax(gain_BS, axis=1), 0).astype(jnp.int32)
