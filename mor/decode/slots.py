"""The engine's slots on the device: what a request is between two ticks, and its phases.

Everything is an array of static shape; admitting and freeing a slot are jitted too.
Only `move` changes a phase, along `MOVES`:

  FREE   nobody's               -> START  a request is placed
  START  a token to read        -> RUN    the router keeps the token, or step 0 stores all
                                -> LEAVE  the router does not keep it
  RUN    in the recursion       -> LEAVE  done
                                -> CHECK  at an exit that it checks
  CHECK  at an exit             -> START  left early
                                -> DONE   left early with its last token
                                -> RUN    stays
  LEAVE  at the full depth      -> DRAIN  with pending tokens that are not there yet
                                -> START  next token
                                -> DONE   last token
  DRAIN  waits for them         -> LEAVE  they have arrived
  DONE   the request has ended  -> FREE   as from every phase, if the host ends a request

CHECK and DRAIN belong to engines with exits.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from mor import types
from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import packing
from mor.decode import sampling as sampling_lib
from mor.decode import weights as weights_lib
from mor.model.routers import base as router_base

ANY = FREE, START, RUN, CHECK, LEAVE, DRAIN, DONE = tuple(range(7))

# From a phase to the next, and the functions that move a slot so.
MOVES: dict[tuple[int, int], tuple[str, ...]] = {
    (FREE, START): ("decode.slots.place",),
    (START, RUN): ("decode.tick.start",),
    (START, LEAVE): ("decode.tick.start",),
    (RUN, LEAVE): ("decode.tick.settle",),
    (RUN, CHECK): ("exits.tick.arrive",),
    (CHECK, RUN): ("exits.tick.look",),
    (CHECK, START): ("exits.tick.look", "decode.tick.emit"),
    (CHECK, DONE): ("decode.tick.emit",),
    (LEAVE, DRAIN): ("exits.tick.arrive",),
    (DRAIN, LEAVE): ("exits.tick.arrive",),
    (LEAVE, START): ("decode.tick.emit",),
    (LEAVE, DONE): ("decode.tick.emit",),
} | {(phase, FREE): ("decode.slots.free",) for phase in ANY}

STOP_TOKENS = 8  # that a request may name
GOES_ON, STOPPED, LIMITED, FAILED = range(4)  # why a request ended, if it did


@struct.dataclass
class Slots:
  """All slots between ticks; B of them.

  Attributes:
    cache: keys and values.
    phase_B: FREE to DONE.
    token_B, position_B: the token that is read.
    h_BD, entry_BD: its hidden states, now and at the entrance of the recursion.
    step_B: the recursion step it runs next.
    depth_B: steps that processed it.
    routed: the router's decision for that step.
    index_B: tokens the request has generated.
    left_B: tokens it may still generate.
    rows: sampling settings.
    seen_BV: tokens of the request so far.
    stop_BE: tokens that end it, -1 for none.
    logprob_B: whether it wants log-probabilities.
    sufficed: whether every prefill has found its pages; else nothing here is of use.
    ring: what exits keep of each slot; None in an engine without exits.
  """

  cache: cache_lib.Cache
  phase_B: jax.Array
  token_B: jax.Array
  position_B: jax.Array
  h_BD: jax.Array
  entry_BD: jax.Array
  step_B: jax.Array
  depth_B: jax.Array
  routed: router_base.Routing
  index_B: jax.Array
  left_B: jax.Array
  rows: sampling_lib.SamplingRows
  seen_BV: jax.Array
  stop_BE: jax.Array
  logprob_B: jax.Array
  sufficed: jax.Array
  ring: Any = None


@struct.dataclass
class NewTokens:
  """Tokens that a tick gave each slot, W at most.

  Attributes:
    token_BW: their ids, in order; -1 where none, `sampling.NOT_FINITE` where logits are not finite.
    depth_BW: steps that processed the token before each.
    logprob_BW: log-probability of each.
    finish_B: why the last of them ended the request, GOES_ON to FAILED.
    exits: what exits tell of them; None in an engine without exits.
  """

  token_BW: types.Array
  depth_BW: types.Array
  logprob_BW: types.Array
  finish_B: types.Array
  exits: Any = None


@struct.dataclass
class Ticked:
  """What a tick did.

  Attributes:
    new: tokens.
    ran_B: whether the slot took part in a pass of the stack.
    stalled_B: whether it waited for a page.
    crowded_B: whether it waited for room in a pass, for its pending tokens.
  """

  new: NewTokens
  ran_B: types.Array
  stalled_B: types.Array
  crowded_B: types.Array


@struct.dataclass
class Out:
  """What K ticks did; `tick.repeat` packs it, so that it is one copy to the host.

  Attributes:
    ticks: each array with a leading K.
    num_ticks: ticks that were run; the rest of the arrays means nothing.
    free, edge_free: pages left at the end.
    sufficed: as in `Slots`.
  """

  ticks: Ticked
  num_ticks: types.Array
  free: types.Array
  edge_free: types.Array
  sufficed: types.Array


def move(slots: Slots, on_B: jax.Array, old: int | Sequence[int], new: int) -> Slots:
  """Moves the slots of `on_B` that are in a phase of `old` to the phase `new`, one of `MOVES`."""
  phases = (old,) if isinstance(old, int) else old
  for phase in phases:
    assert (phase, new) in MOVES, (phase, new)
  is_old_B = functools.reduce(jnp.logical_or, [slots.phase_B == phase for phase in phases])
  return slots.replace(phase_B=jnp.where(on_B & is_old_B, new, slots.phase_B))


def at_step(slots: Slots, step: int | None) -> jax.Array:
  """Marks the slots whose newest token runs that step next, or any step."""
  running_B = slots.phase_B == RUN
  return running_B if step is None else running_B & (slots.step_B == step)


def find_finish(token_B: jax.Array, stop_BE: jax.Array, left_B: jax.Array, num_B: jax.Array | int = 1) -> jax.Array:
  """Returns why a token ends its request, GOES_ON to FAILED.

  Args:
    token_B: the last of some new tokens.
    stop_BE: tokens that end the request.
    left_B: tokens that the request may generate, these included.
    num_B: how many new tokens there are.
  """
  stop_B = jnp.any(token_B[:, None] == stop_BE, axis=1)
  finish_B = jnp.where(stop_B, STOPPED, jnp.where(left_B <= num_B, LIMITED, GOES_ON))
  return jnp.where(token_B == sampling_lib.NOT_FINITE, FAILED, finish_B)


def nothing_new(num_slots: int) -> NewTokens:
  """Returns no token for any slot, in an engine without exits."""
  one = num_slots, 1
  return NewTokens(jnp.full(one, -1, jnp.int32), jnp.zeros(one, jnp.int32), jnp.zeros(one, jnp.float32),
                   jnp.zeros(num_slots, jnp.int32))


@struct.dataclass
class Admission:
  """Requests for G slots, their prompts but the last tokens being stored already.

  Attributes:
    slot_G: the slots, no two the same; the number of all slots where a row is padding.
    token_G, position_G: the token that is read.
    index_G: tokens the request has generated.
    left_G: tokens it may still generate.
    logprob_G: whether it wants log-probabilities.
    rows_G: sampling settings.
    stop_GE: tokens that end it, -1 for none.
    seen_GS: tokens of the request, padded with the vocabulary's size.
  """

  slot_G: types.Array
  token_G: types.Array
  position_G: types.Array
  index_G: types.Array
  left_G: types.Array
  logprob_G: types.Array
  rows_G: sampling_lib.SamplingRows
  stop_GE: types.Array
  seen_GS: types.Array


@dataclasses.dataclass(frozen=True)
class Start:
  """A request that starts in a slot, or starts again after a preemption.

  Attributes:
    slot: where it goes.
    tokens: its prompt and what it has generated before, all but the last one stored.
    generated: how many of them it has generated.
    left: tokens that it may still generate.
    sampling: how tokens are chosen.
    stop_tokens: ids that end it, STOP_TOKENS at most.
    logprobs: whether it wants log-probabilities.
  """

  slot: int
  tokens: Sequence[int]
  generated: int
  left: int
  sampling: sampling_lib.Sampling
  stop_tokens: Sequence[int]
  logprobs: bool


def make(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, num_slots: int, num_pages: int,
         num_edge_pages: int, pages_per_row: int) -> Slots:
  """Returns empty slots."""
  return Slots(
      **_make_empty(decoder, weights, num_slots),
      cache=decoder.tables.make_cache(num_slots, num_pages, num_edge_pages, pages_per_row),
      rows=sampling_lib.rows([sampling_lib.Sampling()] * num_slots),
      seen_BV=jnp.zeros((num_slots, decoder.model.vocab_size), bool),
      stop_BE=jnp.full((num_slots, STOP_TOKENS), -1, jnp.int32),
      sufficed=jnp.bool_(True))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _make_empty(decoder, weights, num_slots):
  """Returns most fields of empty slots; jitted, so that each is a buffer of its own: they are donated."""
  int_B, bool_B = jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots, bool)
  state_BD = jnp.zeros((num_slots, decoder.model.d_model), jnp.float32)
  routed = decoder.decide(weights, state_BD, state_BD, bool_B, int_B, int_B, (0,))
  routed = jax.tree.map(jnp.zeros_like, routed)
  return dict(phase_B=int_B, token_B=int_B, position_B=int_B, h_BD=state_BD, entry_BD=state_BD, step_B=int_B,
              depth_B=int_B, routed=routed, index_B=int_B, left_B=int_B, logprob_B=bool_B)


def make_admission(starts: Sequence[Start], num_rows: int, num_slots: int, vocab_size: int) -> Admission:
  """Returns requests as NumPy arrays.

  Args:
    starts: the requests.
    num_rows: rows of the arrays, of which those beyond the requests are padding.
    num_slots: number of all slots.
    vocab_size: vocabulary size of the model.
  """
  padding = Start(num_slots, (0,), 0, 0, sampling_lib.Sampling(), (), False)
  starts = [*starts, *[padding] * (num_rows - len(starts))]
  histories = [start.tokens if start.sampling.repetition_penalty != 1 else () for start in starts]
  width = control.ceil_power(max(map(len, histories)))  # few shapes
  seen_GS = np.full((num_rows, width), vocab_size, np.int32)
  stop_GE = np.full((num_rows, STOP_TOKENS), -1, np.int32)
  for g, start in enumerate(starts):
    seen_GS[g, :len(histories[g])] = histories[g]
    stop_GE[g, :len(start.stop_tokens)] = start.stop_tokens
  number_GX = np.array([(start.slot, start.tokens[-1], len(start.tokens) - 1, start.generated, start.left)
                        for start in starts], np.int32)
  return Admission(*number_GX.T, logprob_G=np.array([start.logprobs for start in starts]),
                   rows_G=sampling_lib.rows([start.sampling for start in starts], np.asarray), stop_GE=stop_GE, seen_GS=seen_GS)


def place(slots: Slots, admission: Admission) -> Slots:
  """Gives free slots their requests, inside another program."""
  slot_G = admission.slot_G

  def put(old, new):
    return old.at[slot_G].set(new, mode="drop")

  seen_BV = put(slots.seen_BV, False).at[slot_G[:, None], admission.seen_GS].set(True, mode="drop")
  slots = slots.replace(
      token_B=put(slots.token_B, admission.token_G), position_B=put(slots.position_B, admission.position_G),
      index_B=put(slots.index_B, admission.index_G), left_B=put(slots.left_B, admission.left_G),
      logprob_B=put(slots.logprob_B, admission.logprob_G), rows=jax.tree.map(put, slots.rows, admission.rows_G),
      stop_BE=put(slots.stop_BE, admission.stop_GE), seen_BV=seen_BV)
  return move(slots, put(jnp.zeros(slots.phase_B.shape, bool), True), FREE, START)


@functools.partial(jax.jit, donate_argnums=0)
def admit(slots: Slots, admission: packing.Words) -> Slots:
  """Gives free slots their requests; the `Admission` comes as one array."""
  return place(slots, packing.unpack(admission))


def free(decoder: decoder_lib.Decoder, slots: Slots, done_B: jax.Array) -> Slots:
  """Frees slots and their pages, inside another program."""
  return move(slots.replace(cache=decoder.tables.release(slots.cache, done_B)), done_B, ANY, FREE)


@functools.partial(jax.jit, static_argnames=("decoder",), donate_argnums=1)
def release(decoder: decoder_lib.Decoder, slots: Slots, done_B: jax.Array) -> Slots:
  """Frees slots and their pages."""
  return free(decoder, slots, done_B)


def first(slots: Slots, num: int) -> Slots:
  """Returns the first `num` slots alone, over the same buffers."""
  whole = {"cache", "edge", "stack", "free", "edge_free", "sufficed"}

  def cut(node):
    names = [field.name for field in dataclasses.fields(node) if field.name not in whole]
    return node.replace(**{name: jax.tree.map(lambda a: a[:num], getattr(node, name)) for name in names})

  return cut(slots).replace(cache=cut(slots.cache))
