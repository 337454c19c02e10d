"""How sure an exit is of its token: one number in [0, 1] a row, float32, higher is surer.

With p the softmax of the exit's logits, h its hidden state and h' the previous exit's:

  margin      p of the likeliest token - p of the second
  maximum     p of the likeliest token
  entropy     1 - H(p) / log(number of tokens)
  saturation  cos(h, h'), 0 where negative; needs no logits
  agreement   1 where the previous exit chose the same token, else 0

A row exits if its confidence > threshold, strictly: a threshold of 1 never exits.
Tokens of logit `sampling.NEVER` or -inf are no tokens (a model's vocabulary may be rounded up). A row
without a token, or with NaN, has confidence 0: dead and padded rows do no harm.

Source: CALM, arXiv:2207.07061, section 3.4 (margin, saturation); FREE, arXiv:2310.05424 (margin).
"""

from collections.abc import Callable

from flax import struct
import jax
import jax.numpy as jnp

from mor import types
from mor.decode import sampling


@struct.dataclass
class Exit:
  """What a measure may look at; only what it names has to be given.

  Attributes:
    logits_BV: float32, over the vocabulary or over its first tokens.
    token_B: id of the likeliest token.
    hidden_BD: state that the exit's logits are made of, or the one before the norm: the same at every exit.
    previous_token_B: `token_B` of the exit before; -1 where there was none.
    previous_hidden_BD: `hidden_BD` of the exit before, or of the embedding.
  """

  logits_BV: types.Array | None = None
  token_B: types.Array | None = None
  hidden_BD: types.Array | None = None
  previous_token_B: types.Array | None = None
  previous_hidden_BD: types.Array | None = None


def margin(at: Exit) -> jax.Array:
  """Returns the probability of the likeliest token less that of the second."""
  logits_BV, = _need(at, "margin", "logits_BV")
  logits_BV = logits_BV.astype(jnp.float32)
  best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  # Two reductions, not `top_k`, which sorts the vocabulary on a CPU.
  tied_B = jnp.sum(logits_BV == best_B1, axis=-1) > 1
  second_B = jnp.max(jnp.where(logits_BV < best_B1, logits_BV, -jnp.inf), axis=-1)
  lead_B = -jnp.expm1(second_B - best_B1[:, 0])
  return _unit(jnp.where(tied_B, 0.0, lead_B / _weights(logits_BV)[1]))


def maximum(at: Exit) -> jax.Array:
  """Returns the probability of the likeliest token."""
  logits_BV, = _need(at, "maximum", "logits_BV")
  return _unit(1.0 / _weights(logits_BV)[1])


def entropy(at: Exit) -> jax.Array:
  """Returns 1 if one token has all the probability, 0 if all have the same."""
  logits_BV, = _need(at, "entropy", "logits_BV")
  weight_BV, total_B = _weights(logits_BV)
  # H = log Z - sum(w log w) / Z for w = exp(logit - best) and their sum Z.
  entropy_B = jnp.log(total_B) - jnp.sum(jax.scipy.special.xlogy(weight_BV, weight_BV), axis=-1) / total_B
  num_B = jnp.sum(logits_BV > sampling.NEVER, axis=-1)
  most_B = jnp.log(jnp.maximum(num_B, 2).astype(jnp.float32))  # of one token the entropy is 0 anyway
  return _unit(1.0 - entropy_B / most_B)


def saturation(at: Exit) -> jax.Array:
  """Returns the cosine of the hidden states of this exit and the previous one; 0 if it is negative."""
  hidden_BD, previous_BD = _need(at, "saturation", "hidden_BD", "previous_hidden_BD")
  return _unit(jnp.sum(_direction(hidden_BD) * _direction(previous_BD), axis=-1))


def agreement(at: Exit) -> jax.Array:
  """Returns 1 if the previous exit chose the same token, else 0."""
  token_B, previous_B = _need(at, "agreement", "token_B", "previous_token_B")
  return ((token_B == previous_B) & (token_B >= 0)).astype(jnp.float32)


MEASURES: dict[str, Callable[[Exit], jax.Array]] = {
    "margin": margin,
    "maximum": maximum,
    "entropy": entropy,
    "saturation": saturation,
    "agreement": agreement,
}


def _need(at, measure, *names):
  """Returns the named fields."""
  missing = [name for name in names if getattr(at, name) is None]
  if missing:
    raise ValueError(f"confidence {measure!r} needs {', '.join(missing)}; give it, or use another measure")
  return [getattr(at, name) for name in names]


def _weights(logits_BV):
  """Returns exp(logit - best) and their sums, in float32; NaN for a row without a finite best."""
  logits_BV = logits_BV.astype(jnp.float32)
  weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
  return weight_BV, jnp.sum(weight_BV, axis=-1)


def _direction(hidden_BD):
  """Returns unit vectors, in float32; NaN of 0. Scales first, so that squares neither overflow nor vanish."""
  hidden_BD = hidden_BD.astype(jnp.float32)
  hidden_BD = hidden_BD / jnp.max(jnp.abs(hidden_BD), axis=-1, keepdims=True)
  return hidden_BD / jnp.linalg.norm(hidden_BD, axis=-1, keepdims=True)


def _unit(confidence_B):
  """Limits the confidence to [0, 1]; NaN becomes 0."""
  return jnp.clip(jnp.where(jnp.isnan(confidence_B), 0.0, confidence_B), 0.0, 1.0).astype(jnp.float32)
