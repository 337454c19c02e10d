"""The engine's slots on the device: what a request is between two ticks.

Everything is an array of static shape; admitting and freeing a slot are jitted too.
"""

import dataclasses
import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from mor import types
from mor.decode import cache as cache_lib
from mor.decode import decoder as decoder_lib
from mor.decode import sampling
from mor.decode import weights as weights_lib
from mor.exits import ring as ring_lib
from mor.model.routers import base as router_base
from mor.serve import request as request_lib

# Where a slot is: nobody's, token to start, in the recursion, token to finish, done, at an exit,
# waiting for its pending tokens to reach the full depth.
FREE, START, RUN, LEAVE, DONE, CHECK, DRAIN = range(7)


@struct.dataclass
class Slots:
  """All slots between ticks; B of them.

  Attributes:
    cache: keys and values.
    phase_B: FREE to DRAIN.
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
    ring: tokens that left early; None in an engine without exits.
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
  rows: sampling.Rows
  seen_BV: jax.Array
  stop_BE: jax.Array
  logprob_B: jax.Array
  ring: ring_lib.Ring | None = None


@struct.dataclass
class New:
  """Tokens that a part of a tick gave each slot, W at most.

  Attributes:
    token_BW: their ids, in order; -1 where none.
    depth_BW: steps that processed the token before each.
    early_BW: whether an exit chose it, unverified.
    logprob_BW: its log-probability.
    finish_B: index of `request.FINISH`, of the last of them.
    drafts_B, kept_B: drafts that the full depth has judged, and that it confirmed.
    sure_BW, agreed_BW: of a monitored exit its confidence, -1 for none, and whether its
      likeliest token was the full depth's.
  """

  token_BW: types.Array
  depth_BW: types.Array
  early_BW: types.Array
  logprob_BW: types.Array
  finish_B: types.Array
  drafts_B: types.Array
  kept_B: types.Array
  sure_BW: types.Array
  agreed_BW: types.Array


def running(slots: Slots, step: int) -> jax.Array:
  """True for the slots whose token runs that step next."""
  return (slots.phase_B == RUN) & (slots.step_B == step)


def nothing_new(decoder: decoder_lib.Decoder, num_slots: int) -> New:
  """No token for any slot; with exits one may get several at once."""
  exits = decoder.exits
  wide = num_slots, 1 + exits.places if exits else 1
  many = num_slots, wide[1] if exits and exits.monitor else 0
  return New(jnp.full(wide, -1, jnp.int32), jnp.zeros(wide, jnp.int32), jnp.zeros(wide, bool),
             jnp.zeros(wide, jnp.float32), *(jnp.zeros(num_slots, jnp.int32) for _ in range(3)),
             jnp.full(many, -1, jnp.float32), jnp.zeros(many, bool))


@struct.dataclass
class Out:
  """What K ticks did, per tick and slot; one copy to the host.

  Attributes:
    new: tokens, each array with a leading K.
    ran_KB: whether the slot took part in the stack's pass.
    stalled_KB: whether it waited for a page.
    crowded_KB: whether it waited for room in a pass, for its pending tokens.
    num_ticks: ticks that were run; the rest of the rows mean nothing.
    free, edge_free: pages left at the end.
  """

  new: New
  ran_KB: types.Array
  stalled_KB: types.Array
  crowded_KB: types.Array
  num_ticks: types.Array
  free: types.Array
  edge_free: types.Array


@struct.dataclass
class Admission:
  """A request for one slot, its prompt but the last token being stored already."""

  slot: jax.Array
  token: jax.Array
  position: jax.Array
  index: jax.Array
  left: jax.Array
  logprob: jax.Array
  rows_1: sampling.Rows
  stop_1E: jax.Array
  exit: dict[str, jax.Array]  # the ring's fields that a request sets
  seen_S: jax.Array  # tokens of the request, padded with the vocabulary's size


def make(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, num_slots: int, num_pages: int,
         num_edge_pages: int, pages_per_row: int) -> Slots:
  """Empty slots."""
  model = decoder.model
  def empty():
    int_B, bool_B = jnp.zeros(num_slots, jnp.int32), jnp.zeros(num_slots, bool)
    state_BD = jnp.zeros((num_slots, model.d_model), jnp.float32)
    routed = decoder.decide(weights, state_BD, state_BD, bool_B, int_B, int_B, (0,))
    routed = jax.tree.map(jnp.zeros_like, routed)
    return dict(phase_B=int_B, token_B=int_B, position_B=int_B, h_BD=state_BD, entry_BD=state_BD, step_B=int_B,
                depth_B=int_B, routed=routed, index_B=int_B, left_B=int_B, logprob_B=bool_B,
                ring=ring_lib.make(decoder, num_slots, routed) if decoder.exits else None)

  return Slots(
      **jax.jit(empty)(),  # jitted, so that each is a buffer of its own: they are donated
      cache=decoder.tables.make_cache(num_slots, num_pages, num_edge_pages, pages_per_row),
      rows=sampling.rows([sampling.Sampling()] * num_slots),
      seen_BV=jnp.zeros((num_slots, model.vocab_size), bool),
      stop_BE=jnp.full((num_slots, request_lib.STOP_TOKENS), -1, jnp.int32))


def admission(slot: int, request: request_lib.Request, tokens: list[int], left: int, vocab_size: int,
              exit: dict[str, np.ndarray] | None = None) -> Admission:
  """A request as arrays.

  Args:
    slot: where it goes.
    request: what was asked.
    tokens: its prompt and what it has generated before, all but the last one stored.
    left: tokens that it may still generate.
    vocab_size: of the model.
    exit: values of the ring's fields, where there are exits.
  """
  penalised = request.sampling.repetition_penalty != 1
  width = 1 << (len(tokens) - 1).bit_length() if penalised else 1  # few shapes
  seen_S = np.full(width, vocab_size, np.int32)
  if penalised:
    seen_S[:len(tokens)] = tokens
  stop_1E = np.full((1, request_lib.STOP_TOKENS), -1, np.int32)
  stop_1E[0, :len(request.stop_tokens)] = request.stop_tokens
  return Admission(
      slot=jnp.int32(slot), token=jnp.int32(tokens[-1]), position=jnp.int32(len(tokens) - 1),
      index=jnp.int32(len(tokens) - len(request.prompt)), left=jnp.int32(left), logprob=jnp.bool_(request.logprobs),
      rows_1=sampling.rows([request.sampling]), stop_1E=jnp.asarray(stop_1E),
      exit={name: jnp.asarray(value) for name, value in (exit or {}).items()}, seen_S=jnp.asarray(seen_S))


@functools.partial(jax.jit, donate_argnums=0)
def admit(slots: Slots, admission: Admission) -> Slots:
  """Gives a slot its request."""
  b = admission.slot
  put = lambda old, new: old.at[b].set(new)
  ring = slots.ring
  if ring is not None:
    ring = ring.replace(
        count_B=put(ring.count_B, 0), wait_B=put(ring.wait_B, 0),
        **{name: put(getattr(ring, name), value) for name, value in admission.exit.items()})
  seen_V = jnp.zeros(slots.seen_BV.shape[1], bool).at[admission.seen_S].set(True, mode="drop")
  return slots.replace(
      ring=ring, phase_B=put(slots.phase_B, START), token_B=put(slots.token_B, admission.token),
      position_B=put(slots.position_B, admission.position), index_B=put(slots.index_B, admission.index),
      left_B=put(slots.left_B, admission.left), logprob_B=put(slots.logprob_B, admission.logprob),
      rows=jax.tree.map(lambda old, new: put(old, new[0]), slots.rows, admission.rows_1),
      stop_BE=put(slots.stop_BE, admission.stop_1E[0]), seen_BV=put(slots.seen_BV, seen_V))


@functools.partial(jax.jit, static_argnames=("decoder",), donate_argnums=1)
def release(decoder: decoder_lib.Decoder, slots: Slots, done_B: jax.Array) -> Slots:
  """Frees slots and their pages."""
  return free(decoder, slots, done_B)


def free(decoder: decoder_lib.Decoder, slots: Slots, done_B: jax.Array) -> Slots:
  """`release` inside another program."""
  cache = decoder.tables.release(slots.cache, done_B)
  return slots.replace(cache=cache, phase_B=jnp.where(done_B, FREE, slots.phase_B))


def first(slots: Slots, num: int) -> Slots:
  """The first `num` slots alone, over the same buffers."""
  whole = {"cache", "edge", "stack", "free", "edge_free"}
  def cut(node):
    names = [field.name for field in dataclasses.fields(node) if field.name not in whole]
    return node.replace(**{name: jax.tree.map(lambda a: a[:num], getattr(node, name)) for name in names})
  return cut(slots).replace(cache=cut(slots.cache))
