"""How sure an exit is of its token: one number in [0, 1] a row, float32, higher is surer.

With p the softmax of the exit's logits, h its hidden state and h' the previous exit's:

  margin      p of the likeliest token - p of the second
  maximum     p of the likeliest token
  entropy     1 - H(p) / log(number of tokens)
  saturation  cos(h, h'), 0 where negative; needs no logits
  classifier  sigmoid(w h + bias), trained by `fit_classifier`; needs no logits
  agreement   1 where the previous exit chose the same token, else 0

A row exits if its confidence > threshold, strictly: a threshold of 1 never exits.
Tokens of logit -inf are no tokens (a model's vocabulary may be rounded up). A row
without a token, or with NaN, has confidence 0: dead and padded rows do no harm.

Source: CALM, arXiv:2207.07061, section 3.4 (margin, saturation, classifier); FREE,
arXiv:2310.05424 (margin). Restricted vocabulary: arXiv:2410.18952.
"""

from collections.abc import Callable

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special

from mor import types


@struct.dataclass
class Classifier:
  """The D + 1 trained numbers of the measure `classifier`."""

  weight_D: types.Array
  bias: types.Array


@struct.dataclass
class Exit:
  """What a measure may look at; only what it names has to be given.

  Attributes:
    logits_BV: float32, over the vocabulary or over the candidates of `restrict`.
    token_B: id of the likeliest token. Not the column of `logits_BV` where they are restricted.
    hidden_BD: state that the exit's logits are made of, or the one before the norm: the same at every
      exit and in `fit_classifier`.
    previous_token_B: `token_B` of the exit before; -1 where there was none.
    previous_hidden_BD: `hidden_BD` of the exit before, or of the embedding.
    classifier: see `fit_classifier`.
  """

  logits_BV: types.Array | None = None
  token_B: types.Array | None = None
  hidden_BD: types.Array | None = None
  previous_token_B: types.Array | None = None
  previous_hidden_BD: types.Array | None = None
  classifier: Classifier | None = None


def margin(at: Exit) -> jax.Array:
  """Probability of the likeliest token less that of the second."""
  logits_BV, = _need(at, "margin", "logits_BV")
  logits_BV = logits_BV.astype(jnp.float32)
  best_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
  # Two reductions, not `top_k`, which sorts the vocabulary on a CPU.
  tied_B = jnp.sum(logits_BV == best_B1, axis=-1) > 1
  second_B = jnp.max(jnp.where(logits_BV < best_B1, logits_BV, -jnp.inf), axis=-1)
  lead_B = -jnp.expm1(second_B - best_B1[:, 0])
  return _unit(jnp.where(tied_B, 0.0, lead_B / _weights(logits_BV)[1]))


def maximum(at: Exit) -> jax.Array:
  """Probability of the likeliest token."""
  logits_BV, = _need(at, "maximum", "logits_BV")
  return _unit(1.0 / _weights(logits_BV)[1])


def entropy(at: Exit) -> jax.Array:
  """1 where one token has all the probability, 0 where all have the same."""
  logits_BV, = _need(at, "entropy", "logits_BV")
  weight_BV, total_B = _weights(logits_BV)
  # H = log Z - sum(w log w) / Z for w = exp(logit - best) and their sum Z.
  entropy_B = jnp.log(total_B) - jnp.sum(jax.scipy.special.xlogy(weight_BV, weight_BV), axis=-1) / total_B
  num_B = jnp.sum(logits_BV > -jnp.inf, axis=-1)
  most_B = jnp.log(jnp.maximum(num_B, 2).astype(jnp.float32))  # of one token the entropy is 0 anyway
  return _unit(1.0 - entropy_B / most_B)


def saturation(at: Exit) -> jax.Array:
  """Cosine of this exit's and the previous exit's hidden states, 0 where it is negative."""
  hidden_BD, previous_BD = _need(at, "saturation", "hidden_BD", "previous_hidden_BD")
  return _unit(jnp.sum(_direction(hidden_BD) * _direction(previous_BD), axis=-1))


def classifier(at: Exit) -> jax.Array:
  """Sigmoid of a trained linear function of the hidden state."""
  hidden_BD, trained = _need(at, "classifier", "hidden_BD", "classifier")
  score_B = jnp.einsum("BD,D->B", hidden_BD, trained.weight_D, preferred_element_type=jnp.float32)
  return _unit(jax.nn.sigmoid(score_B + trained.bias))


def agreement(at: Exit) -> jax.Array:
  """1 where the previous exit chose the same token, else 0."""
  token_B, previous_B = _need(at, "agreement", "token_B", "previous_token_B")
  return ((token_B == previous_B) & (token_B >= 0)).astype(jnp.float32)


MEASURES: dict[str, Callable[[Exit], jax.Array]] = {
    "margin": margin,
    "maximum": maximum,
    "entropy": entropy,
    "saturation": saturation,
    "classifier": classifier,
    "agreement": agreement,
}


def restrict(hidden_BD: jax.Array, rows_BED: jax.Array, candidate_BE: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Logits of a few tokens of each row, for a confidence without the whole head.

  A token outside the candidates cannot be chosen, and its probability is left out of
  the confidence, which is therefore higher than over the vocabulary: calibrate on what is used.

  Args:
    hidden_BD: after the final norm.
    rows_BED: the candidates' rows of the output embedding.
    candidate_BE: ids, E >= 2, each once a row; negative ones are none. For example
      `jax.lax.top_k(deep_BV, E)[1]` of the row's last deep logits.

  Returns:
    logits_BE, float32 (-inf where there is no candidate), and token_B, the id of the
    greatest of them (the lowest id of a tie, as an argmax has it; -1 without a candidate).

  Raises:
    ValueError: one candidate, of which every measure is certain.
  """
  if candidate_BE.shape[1] < 2:
    raise ValueError(f"{candidate_BE.shape[1]} candidate tokens a row make every confidence 1; use 2 or more")
  present_BE = candidate_BE >= 0
  logits_BE = jnp.einsum("BD,BED->BE", hidden_BD, rows_BED, preferred_element_type=jnp.float32)
  logits_BE = jnp.where(present_BE, logits_BE, -jnp.inf)
  best_BE = (logits_BE == jnp.max(logits_BE, axis=-1, keepdims=True)) & present_BE
  none = jnp.iinfo(candidate_BE.dtype).max
  token_B = jnp.min(jnp.where(best_BE, candidate_BE, none), axis=-1)
  return logits_BE, jnp.where(token_B == none, -1, token_B).astype(jnp.int32)


def fit_classifier(hidden_MD: np.ndarray, agreed_M: np.ndarray, decay: float = 1e-3) -> Classifier:
  """Logistic regression of agreement with the full depth; both classes weigh the same.

  Minimises, in float64 from zero, so with one answer, the class-balanced cross entropy plus
  decay / 2 * |w|^2 of weights on standardised hidden states, and folds the standardisation
  back. Balanced, 0.5 is where both answers are as likely at equal numbers of each: a
  confidence to be calibrated, not the probability of agreement.

  Args:
    hidden_MD: hidden states of tokens at exits, as `Exit.hidden_BD` has them.
    agreed_M: True where the exit's token was the full depth's.
    decay: keeps weights finite where a plane separates the classes.

  Raises:
    ValueError: lengths, a class without a sample, values that are not finite, decay <= 0.

  Source: CALM, section 3.4 and appendix (per-layer cross entropy on consistency, backbone frozen).
  """
  agreed_M = np.asarray(agreed_M).astype(bool)
  hidden_MD = np.asarray(hidden_MD).astype(np.float64)
  if hidden_MD.ndim != 2 or hidden_MD.shape[:1] != agreed_M.shape:
    raise ValueError(f"hidden states {hidden_MD.shape} and agreed {agreed_M.shape} do not pair; use [M, D] and [M]")
  if not np.isfinite(hidden_MD).all():
    raise ValueError(f"{np.sum(~np.isfinite(hidden_MD).all(axis=1))} hidden states are not finite; leave them out")
  if agreed_M.all() or not agreed_M.any():
    raise ValueError(f"{agreed_M.sum()} of {len(agreed_M)} samples agree; use samples of both classes")
  if not decay > 0:
    raise ValueError(f"decay={decay!r}; use a positive number")
  mean_D = hidden_MD.mean(axis=0)
  scale_D = hidden_MD.std(axis=0)
  scale_D = np.where(scale_D > 1e-9 * np.abs(mean_D), scale_D, np.inf)  # a constant tells nothing: weight 0
  unit_MD = (hidden_MD - mean_D) / scale_D
  sign_M = np.where(agreed_M, 1.0, -1.0)
  share_M = np.where(agreed_M, 0.5 / agreed_M.sum(), 0.5 / (~agreed_M).sum())

  def loss(theta):
    score_M = sign_M * (unit_MD @ theta[:-1] + theta[-1])
    slope_M = -share_M * sign_M * scipy.special.expit(-score_M)
    value = share_M @ np.logaddexp(0.0, -score_M) + decay / 2 * theta[:-1] @ theta[:-1]
    return value, np.append(unit_MD.T @ slope_M + decay * theta[:-1], slope_M.sum())

  fit = scipy.optimize.minimize(loss, np.zeros(hidden_MD.shape[1] + 1), jac=True, method="L-BFGS-B",
                                options=dict(maxiter=2000, ftol=1e-14, gtol=1e-8))
  weight_D = fit.x[:-1] / scale_D
  return Classifier(jnp.asarray(weight_D, jnp.float32), jnp.asarray(fit.x[-1] - weight_D @ mean_D, jnp.float32))


def _need(at, measure, *names):
  """The named fields."""
  missing = [name for name in names if getattr(at, name) is None]
  if missing:
    raise ValueError(f"confidence {measure!r} needs {', '.join(missing)}; give it, or use another measure")
  return [getattr(at, name) for name in names]


def _weights(logits_BV):
  """exp(logit - best) and their sums, in float32; NaN for a row without a finite best."""
  logits_BV = logits_BV.astype(jnp.float32)
  weight_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
  return weight_BV, jnp.sum(weight_BV, axis=-1)


def _direction(hidden_BD):
  """Unit vectors, in float32; NaN of 0. Scaled first, so that squares neither overflow nor vanish."""
  hidden_BD = hidden_BD.astype(jnp.float32)
  hidden_BD = hidden_BD / jnp.max(jnp.abs(hidden_BD), axis=-1, keepdims=True)
  return hidden_BD / jnp.linalg.norm(hidden_BD, axis=-1, keepdims=True)


def _unit(confidence_B):
  """Within [0, 1]; 0 for what is not a number."""
  return jnp.clip(jnp.where(jnp.isnan(confidence_B), 0.0, confidence_B), 0.0, 1.0).astype(jnp.float32)
