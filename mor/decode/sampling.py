"""From logits to tokens, each row with its own settings, seed and history.

Order: repetition penalty, temperature, then the three filters on the tempered
distribution: the `top_k` most likely tokens, the smallest set that holds `top_p`
of the probability, and tokens with at least `min_p` of the likeliest's. Ties at a
filter's threshold all stay. The draw inverts the cumulative distribution at one
uniform number of (seed, index of the token in the request), so a token depends on
its request alone, not on the batch, the slot or when it is run.

Thresholds are found by bisection over the bits of a float: exact, and without
sorting the vocabulary. What no row of a batch asks for is not computed: the host says
what its program must be able to do (`KINDS`), or the device looks at the rows. The likeliest
token passes every filter by definition, not by rounding, so a draw is never from nothing.

Source: nucleus sampling, Holtzman et al. 2020; min-p, Nguyen et al. 2024; the
penalty, Keskar et al. 2019 (CTRL), which divides positive logits of tokens seen in
prompt or output and multiplies negative ones.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from mor import fields
from mor import types
from mor.decode import control

_LARGEST = 1e30  # finite in float32
_LEAST_PENALTY = 1e-30  # a normal number in float32, whose inverse is finite
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)
_INFINITY = 0x7F800000  # its bits
NEVER = float(jnp.finfo(jnp.float32).min)  # logit of a token that is not drawn; finite, so that other logits must be too
NOT_FINITE = -2  # in place of a token, if a logit is not finite
KINDS = ("greedy", "drawn", "filtered")  # of settings; each can do what those before it can, and the last one penalises


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request's tokens are chosen.

  Attributes:
    temperature: 0 takes the most likely token.
    top_k: 0 is off.
    top_p: 1 is off.
    min_p: 0 is off.
    repetition_penalty: 1 is off.
    seed: of the draws.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int = 0

  def __post_init__(self):
    check(vars(self))

  @property
  def kind(self) -> str:
    """Returns the least of `KINDS` that serves these settings."""
    if self.repetition_penalty != 1:
      return "filtered"
    if self.temperature == 0:
      return "greedy"
    return "filtered" if self.top_k > 0 or self.top_p < 1 or self.min_p > 0 else "drawn"


def check(values: Mapping[str, Any]) -> None:
  """Refuses values of fields of `Sampling`.

  Raises:
    ValueError: says what, the value and the remedy.
  """
  def require(name, is_right, remedy):
    if name in values and not is_right(values[name]):
      raise ValueError(f"{name}={fields.show(values[name])}; use {remedy}")

  def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST

  def is_integer(value):
    return isinstance(value, int) and not isinstance(value, bool)

  for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
    require(name, is_number, f"a finite number, {_LARGEST} at most")
  for name in ("top_k", "seed"):
    require(name, is_integer, "an integer")
  require("temperature", lambda x: x >= 0, "0 for the most likely token, or a positive number")
  require("top_k", lambda x: 0 <= x < 2**31, "0 for off, or a positive count below 2**31")
  require("top_p", lambda x: 0 < x <= 1, "a fraction in (0, 1]")
  require("min_p", lambda x: 0 <= x <= 1, "a fraction in [0, 1]")
  require("repetition_penalty", lambda x: x >= _LEAST_PENALTY,
          f"a positive factor of {_LEAST_PENALTY} to {_LARGEST}, 1 for off")
  require("seed", lambda x: 0 <= x < 2**32, f"0 to {2**32 - 1}")


@struct.dataclass
class SamplingRows:
  """`Sampling` of B requests, on the device."""

  temperature_B: types.Array
  top_k_B: types.Array
  top_p_B: types.Array
  min_p_B: types.Array
  penalty_B: types.Array
  seed_B: types.Array


def rows(settings: list[Sampling], as_array: Callable[..., types.Array] = jnp.asarray) -> SamplingRows:
  """Stacks settings, as arrays of JAX, or of NumPy by `numpy.asarray`."""
  def column(name, dtype):
    return as_array([getattr(s, name) for s in settings], dtype)

  return SamplingRows(
      column("temperature", jnp.float32), column("top_k", jnp.int32), column("top_p", jnp.float32),
      column("min_p", jnp.float32), column("repetition_penalty", jnp.float32), column("seed", jnp.uint32))


def serves(kind: str | None, other: str) -> bool | None:
  """Returns whether a program of a kind can do what another kind asks for; None if it looks at its rows."""
  return None if kind is None else KINDS.index(kind) >= KINDS.index(other)


def sample(logits_MV: jax.Array, rows_M: SamplingRows, seen_MV: jax.Array, index_M: jax.Array,
           vocab_size: int, kind: str | None = None) -> jax.Array:
  """Draws the next token of every row.

  Args:
    logits_MV: of the model, float32.
    rows_M: settings.
    seen_MV: True for tokens of the prompt and the output so far.
    index_M: number of tokens the request has generated.
    vocab_size: tokens at and beyond it are never drawn; see `mask`.
    kind: kind of `KINDS` that serves all rows; None looks at them.

  Returns:
    Tokens; NOT_FINITE for a row with a logit that is not finite.
  """
  logits_MV = mask(logits_MV, vocab_size)
  drawn_M, penalised_M = rows_M.temperature_B > 0, rows_M.penalty_B != 1.0

  def choose():
    weighed_MV = control.choose(
        serves(kind, "filtered"), jnp.any(penalised_M), lambda: _penalise(logits_MV, rows_M.penalty_B, seen_MV),
        lambda: logits_MV)
    greedy_M = _greatest(weighed_MV)[0]
    token_M = control.choose(
        serves(kind, "drawn"), jnp.any(drawn_M),
        lambda: jnp.where(drawn_M, _draw(weighed_MV, rows_M, index_M, kind), greedy_M), lambda: greedy_M)
    return jnp.where(jnp.all(jnp.isfinite(logits_MV), axis=-1), token_M, NOT_FINITE)

  return control.choose(serves(kind, "drawn"), jnp.any(drawn_M | penalised_M), choose, lambda: most_likely(logits_MV))


def most_likely(logits_MV: jax.Array) -> jax.Array:
  """Returns the first greatest logit of each row, `[M]`; NOT_FINITE for a row with a logit that is not finite."""
  # One pass; infinity, as XLA:CPU may leave NaN out of a maximum.
  token_M, best_M = _greatest(jnp.where(jnp.isfinite(logits_MV), logits_MV, jnp.inf))
  return jnp.where(best_M == jnp.inf, NOT_FINITE, token_M)


def _greatest(x_MN):
  """Returns the index of the first greatest number of each row, and the number.

  XLA:CPU does not vectorise `argmax`. There the numbers are read once, for the greatest of each block, and the rest
  is done in one block a row, 7x faster.
  """
  if not control.adapts():
    return jnp.argmax(x_MN, axis=-1).astype(jnp.int32), jnp.max(x_MN, axis=-1)
  num, size = x_MN.shape
  block = math.gcd(size, 256)
  if block < 16 or block == size:
    return _first_greatest(x_MN)
  x_MCW = x_MN.reshape(num, -1, block)
  column_M, best_M = _first_greatest(jnp.max(x_MCW, axis=2))
  best_MW = jnp.take_along_axis(x_MCW, column_M[:, None, None], axis=1)[:, 0]
  return column_M * block + _first_greatest(best_MW)[0], best_M


def _first_greatest(x_MN):
  index_1N = jnp.arange(x_MN.shape[1], dtype=jnp.int32)[None, :]
  best_M1 = jnp.max(x_MN, axis=-1, keepdims=True)
  return jnp.min(jnp.where(x_MN == best_M1, index_1N, x_MN.shape[1] - 1), axis=-1), best_M1[:, 0]


def mask(logits_MV: jax.Array, vocab_size: int) -> jax.Array:
  """Takes tokens out that the tokenizer does not have: a model's vocabulary may be rounded up beyond it."""
  if vocab_size == logits_MV.shape[1]:
    return logits_MV
  return jnp.where(jnp.arange(logits_MV.shape[1])[None, :] < vocab_size, logits_MV, NEVER)


def log_probability(logits_MV: jax.Array, token_M: jax.Array, vocab_size: int) -> jax.Array:
  """Returns the log-probability of each row's token, under the model's own distribution."""
  logits_MV = mask(logits_MV, vocab_size)
  chosen_M = jnp.take_along_axis(logits_MV, token_M[:, None], axis=1)[:, 0]
  return chosen_M - jax.nn.logsumexp(logits_MV, axis=-1)


def _penalise(logits_MV, penalty_M, seen_MV):
  factor_M1 = penalty_M[:, None]
  return jnp.where(seen_MV, jnp.where(logits_MV > 0, logits_MV / factor_M1, logits_MV * factor_M1), logits_MV)


def _draw(logits_MV, rows_M, index_M, kind):
  return _invert(_weigh(logits_MV, rows_M, kind), _uniform(rows_M, index_M))


def _weigh(logits_MV, rows_M, kind):
  """Returns each token's weight relative to the likeliest of its row; 0 if a filter drops it."""
  best_M1 = jnp.max(logits_MV, axis=-1, keepdims=True)
  behind_MV = (best_M1 - logits_MV) / jnp.maximum(rows_M.temperature_B, _SMALLEST)[:, None]
  # A fused subtraction may leave a rounding error, of which the least temperature makes anything.
  behind_MV = jnp.where(logits_MV == best_M1, 0.0, behind_MV)
  weight_MV = jnp.exp(-behind_MV)
  filtered = (rows_M.top_k_B > 0) | (rows_M.top_p_B < 1) | (rows_M.min_p_B > 0)
  return control.choose(serves(kind, "filtered"), jnp.any(filtered), lambda: _filter(weight_MV, behind_MV, rows_M),
                        lambda: weight_MV)


def _uniform(rows_M, index_M, stream: int | None = None):
  """Draws a number of [0, 1) for each request's token; streams are independent."""
  def draw(seed, index):
    key = jax.random.fold_in(jax.random.key(seed), index)
    return jax.random.uniform(key if stream is None else jax.random.fold_in(key, stream))
  return jax.vmap(draw)(rows_M.seed_B, index_M)


def _invert(weight_MV, uniform_M):
  """Returns the token at which the cumulative weight passes a share of the whole."""
  cumulative_MV = jnp.where(weight_MV > 0, jnp.cumsum(weight_MV, axis=-1), 0.0)
  # Not the last sum: sums are rounded in an order of their own, and the last one may be of a token without weight.
  whole_M1 = jnp.max(cumulative_MV, axis=-1, keepdims=True)
  reached_MV = (cumulative_MV > uniform_M[:, None] * whole_M1) & (weight_MV > 0)
  return jnp.argmax(reached_MV, axis=-1).astype(jnp.int32)


def confirm(logits_MV: jax.Array, draft_MV: jax.Array, token_M: jax.Array, rows_M: SamplingRows, seen_MV: jax.Array,
            index_M: jax.Array, vocab_size: int, kind: str | None = None) -> jax.Array:
  """Keeps drawn tokens, or replaces them, so that what comes is drawn from the logits' distribution.

  A token x drawn from q is kept with probability min(1, p(x) / q(x)), else a token is
  drawn from max(p - q, 0): what comes is a function of p, q, seed and index, whatever
  was drafted before or after it.

  Args:
    logits_MV: of p.
    draft_MV: logits of q.
    token_M: what `sample` drew from q.
    rows_M, seen_MV, index_M, vocab_size, kind: as `sample` had them.

  Source: Leviathan et al. 2023, section 2.3; Chen et al. 2023.
  """
  p_MV, q_MV = (_probabilities(x_MV, rows_M, seen_MV, vocab_size, kind) for x_MV in (logits_MV, draft_MV))
  p_M1, q_M1 = (jnp.take_along_axis(x_MV, token_M[:, None], axis=1) for x_MV in (p_MV, q_MV))
  kept_M = _uniform(rows_M, index_M, 1) * q_M1[:, 0] < p_M1[:, 0]
  rest_MV = jnp.maximum(p_MV - q_MV, 0.0)
  rest_MV = jnp.where(jnp.sum(rest_MV, axis=-1, keepdims=True) > 0, rest_MV, p_MV)  # p = q, up to rounding
  return jnp.where(kept_M, token_M, _invert(rest_MV, _uniform(rows_M, index_M, 2)))


def _probabilities(logits_MV, rows_M, seen_MV, vocab_size, kind):
  logits_MV = mask(logits_MV, vocab_size)
  logits_MV = jnp.where((rows_M.penalty_B != 1.0)[:, None], _penalise(logits_MV, rows_M.penalty_B, seen_MV), logits_MV)
  weight_MV = _weigh(logits_MV, rows_M, kind)
  return weight_MV / jnp.sum(weight_MV, axis=-1, keepdims=True)


def _filter(weight_MV, behind_MV, rows_M):
  """Returns the weights, relative to the likeliest token's, that pass all filters; others are 0.

  The filters compare distances from the likeliest logit: at a high temperature different ones have the same weight.
  """
  top_k_M = jnp.where(rows_M.top_k_B > 0, rows_M.top_k_B, weight_MV.shape[1])
  farthest_M1 = _reach(behind_MV, jnp.int32(1), top_k_M)
  weight_MV = jnp.where(behind_MV <= farthest_M1, weight_MV, 0.0)
  needed_M = rows_M.top_p_B * jnp.sum(weight_MV, axis=-1)
  farthest_M1 = _reach(behind_MV, weight_MV, needed_M)
  farthest_M1 = jnp.where((rows_M.top_p_B < 1)[:, None], farthest_M1, jnp.inf)
  least_M1 = rows_M.min_p_B[:, None]
  farthest_M1 = jnp.minimum(farthest_M1, jnp.where(least_M1 >= 1, 0.0, -jnp.log(least_M1)))
  return jnp.where(behind_MV <= farthest_M1, weight_MV, 0.0)


def _reach(behind_MV, amount, least_M):
  """Returns the least distance `[M, 1]` within which amounts add up to `least_M`; 0 at least, infinity at most.

  An amount is one number for all tokens, or an array `[M, V]`.

  Non-negative floats order as their bits do. A turn finds one bit on a CPU, where time follows the sums, and four
  bits by 15 sums at once elsewhere, where it follows the turns.
  """
  bits_MV = jax.lax.bitcast_convert_type(behind_MV, jnp.int32)
  found_M = (_find_by_bits if control.adapts() else _find_by_digits)(bits_MV, amount, least_M)
  return jax.lax.bitcast_convert_type(jnp.minimum(found_M, _INFINITY), jnp.float32)[:, None]


def _find_by_bits(bits_MV, amount, least_M):
  """Returns the greatest number `[M]` of 31 bits below which amounts do not add up to `least_M`."""
  def bit(i, low_M):
    trial_M = low_M | (jnp.int32(1) << (30 - i))
    sum_M = jnp.sum(jnp.where(bits_MV < trial_M[:, None], amount, 0), axis=-1)
    return jnp.where(sum_M >= least_M, low_M, trial_M)

  return jax.lax.fori_loop(0, 31, bit, jnp.zeros(bits_MV.shape[0], jnp.int32))


def _find_by_digits(bits_MV, amount, least_M):
  """Returns what `_find_by_bits` does, from digits of four bits; the first has three."""
  def add(some, more):
    return [a + b for a, b in zip(some, more)]

  found_M = jnp.zeros(bits_MV.shape[0], jnp.int32)
  for shift in range(28, -1, -4):
    trials = [found_M | (digit << shift) for digit in range(1, 8 if shift == 28 else 16)]
    terms = [jnp.where(bits_MV < trial_M[:, None], amount, 0) for trial_M in trials]
    sums = jax.lax.reduce(terms, [jnp.zeros((), amount.dtype) for _ in trials], add, (1,))  # the numbers are read once
    found_M |= sum((sum_M < least_M).astype(jnp.int32) for sum_M in sums) << shift  # sums grow with the trial
  return found_M
