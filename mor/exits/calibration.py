"""Thresholds of early exit from pairs (confidence, did the exit's token equal the full depth's?).

A token exits if its confidence > threshold, strictly, so a threshold of 1 never exits.

  beta_mixture_paper  FREE as its code runs: equal priors, moments, 10 points; fails open
  beta_mixture        P(agreed | confidence) from a Beta of each class and the data's own class
                      prior; every confidence beyond the threshold reaches a wanted precision
  learn_then_test     P(E[loss * exits] <= delta) >= 1 - epsilon over the draw of the pairs

The last two fail closed: what the pairs do not show gives 1. They calibrate on the pairs they
get. A caller that leaves some kind of token out biases them, as FREE's code does with tokens
that do not exit while none is pending and with the tail of each sequence: give all of them.

Source: FREE, arXiv:2310.05424, util/bmm.py of its code; CALM, arXiv:2207.07061, section 3.3;
Learn then Test, arXiv:2110.01052 (Hoeffding-Bentkus p-values, fixed-sequence testing).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy  # its submodules are imported at first use

_EDGE = 1e-4  # confidences are kept this far from 0 and 1, where the density of a Beta may be infinite


def beta_mixture_paper(confidence_M: np.ndarray, agreed_M: np.ndarray) -> float:
  """Returns the threshold of FREE's code, faults included, to compare with.

  A Beta of each class by the method of moments on hard labels (its mixture is overwritten and
  no EM takes place); priors equal, whatever the data's; of 10 points 0.3 ... 0.9 as many of the
  highest are open as have a posterior > 0.4. Labels of one class only, right or wrong, give two
  equal Betas and so 0.3: everything exits. Without a sample, or with a constant confidence, 0.9.
  """
  confidence_M, agreed_M = _pairs(confidence_M, agreed_M, binary=True)
  confidence_M = np.clip(confidence_M, _EDGE, 1 - _EDGE)
  grid_M = np.linspace(0.3, 0.9, 10)
  with np.errstate(all="ignore"):  # NaN is part of it: it compares False, which closes a point
    fits = []
    for target_M in (1 - agreed_M, agreed_M):
      # Each label counts 1/2000 in the other class too, which without labels so gets this one's fit.
      weight_M = np.clip(0.2 * target_M, _EDGE, None)
      mean = np.sum(weight_M * confidence_M) / np.sum(weight_M)
      variance = np.sum(weight_M * (confidence_M - mean)**2) / np.sum(weight_M)
      alpha = mean * (mean * (1 - mean) / variance - 1)
      fits.append((alpha, alpha * (1 - mean) / mean))
    low, high = sorted(fits, key=lambda fit: fit[0] / (fit[0] + fit[1]))  # the code takes the higher mean for agreement
    density_M, other_M = (np.exp(_log_density(grid_M, *fit)) for fit in (high, low))
    num_open = np.sum(density_M / (density_M + other_M) > 0.4)
  return float(grid_M[np.clip(10 - num_open, 0, 9)])


def beta_mixture(confidence_M: np.ndarray, agreed_M: np.ndarray, precision: float = 0.9, minimum: int = 20,
                 num_points: int = 1001) -> float:
  """Returns the smallest threshold beyond which every confidence is right with the wanted precision.

  Betas by maximum likelihood under a weak prior (two samples' worth of a uniform), the class
  prior as in the data. The data must bear the fit out: at least `minimum` of them exit, and of
  those a share > precision is right. Labels of right ones only give 1 as well, as they do not
  tell where wrong ones would begin; `learn_then_test` can use them.

  It is an estimate, not a guarantee, and holds at the share of agreement of the pairs: where that
  drifts, refit (`Calibrator`).

  Args:
    confidence_M: in [0, 1]. A NaN gives 1.
    agreed_M: True or 1 where the exit's token was the full depth's.
    precision: wanted of P(agreed | confidence), in (0, 1).
    minimum: samples of each class, and of exits, below which the threshold is 1.
    num_points: of the grid in [0, 1], 200 or more.

  Raises:
    ValueError: lengths, or values outside their range.
  """
  _fraction("precision", precision)
  if minimum < 2:
    raise ValueError(f"minimum={minimum} samples of a class cannot make a fit; use 2 or more")
  if num_points < 200:
    raise ValueError(f"num_points={num_points} is too coarse; use 200 or more")
  confidence_M, agreed_M = _pairs(confidence_M, agreed_M, binary=True)
  right_M = agreed_M == 1
  num_right, num_wrong = np.sum(right_M), np.sum(~right_M)
  if np.isnan(confidence_M).any() or min(num_right, num_wrong) < minimum or np.ptp(confidence_M) < _EDGE:
    return 1.0
  fits = [_fit(confidence_M[of_M]) for of_M in (right_M, ~right_M)]
  if None in fits:
    return 1.0
  grid_M = np.linspace(0.0, 1.0, num_points)
  # The grid's own ends are no place to look at a density, and 1 itself is always closed.
  inside_M = np.clip(grid_M, _EDGE, 1 - _EDGE)
  odds_M = _log_density(inside_M, *fits[0]) - _log_density(inside_M, *fits[1]) + np.log(num_right / num_wrong)
  sure_M = odds_M > np.log(precision / (1 - precision))
  sure_M = np.logical_and.accumulate(sure_M[::-1])[::-1]
  exits_M, gain_M = _above(confidence_M, agreed_M, grid_M)
  open_M = sure_M & (exits_M >= minimum) & (gain_M > precision * exits_M)
  return float(grid_M[np.argmax(open_M)]) if open_M.any() else 1.0


def learn_then_test(confidence_M: np.ndarray, agreed_M: np.ndarray, delta: float = 0.1, epsilon: float = 0.05,
                    num_steps: int = 100) -> float:
  """Returns the smallest threshold whose risk E[loss * exits] is shown to be at most delta.

  Tests the thresholds 1, 1 - 1/num_steps, ... 0 in this order, each at level epsilon, and stops
  at the first that is not shown: with probability >= 1 - epsilon over pairs drawn like the tokens
  to come the risk of the result is at most delta. One fit; refits have that probability each.

  The risk counts all tokens, so few exits, all wrong, have a small one. Where none of the pairs that
  would exit was right, exits are worth nothing and the threshold is 1, which cannot raise the risk.

  Args:
    confidence_M: in [0, 1]. A NaN gives 1.
    agreed_M: True where the exit's token was the full depth's, or 1 - loss for a loss in [0, 1].
    delta: bound on the risk, in (0, 1).
    epsilon: probability, over the pairs, that it is broken, in (0, 1).
    num_steps: of the grid, fixed before the pairs are seen; CALM's is 20.

  Raises:
    ValueError: lengths, or values outside their range.
  """
  _fraction("delta", delta)
  _fraction("epsilon", epsilon)
  if num_steps < 1:
    raise ValueError(f"num_steps={num_steps}; use 1 or more")
  confidence_M, agreed_M = _pairs(confidence_M, agreed_M, binary=False)
  if np.isnan(confidence_M).any() or not len(agreed_M):
    return 1.0
  grid_M = np.linspace(1.0, 0.0, num_steps + 1)
  _, loss_M = _above(confidence_M, 1 - agreed_M, grid_M)
  num_shown = np.sum(p_value(loss_M, len(agreed_M), delta) <= epsilon)  # the first ones: losses only grow
  threshold = float(grid_M[max(num_shown - 1, 0)])
  return threshold if agreed_M[confidence_M > threshold].any() else 1.0


def p_value(loss_M: np.ndarray, num: int, delta: float) -> np.ndarray:
  """Returns Hoeffding-Bentkus p-values of "the risk exceeds delta".

  Args:
    loss_M: sums of the losses in [0, 1] of `num` samples each.
    num: samples, 1 or more.
    delta: the risk in question.
  """
  risk_M = np.minimum(loss_M / num, delta)
  divergence_M = scipy.special.rel_entr(risk_M, delta) + scipy.special.rel_entr(1 - risk_M, 1 - delta)
  bentkus_M = np.e * scipy.special.bdtr(np.ceil(loss_M), num, delta)
  return np.minimum(np.minimum(np.exp(-num * divergence_M), bentkus_M), 1.0)


METHODS: dict[str, Callable[..., float]] = {
    "beta_mixture_paper": beta_mixture_paper,
    "beta_mixture": beta_mixture,
    "learn_then_test": learn_then_test,
}


class Calibrator:
  """A threshold that follows the newest pairs; with one update of all pairs, an offline fit.

  It starts at what the method gives without a pair: 1, or FREE's 0.9. Until the ring has turned
  over after a drift it still holds old pairs. FREE freezes its threshold after 300 sentences (100 for
  long inputs): stop updating to do so.
  """

  def __init__(self, method: str, capacity: int = 4096, interval: int = 256, **options: Any):
    """Checks everything by name.

    Args:
      method: a name in `METHODS`.
      capacity: newest pairs kept.
      interval: pairs between fits.
      **options: of the method.

    Raises:
      ValueError: a method or option that does not exist or has a wrong value.
    """
    if method not in METHODS:
      raise ValueError(f"method={method!r}; use one of {', '.join(METHODS)}")
    if not 1 <= interval <= capacity:
      raise ValueError(f"interval={interval} is not in 1 to capacity={capacity}; use pairs between fits, all kept")
    self.method, self.capacity, self.interval, self.options = method, capacity, interval, options
    self._confidence_M, self._agreed_M = np.zeros(capacity), np.zeros(capacity)
    self._num_seen, self._num_new = 0, 0
    try:
      self.refit()
    except TypeError as error:
      raise ValueError(f"{method} has no such option: {error}; see its signature") from error

  @property
  def threshold(self) -> float:
    """Of the last fit."""
    return self._threshold

  def update(self, confidence_M: np.ndarray, agreed_M: np.ndarray) -> None:
    """Adds pairs, oldest first, and fits if `interval` of them are new.

    Every token whose full depth is known belongs here: exits checked at a sync, the tail of a
    sequence, and tokens that did not exit, pending ones before them or not.
    """
    confidence_M, agreed_M = _pairs(confidence_M, agreed_M, binary=self.method != "learn_then_test")
    num = len(agreed_M)
    kept = min(num, self.capacity)
    index_M = np.arange(self._num_seen + num - kept, self._num_seen + num) % self.capacity
    self._confidence_M[index_M], self._agreed_M[index_M] = confidence_M[num - kept:], agreed_M[num - kept:]
    self._num_seen, self._num_new = self._num_seen + num, self._num_new + num
    if self._num_new >= self.interval:
      self.refit()

  def refit(self) -> float:
    """Fits now."""
    self._threshold = METHODS[self.method](*self._kept(), **self.options)
    self._num_new = 0
    return self._threshold

  def state(self) -> dict[str, Any]:
    """Returns everything in a form that JSON can hold; see `restore`."""
    confidence_M, agreed_M = self._kept()
    return dict(method=self.method, capacity=self.capacity, interval=self.interval, options=self.options,
                confidence=[None if np.isnan(c) else c for c in confidence_M.tolist()], agreed=agreed_M.tolist(),
                num_new=self._num_new, threshold=self._threshold)

  @classmethod
  def restore(cls, state: dict[str, Any]) -> "Calibrator":
    """Returns the calibrator that a `state` describes."""
    self = cls(state["method"], state["capacity"], state["interval"], **state["options"])
    self.update(np.asarray(state["confidence"], float), np.asarray(state["agreed"], float))
    self._num_new, self._threshold = state["num_new"], state["threshold"]
    return self

  def _kept(self):
    """Returns the pairs, oldest first."""
    num = min(self._num_seen, self.capacity)
    index_M = np.arange(self._num_seen - num, self._num_seen) % self.capacity
    return self._confidence_M[index_M], self._agreed_M[index_M]


def _pairs(confidence_M, agreed_M, binary):
  """Returns both as float64, checked; NaN confidences pass, and the methods close on them."""
  confidence_M, agreed_M = np.asarray(confidence_M, np.float64), np.asarray(agreed_M, np.float64)
  if confidence_M.ndim != 1 or confidence_M.shape != agreed_M.shape:
    raise ValueError(f"{confidence_M.shape} confidences and {agreed_M.shape} labels; use two vectors of one length")
  for name, value_M in (("confidence", confidence_M), ("agreed", agreed_M)):
    wrong_M = ~((value_M >= 0) & (value_M <= 1)) & ~(np.isnan(value_M) & (name == "confidence"))
    if wrong_M.any():
      raise ValueError(f"{name} {value_M[wrong_M][0]} at {np.argmax(wrong_M)}; use values in [0, 1]")
  if binary and not np.isin(agreed_M, (0.0, 1.0)).all():
    raise ValueError("agreed is neither 0 nor 1; use labels, or learn_then_test, which takes 1 - loss")
  return confidence_M, agreed_M


def _fraction(name, value):
  if not 0 < value < 1:
    raise ValueError(f"{name}={value!r}; use a number in (0, 1)")


def _above(confidence_M, value_M, grid_M):
  """Returns the number of confidences above each point of the grid, and the sum of their values."""
  order_M = np.argsort(confidence_M)
  first_M = np.searchsorted(confidence_M[order_M], grid_M, side="right")
  suffix_M = np.append(np.cumsum(value_M[order_M][::-1])[::-1], 0.0)
  return len(value_M) - first_M, suffix_M[first_M]


def _log_density(x_M, alpha, beta):
  """Returns the log density of a Beta; NaN if its parameters are not positive and finite."""
  if not (0 < alpha < np.inf and 0 < beta < np.inf):
    return np.full(len(x_M), np.nan)
  return (alpha - 1) * np.log(x_M) + (beta - 1) * np.log1p(-x_M) - scipy.special.betaln(alpha, beta)


def _fit(confidence_M):
  """Returns alpha and beta of the greatest posterior; None if it is not found.

  The conjugate prior adds two samples whose mean log x and log(1 - x) are a uniform's, -1: there is
  one finite optimum, even of one sample or equal ones. Newton's method with Fisher's information and
  a trust region, from the moments: first-order ones stop in the narrow valley and call it success.
  """
  x_M = np.clip(confidence_M, _EDGE, 1 - _EDGE)
  mean_log_2 = np.array([np.sum(np.log(v_M)) - 2 for v_M in (x_M, 1 - x_M)]) / (len(x_M) + 2)
  psi = scipy.special.polygamma

  def loss(theta_2):
    return scipy.special.betaln(*np.exp(theta_2)) - (np.exp(theta_2) - 1) @ mean_log_2

  def slope(theta_2):
    shape_2 = np.exp(theta_2)
    return shape_2 * (psi(0, shape_2) - psi(0, shape_2.sum()) - mean_log_2)

  def curvature(theta_2):
    shape_2 = np.exp(theta_2)
    bend_22 = np.diag(psi(1, shape_2)) - psi(1, shape_2.sum())
    return shape_2[:, None] * bend_22 * shape_2[None, :]

  # Two samples of a uniform have mean 1/2 and mean square 1/3.
  mean, square = ((np.sum(v_M) + v) / (len(x_M) + 2) for v_M, v in ((x_M, 1.0), (x_M**2, 2 / 3)))
  size = mean * (1 - mean) / (square - mean**2) - 1
  fit = scipy.optimize.minimize(loss, np.log([mean * size, (1 - mean) * size]), jac=slope, hess=curvature,
                                method="trust-exact", options=dict(gtol=1e-7, maxiter=200))
  return tuple(np.exp(fit.x)) if np.abs(fit.jac).max() < 1e-5 else None
