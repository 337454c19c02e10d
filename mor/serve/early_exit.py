"""The host's part of early exit: what an engine accepts, how a request starts, whether drafts pay."""

import collections
from collections.abc import Sequence
import dataclasses

import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor import fields as fields_lib
from mor.exits import calibration
from mor.exits import policy as exits_lib
from mor.exits import ring as ring_lib
from mor.exits import stored as stored_lib
from mor.serve import request as request_lib

_START = 5  # dispatches that draft before the other side is tried
_TRIAL = 8  # dispatches of a trial, at most
_FIRST, _MOST = 32, 8192  # dispatches between trials
_SEEN = 64  # dispatches that speak for a side
_QUIET = 2  # dispatches of a side without a prompt beside them that suffice
_BETTER = 1.02  # what a side has to gain to take over


def check(exits: exits_lib.Exits | None, model: config_lib.ModelConfig, batching: str,
          calibrator: calibration.Calibrator | None) -> None:
  """Refuses what does not go together.

  Raises:
    ValueError: says what, the value and the remedy.
  """
  if exits is not None and not isinstance(exits, exits_lib.Exits):
    raise ValueError(f"exits={fields_lib.show(exits)}; give Exits(after=(…,)) of mor.exits.policy, or None")
  if calibrator is not None and not isinstance(calibrator, calibration.Calibrator):
    raise ValueError(f"calibrator={fields_lib.show(calibrator)}; give a Calibrator of mor.exits.calibration, or None")
  if exits is None:
    if calibrator is not None:
      raise ValueError("calibrator is given but exits=None; give exits too, or leave it out")
    return
  if batching != "depth":
    raise ValueError(f"batching={batching!r} with exits; use 'depth', or exits=None")
  exits.check(model)


def resolve(exits: exits_lib.Exits | None, request: request_lib.Request,
            calibrator: calibration.Calibrator | None,
            stored: stored_lib.StoredExits | None = None) -> request_lib.Request:
  """Returns the request with the threshold that it will keep: its own, the calibrator's, or the stored one.

  A draft of `verify` changes no text, so it takes a constant where nothing was calibrated for these exits.

  Raises:
    ValueError: the engine cannot do what it asks for.
  """
  if request.exit == "none":
    return request
  if exits is None:
    raise ValueError(f"exit={request.exit!r}, but the engine has no exits; make it with exits=Exits(after=…), or use "
                     "exit='none'")
  if request.exit == "verify" and exits.kv != "exact":
    raise ValueError(f"exit='verify' with exits.kv={exits.kv!r}, whose entries are approximate; use kv='exact', or "
                     "exit='trust'")
  if request.threshold is not None:
    return request
  if calibrator is not None:
    return dataclasses.replace(request, threshold=calibrator.threshold)
  if stored is not None and stored.fits(exits):
    return dataclasses.replace(request, threshold=stored.threshold)
  if request.exit == "trust" and stored is not None:
    raise ValueError(f"the stored threshold {stored.threshold:.4g} was calibrated for {stored.command()}; give these "
                     "exits, give a threshold, or calibrate the exits that you give with --mode=calibrate")
  if request.exit == "trust":
    raise ValueError("exit='trust' without a threshold would change the text by an unknown amount; give threshold=…, "
                     "give the engine a calibrator, or calibrate the run with --mode=calibrate")
  return dataclasses.replace(request, threshold=exits_lib.VERIFY_THRESHOLD)


def set_fields(setup: exits_lib.Setup, followers: Sequence[request_lib.Follower], num_rows: int) -> dict[str, np.ndarray]:
  """Returns the ring's fields of requests that start, or start again after a preemption, padded to `num_rows`."""
  def column(dtype):
    return np.zeros(num_rows, dtype)

  fields = dict(mode_B=column(np.int32), threshold_B=column(np.float32), rate_B=column(np.float32), skip_B=column(np.int32))
  for g, follower in enumerate(followers):
    request, done, rate, skip = follower.request, follower.completion, ring_lib.FIRST_RATE, 0
    if request.exit == "trust":
      rate, skip = replay(setup.steps, done.depths, done.early, setup.costs.worth)
    row = dict(mode_B=exits_lib.MODES.index(request.exit), threshold_B=request.threshold or 0.0, rate_B=rate, skip_B=skip)
    for name, value in row.items():
      fields[name][g] = value
  return fields


def first_rate(worth: float) -> float:
  """Returns `rate_B` of a trusting request that has not looked yet: eight looks in vain take it below `worth`."""
  return worth * (1.0 - 1.0 / ring_lib.PAST) ** -7.5


def replay(exit_steps: tuple[int, ...], depths: list[int], early: list[bool], worth: float) -> tuple[float, int]:
  """Returns `rate_B` and `skip_B` of a trusting request after the tokens that it has got.

  A token has looked at the exits before its depth, and has left at the last of them if it left early.
  """
  rate, skip = np.float32(first_rate(worth)), 0
  for depth, left in zip(depths, early):
    looks = skip == 0
    skip = max(skip - 1, 0)
    checked = [step for step in exit_steps if step <= depth - (not left)] if looks else []
    for step in checked:
      exited = left and step == checked[-1]
      # As `ring.follow_rate`, to the bit: 1 / PAST is exact.
      rate += (np.float32(exited) - rate) / np.float32(ring_lib.PAST)
      if not exited and rate < np.float32(worth):
        skip = ring_lib.PROBE
  return float(rate), skip


def drafts_greedily(request: request_lib.Request) -> bool:
  """Returns True if a request has the same tokens with drafts and without; sampled tokens depend on the drafts."""
  return request.exit == "verify" and request.sampling.temperature == 0


def drafts_pay(costs: exits_lib.ExitCosts, pending: int) -> bool:
  """Returns True if drafts are expected to pay, before any was judged."""
  return int(ring_lib.best_length(jnp.array([ring_lib.FIRST_RATE]), pending, costs)[0]) > 0


class Pace:
  """Decides whether greedy `verify` requests draft, by which side gave more tokens a second.

  Their tokens are the same either way. The other side is tried now and then, the rarer
  the longer one side keeps winning, and not for long if it is clearly worse.

  Args:
    drafts: whether it begins with them.
  """

  def __init__(self, drafts: bool = True):
    self._draft, self._left, self._exploit = drafts, _START, _FIRST
    self._trial = False  # of the other side
    self._seen: dict[bool, collections.deque[tuple[int, float, bool]]] = {
        side: collections.deque(maxlen=_SEEN) for side in (False, True)}

  def next(self) -> bool:
    """Returns True if the next dispatch drafts."""
    if self._left == 0 or (self._trial and self._hopeless()):
      self._turn()
    self._left -= 1
    return self._draft

  def saw(self, drafted: bool, tokens: int, seconds: float, alone: bool = True) -> None:
    """Takes the results of a dispatch.

    If requests are short, a prompt is read beside most dispatches. Such dispatches count
    if either side has too few without one: both sides read the same prompts.

    Args:
      drafted: whether it drafted.
      tokens: new tokens.
      seconds: time of the dispatch.
      alone: whether no prompt was read meanwhile.
    """
    self._seen[drafted].append((tokens, seconds, alone))

  def _turn(self) -> None:
    if not self._trial:  # time to try the other side
      self._trial, self._left, self._draft = True, _TRIAL, not self._draft
      self._seen[self._draft].clear()
      return
    self._trial = False
    won = bool(self._seen[self._draft]) and self._rate(self._draft) > _BETTER * self._rate(not self._draft)
    self._exploit = _FIRST if won else min(4 * self._exploit, _MOST)
    self._left, self._draft = self._exploit, self._draft if won else not self._draft

  def _samples(self, side: bool) -> list[tuple[int, float]]:
    quiet = all(sum(alone for *_, alone in seen) >= _QUIET for seen in self._seen.values())
    return [(tokens, seconds) for tokens, seconds, alone in self._seen[side] if alone or not quiet]

  def _rate(self, side: bool) -> float:
    seen = self._samples(side)
    if not seen:
      return 0.0
    tokens_N, seconds_N = np.array(seen).T
    fair_N = seconds_N <= 5 * np.median(seconds_N)  # one that compiles says nothing
    return float(tokens_N[fair_N].sum() / seconds_N[fair_N].sum())

  def _hopeless(self) -> bool:
    return len(self._samples(self._draft)) >= 2 and self._rate(self._draft) < 0.8 * self._rate(not self._draft)
