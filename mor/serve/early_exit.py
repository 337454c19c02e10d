"""The host's part of early exit: what an engine accepts, how a request starts, whether drafts pay."""

import collections
import dataclasses

import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor.decode import decoder as decoder_lib
from mor.exits import calibration
from mor.exits import policy as exits_lib
from mor.exits import ring as ring_lib
from mor.exits import tick as early_exit
from mor.serve import request as request_lib

_START = 5  # dispatches that draft before the other side is tried
_TRIAL = 8  # dispatches of a trial, at most
_FIRST, _MOST = 32, 8192  # dispatches between trials
_SEEN = 64  # dispatches that speak for a side
_QUIET = 2  # dispatches of a side without a prompt beside them that suffice
_BETTER = 1.02  # what a side has to gain to take over


def check(exits: exits_lib.Exits | None, batching: str, calibrator: calibration.Calibrator | None) -> None:
  """Refuses what does not go together.

  Raises:
    ValueError: says what, the value and the remedy.
  """
  if exits is None:
    if calibrator is not None:
      raise ValueError("calibrator is given but exits=None; give exits too, or leave it out")
  elif batching != "depth":
    raise ValueError(f"batching={batching!r} with exits; use 'depth', or exits=None")


def context(model: config_lib.ModelConfig, exits: exits_lib.Exits | None,
            num_slots: int) -> early_exit.Context | None:
  """What the device needs to know, drafts being on."""
  if exits is None:
    return None
  return early_exit.Context(jnp.bool_(True), exits_lib.costs(model, exits, num_slots))


def resolve(exits: exits_lib.Exits | None, request: request_lib.Request,
            calibrator: calibration.Calibrator | None) -> request_lib.Request:
  """The request with the threshold that it will keep.

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
  if request.exit == "trust":
    raise ValueError("exit='trust' without a threshold would change the text by an unknown amount; give threshold=…, or "
                     "give the engine a calibrator")
  return dataclasses.replace(request, threshold=exits_lib.VERIFY_THRESHOLD)


def settings(decoder: decoder_lib.Decoder, worth: float, request: request_lib.Request,
             completion: request_lib.Completion) -> dict[str, np.ndarray]:
  """The ring's fields of a request that starts, or starts again after a preemption."""
  rate, skip = ring_lib.FIRST_RATE, 0
  if request.exit == "trust":
    rate, skip = ring_lib.replay(decoder.exit_steps, completion.depths, completion.early, worth)
  return ring_lib.settings(request.exit, request.threshold or 0.0, rate, skip)


def drafts_greedily(request: request_lib.Request) -> bool:
  """Whether it has the same tokens with drafts and without; sampled ones depend on the drafts."""
  return request.exit == "verify" and request.sampling.temperature == 0


def drafts_pay(costs: exits_lib.Costs, pending: int) -> bool:
  """Whether drafts are expected to, before any was judged."""
  return int(ring_lib.best_length(jnp.array([ring_lib.FIRST_RATE]), pending, costs)[0]) > 0


class Pace:
  """Whether greedy requests that are verified draft: what gave more tokens a second.

  Their tokens are the same either way. The other side is tried now and then, the rarer
  the longer one side keeps winning, and not for long where it is clearly worse.

  Args:
    drafts: whether it begins with them.
  """

  def __init__(self, drafts: bool = True):
    self._draft, self._left, self._exploit = drafts, _START, _FIRST
    self._trial = False  # of the other side
    self._seen: dict[bool, collections.deque[tuple[int, float, bool]]] = {
        side: collections.deque(maxlen=_SEEN) for side in (False, True)}

  def next(self) -> bool:
    """For the next dispatch."""
    if self._left == 0 or (self._trial and self._hopeless()):
      self._turn()
    self._left -= 1
    return self._draft

  def saw(self, drafted: bool, tokens: int, seconds: float, alone: bool = True) -> None:
    """Results of a dispatch; `alone` is whether no prompt was read meanwhile.

    Where requests are short some prompt is read beside most dispatches. Those count
    where either side has too few of the others: both sides read the same prompts.
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
