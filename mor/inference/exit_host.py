"""The host's part of early exit: what an engine accepts, how a request starts, whether drafts pay."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor.inference import calibration
from mor.inference import confidence
from mor.inference import decoder as decoder_lib
from mor.inference import early_exit
from mor.inference import exits as exits_lib
from mor.inference import request as request_lib
from mor.inference import ring as ring_lib

_EXPLORE = 8  # dispatches of each trial
_EXPLOIT = (128, 1024)  # dispatches between trials, least and most


def check(exits: exits_lib.Exits | None, batching: str, classifier: confidence.Classifier | None,
          calibrator: calibration.Calibrator | None) -> None:
  """Refuses what does not go together.

  Raises:
    ValueError: says what, the value and the remedy.
  """
  if exits is None:
    for name, value in dict(classifier=classifier, calibrator=calibrator).items():
      if value is not None:
        raise ValueError(f"{name} is given but exits=None; give exits too, or leave it out")
    return
  if batching != "depth":
    raise ValueError(f"batching={batching!r} with exits; use 'depth', or exits=None")
  if (exits.measure == "classifier") != (classifier is not None):
    raise ValueError(f"exits.measure={exits.measure!r} and classifier={classifier}; give measure='classifier' and its "
                     "classifier together (`confidence.fit_classifier`), or neither")


def context(model: config_lib.ModelConfig, exits: exits_lib.Exits | None, num_slots: int,
            classifier: confidence.Classifier | None) -> early_exit.Context | None:
  """What the device needs to know, drafts being on."""
  if exits is None:
    return None
  return early_exit.Context(jnp.bool_(True), classifier, exits_lib.costs(model, exits, num_slots))


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
             completion: request_lib.Completion, candidate_E: np.ndarray | None) -> dict[str, np.ndarray]:
  """The ring's fields of a request that starts, or starts again after a preemption."""
  rate, skip = ring_lib.FIRST_RATE, 0
  if request.exit == "trust":
    rate, skip = ring_lib.replay(decoder.exit_steps, completion.depths, completion.early, worth)
  return ring_lib.settings(decoder.exits.candidates, request.exit, request.threshold or 0.0, rate, skip, candidate_E)


class Pace:
  """Whether requests that are verified draft: trials of both, then what gave more tokens a second.

  Their tokens are the same either way. The longer one side keeps winning, the rarer the trials.
  """

  def __init__(self):
    self._turn, self._exploit, self._best = 0, _EXPLOIT[0], True
    self._tokens = {True: 0, False: 0}
    self._seconds = {True: 0.0, False: 0.0}

  def next(self) -> bool:
    """For the next dispatch."""
    if self._turn == 2 * _EXPLORE + self._exploit:
      self._turn = 0
      self._tokens, self._seconds = {True: 0, False: 0}, {True: 0.0, False: 0.0}
    turn, self._turn = self._turn, self._turn + 1
    if turn < 2 * _EXPLORE:
      return turn < _EXPLORE
    if turn == 2 * _EXPLORE:
      self._decide()
    return self._best

  def saw(self, drafted: bool, tokens: int, seconds: float) -> None:
    """Results of a dispatch that had the device to itself."""
    self._tokens[drafted] += tokens
    self._seconds[drafted] += seconds

  def _decide(self) -> None:
    rate = {side: self._tokens[side] / self._seconds[side] if self._seconds[side] else 0.0 for side in (True, False)}
    if not all(self._seconds.values()):
      return
    best = rate[True] >= rate[False]
    self._exploit = min(2 * self._exploit, _EXPLOIT[1]) if best == self._best else _EXPLOIT[0]
    self._best = best
