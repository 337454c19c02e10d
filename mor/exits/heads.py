"""The head over tokens at an exit and at the full depth: what each token's successor is, and how sure an exit is."""

from flax import struct
import jax
import jax.numpy as jnp

from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import sampling
from mor.decode import slots as slots_lib
from mor.decode import weights as weights_lib
from mor.exits import confidence
from mor.exits import policy as exits_lib
from mor.exits import ring as ring_lib
from mor.model import layers


@struct.dataclass
class Flat:
  """The newest token of each slot, then P pending ones, before a head."""

  slot_M: jax.Array
  need_M: jax.Array
  offset_M: jax.Array  # unconfirmed drafts of the request before it
  check_M: jax.Array  # at an exit, not at the full depth
  hidden_MD: jax.Array
  draft: ring_lib.Draft
  previous: tuple[jax.Array, jax.Array]  # likeliest token and state of the exit before


@struct.dataclass
class Read:
  """What a head says of each token: the next token, and what an exit wants to know."""

  token: jax.Array
  logprob: jax.Array
  sure: jax.Array
  top: jax.Array


def bound(slots: slots_lib.Slots) -> jax.Array:
  """Requests whose every token has a draft, so that what is drawn depends on no choice of ours."""
  return (slots.ring.mode_B == ring_lib.VERIFY) & (slots.rows.temperature_B > 0)


def previous(slots: slots_lib.Slots) -> tuple[jax.Array, jax.Array]:
  """The likeliest token (-1 for none) and the state of the exit before this one, or of the entrance."""
  draft = slots.ring.draft
  seen_B = draft.depth > 0
  return jnp.where(seen_B, draft.top, -1), jnp.where(seen_B[:, None], draft.hidden, slots.entry_BD)


def measure(decoder: decoder_lib.Decoder, slots: slots_lib.Slots) -> jax.Array:
  """Returns the confidence of a measure that needs no logits."""
  at = confidence.Exit(hidden_BD=slots.h_BD, previous_hidden_BD=previous(slots)[1])
  return confidence.MEASURES[decoder.exits.measure](at)


def read(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, flat: Flat,
         vocab_size: int) -> Read:
  """The whole head, for the tokens that need it."""
  num_slots, size = slots.phase_B.shape[0], flat.slot_M.shape[0]
  heads = lambda index_W: _heads(decoder, weights, slots, jax.tree.map(lambda a: a[index_W], flat), vocab_size)
  return control.run_some(heads, flat.need_M, control.list_widths(num_slots, size), _unread(size))


def _unread(size) -> Read:
  whole, real = jnp.full(size, -1, jnp.int32), jnp.zeros(size, jnp.float32)
  return Read(whole, real, real, whole)


def _heads(decoder, weights, slots, flat, vocab_size) -> Read:
  exits = decoder.exits
  logits_MV = decoder.head(weights, flat.hidden_MD)
  rows_M = jax.tree.map(lambda a: a[flat.slot_M], slots.rows)
  seen_MV = _seen(slots, flat.slot_M, flat.offset_M)
  index_M = slots.index_B[flat.slot_M] + flat.offset_M
  token_M = sampling.sample(logits_MV, rows_M, seen_MV, index_M, vocab_size)

  drawn_M = bound(slots)[flat.slot_M] & ~flat.check_M & flat.need_M & (flat.draft.token >= 0)
  def confirm():
    draft_MV = decoder.head(weights, flat.draft.hidden)
    kept_M = sampling.confirm(logits_MV, draft_MV, jnp.maximum(flat.draft.token, 0), rows_M, seen_MV, index_M,
                              vocab_size)
    return jnp.where(drawn_M, kept_M, token_M)
  token_M = jax.lax.cond(jnp.any(drawn_M), confirm, lambda: token_M)

  logits_MV = sampling.mask(logits_MV, vocab_size)
  top_M = token_M
  if exits.monitor or exits.measure == "agreement":
    top_M = sampling.most_likely(logits_MV)
  sure_M = jnp.zeros(token_M.shape, jnp.float32)
  if exits.measure not in exits_lib.NO_LOGITS:
    at = confidence.Exit(logits_BV=logits_MV, token_B=top_M, hidden_BD=flat.hidden_MD, previous_token_B=flat.previous[0],
                         previous_hidden_BD=flat.previous[1])
    sure_M = jax.lax.cond(jnp.any(flat.check_M & flat.need_M),
                          lambda: confidence.MEASURES[exits.measure](at), lambda: sure_M)
  logprob_M = jax.lax.cond(
      jnp.any(slots.logprob_B), lambda: sampling.log_probability(logits_MV, token_M, vocab_size),
      lambda: jnp.zeros(token_M.shape, jnp.float32))
  return Read(token_M, logprob_M, sure_M, top_M)


def _seen(slots, slot_M, offset_M):
  """Tokens of the request before each token, its unconfirmed drafts among them."""
  seen_MV, drafts_MS = slots.seen_BV[slot_M], slots.ring.drafts.token[slot_M]
  on_MS = jnp.arange(drafts_MS.shape[1])[None, :] < offset_M[:, None]

  def add():
    column_MS = jnp.where(on_MS, drafts_MS, seen_MV.shape[1])
    return seen_MV.at[jnp.arange(drafts_MS.shape[0])[:, None], column_MS].set(True, mode="drop")
  return jax.lax.cond(jnp.any(slots.rows.penalty_B != 1.0), add, lambda: seen_MV)


def read_first(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, on_B: jax.Array,
               vocab_size: int) -> Read:
  """Reads the first rows of the head alone, from whose tokens an exit chooses."""
  exits, ring, num_slots = decoder.exits, slots.ring, slots.phase_B.shape[0]

  def run(index_W):
    take = lambda tree: jax.tree.map(lambda a: a[index_W], tree)
    normed_WD = layers.rms_norm(slots.h_BD[index_W][None], weights.final_norm_D, decoder.model.norm_eps)[0]
    logits_WE = sampling.mask(weights_lib.project(normed_WD, weights.draft_head), vocab_size)
    top_W = sampling.most_likely(logits_WE)
    logprob_W = jnp.max(logits_WE, axis=-1) - jax.nn.logsumexp(logits_WE, axis=-1)

    def draw():
      column_WE = jnp.arange(exits.first)[None, :]
      logits_WV = jnp.full((index_W.shape[0], decoder.model.vocab_size), -jnp.inf).at[
          jnp.arange(index_W.shape[0])[:, None], column_WE].set(logits_WE, mode="drop")
      offset_W = jnp.where(ring.mode_B == ring_lib.VERIFY, ring.count_B, 0)[index_W]
      drawn_W = sampling.sample(logits_WV, take(slots.rows), _seen(slots, index_W, offset_W),
                                slots.index_B[index_W] + offset_W, vocab_size)
      logprob_W = sampling.log_probability(logits_WV, drawn_W, vocab_size)
      return jnp.where(top_W >= 0, drawn_W, -1), logprob_W
    other_B = on_B & ((slots.rows.temperature_B > 0) | (slots.rows.penalty_B != 1.0))
    token_W, logprob_W = jax.lax.cond(jnp.any(other_B), draw, lambda: (top_W, logprob_W))
    sure_W = jnp.zeros(index_W.shape, jnp.float32)
    if exits.measure not in exits_lib.NO_LOGITS:
      previous_W, previous_WD = take(previous(slots))
      sure_W = confidence.MEASURES[exits.measure](confidence.Exit(
          logits_BV=logits_WE, token_B=top_W, hidden_BD=slots.h_BD[index_W], previous_token_B=previous_W,
          previous_hidden_BD=previous_WD))
    return _unread(index_W.shape[0]).replace(token=token_W, logprob=logprob_W, sure=sure_W, top=top_W)

  return control.run_some(run, on_B, control.list_widths(num_slots, num_slots), _unread(num_slots))
