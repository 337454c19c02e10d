"""The head over tokens at an exit and at the full depth: what each token's successor is, and how sure an exit is."""

from flax import struct
import jax
import jax.numpy as jnp

from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import sampling
from mor.decode import slots as slots_lib
from mor.decode import variant as variant_lib
from mor.decode import weights as weights_lib
from mor.exits import confidence
from mor.exits import policy as exits_lib
from mor.exits import ring as ring_lib
from mor.model import layers


@struct.dataclass
class HeadInputs:
  """Flat tokens before a head: the newest token of each slot, then P pending ones.

  Attributes:
    slot_M: slot of each.
    need_M: whether the head must read it.
    offset_M: unconfirmed drafts of the request before it.
    check_M: whether it is at an exit, not at the full depth.
    hidden_MD: state.
    draft: token that the exit chose.
    previous: likeliest token and state of the exit before.
  """

  slot_M: jax.Array
  need_M: jax.Array
  offset_M: jax.Array
  check_M: jax.Array
  hidden_MD: jax.Array
  draft: ring_lib.Draft
  previous: tuple[jax.Array, jax.Array]


@struct.dataclass
class Read:
  """What a head says of each token: the next token, and what an exit wants to know."""

  token: jax.Array
  logprob: jax.Array
  sure: jax.Array
  top: jax.Array


def find_previous(slots: slots_lib.Slots) -> tuple[jax.Array, jax.Array]:
  """Returns the likeliest token (-1 for none) and the state of the exit before this one, or of the entrance."""
  draft = slots.ring.draft
  seen_B = draft.depth > 0
  return jnp.where(seen_B, draft.top, -1), jnp.where(seen_B[:, None], draft.hidden, slots.entry_BD)


def read(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots, inputs: HeadInputs,
         check_B: jax.Array, vocab_size: int, exits: exits_lib.Exits,
         variant: variant_lib.Variant) -> tuple[Read, Read]:
  """Returns what the head says of all tokens, and what it says of the slots at an exit.

  Args:
    decoder: the model's tables.
    weights: of the model.
    slots: whose tokens they are.
    inputs: flat tokens, of which those at an exit are not marked as needed yet.
    check_B: slots at an exit. They read the head's first rows alone, if `exits.first` says so.
    vocab_size: tokens beyond it are never drawn.
    exits: of the engine.
    variant: what the program must be able to do.
  """
  num_slots, bound_B = check_B.shape[0], ring_lib.drafts_all(slots)
  blind = exits.measure in exits_lib.NO_LOGITS
  sure_B = _measure_states(slots, exits) if blind else jnp.zeros(num_slots, jnp.float32)
  wants_B = check_B & ((sure_B > slots.ring.threshold_B) | bound_B | exits.monitor) if blind else check_B
  head_B = wants_B & bound_B if exits.first else wants_B
  need_M = inputs.need_M.at[:num_slots].max(head_B)
  whole = _read_whole(decoder, weights, slots, inputs.replace(need_M=need_M), vocab_size, exits, variant)
  at_exit = jax.tree.map(lambda a: a[:num_slots], whole)
  if exits.first:
    first_B = wants_B & ~head_B
    at_exit = control.pick_rows(first_B, _read_first(decoder, weights, slots, first_B, vocab_size, exits, variant), at_exit)
  if blind:
    at_exit = at_exit.replace(sure=sure_B, token=jnp.where(wants_B, at_exit.token, -1))
  return whole, at_exit


def _measure_states(slots, exits):
  """Returns a confidence that needs no logits."""
  at = confidence.Exit(hidden_BD=slots.h_BD, previous_hidden_BD=find_previous(slots)[1])
  return confidence.MEASURES[exits.measure](at)


def _unread(size) -> Read:
  token, real = jnp.full(size, -1, jnp.int32), jnp.zeros(size, jnp.float32)
  return Read(token, real, real, token)


def _read_whole(decoder, weights, slots, inputs, vocab_size, exits, variant) -> Read:
  """Reads the whole head, for the tokens that need it."""
  num_slots, size = slots.phase_B.shape[0], inputs.slot_M.shape[0]

  def run(index_W):
    some = jax.tree.map(lambda a: a[index_W], inputs)
    logits_WV = decoder.head(weights, some.hidden_MD)
    token_W = _draw(decoder, weights, slots, some, logits_WV, vocab_size, variant.sampling)
    return _judge_logits(slots, some, sampling.mask(logits_WV, vocab_size), token_W, vocab_size, exits, variant)

  return control.run_some(run, inputs.need_M, control.list_widths(num_slots, size), _unread(size))


def _draw(decoder, weights, slots, inputs, logits_MV, vocab_size, kind):
  """Draws the next tokens; a sampled draft is kept with the probability that makes it the full depth's sample."""
  rows_M = jax.tree.map(lambda a: a[inputs.slot_M], slots.rows)
  seen_MV = _mark_seen(slots, inputs.slot_M, inputs.offset_M, kind)
  index_M = slots.index_B[inputs.slot_M] + inputs.offset_M
  token_M = sampling.sample(logits_MV, rows_M, seen_MV, index_M, vocab_size, kind)
  drawn_M = ring_lib.drafts_all(slots)[inputs.slot_M] & ~inputs.check_M & inputs.need_M & (inputs.draft.token >= 0)

  def confirm():
    draft_MV = decoder.head(weights, inputs.draft.hidden)
    kept_M = sampling.confirm(logits_MV, draft_MV, jnp.maximum(inputs.draft.token, 0), rows_M, seen_MV, index_M,
                              vocab_size, kind)
    return jnp.where(drawn_M & (token_M >= 0), kept_M, token_M)

  return control.choose(sampling.serves(kind, "drawn"), jnp.any(drawn_M), confirm, lambda: token_M)


def _judge_logits(slots, inputs, logits_MV, token_M, vocab_size, exits, variant) -> Read:
  """Returns the tokens with what their logits say of them."""
  top_M = token_M
  if exits.monitor or exits.measure == "agreement":
    top_M = sampling.most_likely(logits_MV)
  sure_M = jnp.zeros(token_M.shape, jnp.float32)
  if exits.measure not in exits_lib.NO_LOGITS:
    at = confidence.Exit(logits_BV=logits_MV, token_B=top_M, hidden_BD=inputs.hidden_MD,
                         previous_token_B=inputs.previous[0], previous_hidden_BD=inputs.previous[1])
    sure_M = control.choose(variant.exits, jnp.any(inputs.check_M & inputs.need_M),
                            lambda: confidence.MEASURES[exits.measure](at), lambda: sure_M)
  logprob_M = control.choose(
      variant.logprobs, jnp.any(slots.logprob_B), lambda: sampling.log_probability(logits_MV, token_M, vocab_size),
      lambda: jnp.zeros(token_M.shape, jnp.float32))
  return Read(token_M, logprob_M, sure_M, top_M)


def _mark_seen(slots, slot_M, offset_M, kind):
  """Marks tokens of the request before each token, its unconfirmed drafts among them."""
  seen_MV, drafts_MS = slots.seen_BV[slot_M], slots.ring.drafts.token[slot_M]
  on_MS = jnp.arange(drafts_MS.shape[1])[None, :] < offset_M[:, None]

  def add():
    column_MS = jnp.where(on_MS, drafts_MS, seen_MV.shape[1])
    return seen_MV.at[jnp.arange(drafts_MS.shape[0])[:, None], column_MS].set(True, mode="drop")

  penalised_B = slots.rows.penalty_B != 1.0
  return control.choose(sampling.serves(kind, "filtered"), jnp.any(penalised_B), add, lambda: seen_MV)


def _read_first(decoder, weights, slots, on_B, vocab_size, exits, variant) -> Read:
  """Reads the first rows of the head alone, from whose tokens an exit chooses."""
  ring, num_slots, kind = slots.ring, slots.phase_B.shape[0], variant.sampling

  def run(index_W):
    def take(tree):
      return jax.tree.map(lambda a: a[index_W], tree)

    normed_WD = layers.rms_norm(slots.h_BD[index_W][None], weights.final_norm_D, decoder.model.norm_eps)[0]
    logits_WE = sampling.mask(weights_lib.project(normed_WD, weights.draft_head), vocab_size)
    top_W = sampling.most_likely(logits_WE)

    def draw():
      column_WE = jnp.arange(exits.first)[None, :]
      logits_WV = jnp.full((top_W.shape[0], decoder.model.vocab_size), sampling.NEVER).at[
          jnp.arange(top_W.shape[0])[:, None], column_WE].set(logits_WE, mode="drop")
      offset_W = jnp.where(ring.mode_B == ring_lib.VERIFY, ring.count_B, 0)[index_W]
      drawn_W = sampling.sample(logits_WV, take(slots.rows), _mark_seen(slots, index_W, offset_W, kind),
                                slots.index_B[index_W] + offset_W, vocab_size, kind)
      logprob_W = sampling.log_probability(logits_WV, drawn_W, vocab_size)
      return jnp.where(top_W >= 0, drawn_W, -1), logprob_W

    logprob_W = jnp.max(logits_WE, axis=-1) - jax.nn.logsumexp(logits_WE, axis=-1)
    other_B = on_B & ((slots.rows.temperature_B > 0) | (slots.rows.penalty_B != 1.0))
    token_W, logprob_W = control.choose(
        sampling.serves(kind, "drawn"), jnp.any(other_B), draw, lambda: (top_W, logprob_W))
    sure_W = jnp.zeros(top_W.shape, jnp.float32)
    if exits.measure not in exits_lib.NO_LOGITS:
      previous_W, previous_WD = take(find_previous(slots))
      sure_W = confidence.MEASURES[exits.measure](confidence.Exit(
          logits_BV=logits_WE, token_B=top_W, hidden_BD=slots.h_BD[index_W], previous_token_B=previous_W,
          previous_hidden_BD=previous_WD))
    return Read(token_W, logprob_W, sure_W, top_W)

  return control.run_some(run, on_B, control.list_widths(num_slots, num_slots), _unread(num_slots))
