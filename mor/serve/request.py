"""What is asked of a model, what it answers, and how a request's tokens become text.

A request is checked when it arrives, and a wrong one is refused alone.
"""

import collections
from collections.abc import Sequence
import dataclasses
from typing import Any

from mor.data import detokenise
from mor.decode import sampling as sampling_lib
from mor.decode import slots as slots_lib
from mor.exits import policy as exits_lib

FINISH = ("", "stop", "length", "aborted")  # why a request ended, by `slots.GOES_ON` to `LIMITED`; "" goes on


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how to continue it.

  Attributes:
    prompt: token ids, at least one.
    max_tokens: new tokens at most; the context's end stops earlier.
    sampling: how tokens are chosen.
    stop_tokens: ids that end the text; they are not part of it.
    stop_strings: texts that end the text; they are not part of it.
    logprobs: whether to compute each token's log-probability.
    exit: what an early exit means, one of `exits.MODES`; needs an engine with exits.
    threshold: a confidence above it exits, in [0, 1]; None is the engine's.
  """

  prompt: tuple[int, ...]
  max_tokens: int = 64
  sampling: sampling_lib.Sampling = sampling_lib.Sampling()
  stop_tokens: tuple[int, ...] = ()
  stop_strings: tuple[str, ...] = ()
  logprobs: bool = False
  exit: str = "none"
  threshold: float | None = None

  def check(self, vocab_size: int, context: int) -> None:
    """Refuses what cannot be run.

    Raises:
      ValueError: says what, the value and the remedy.
    """
    if not self.prompt:
      raise ValueError("the prompt is empty; give at least one token (a tokenizer's end-of-text token opens a text)")
    wrong = [t for t in self.prompt if not _is_int(t) or not 0 <= t < vocab_size]
    if wrong:
      raise ValueError(f"token {wrong[0]!r} of the prompt is not in the vocabulary; use ids 0 to {vocab_size - 1}")
    if not _is_int(self.max_tokens) or self.max_tokens < 1:
      raise ValueError(f"max_tokens={self.max_tokens!r}; use a count >= 1")
    if len(self.prompt) > context:
      raise ValueError(f"the prompt has {len(self.prompt)} tokens, more than the context of {context}; shorten it, or "
                       "use a larger context")
    if len(self.stop_tokens) > slots_lib.STOP_TOKENS:
      raise ValueError(f"{len(self.stop_tokens)} stop tokens; use at most {slots_lib.STOP_TOKENS}, or stop strings")
    wrong = [t for t in self.stop_tokens if not _is_int(t) or not 0 <= t < vocab_size]
    if wrong:
      raise ValueError(f"stop token {wrong[0]!r} is not in the vocabulary; use ids 0 to {vocab_size - 1}")
    if not all(isinstance(s, str) and s for s in self.stop_strings):
      raise ValueError(f"stop_strings={self.stop_strings!r}; use non-empty strings")
    if not isinstance(self.logprobs, bool):
      raise ValueError(f"logprobs={self.logprobs!r}; use True or False")
    if self.exit not in exits_lib.MODES:
      raise ValueError(f"exit={self.exit!r}; use one of {', '.join(exits_lib.MODES)}")
    is_number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
    if self.threshold is not None and not (is_number and 0 <= self.threshold <= 1):
      raise ValueError(f"threshold={self.threshold!r}; use None, or a confidence in [0, 1]")
    if self.threshold is not None and self.exit == "none":
      raise ValueError(f"threshold={self.threshold!r} with exit='none'; use exit='trust' or 'verify', or leave it out")

  def limit(self, context: int) -> int:
    """Returns the greatest number of new tokens: the last one need not be read, so it may lie past the context."""
    return min(self.max_tokens, context - len(self.prompt) + 1)


@dataclasses.dataclass
class Completion:
  """What a request has got so far.

  Attributes:
    tokens: new tokens, the stopping one left out.
    depths: recursion steps taken to predict each new token, that is of the token
      before it.
    early: whether an exit chose each new token; never of a request that is verified, whose
      tokens and depths are the full depth's.
    logprobs: of each new token, where asked for.
    text: the new text, as it goes on after the prompt, up to a stop string; "" without a tokenizer.
    finish: "" while it goes on, "stop", "length" or "aborted".
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  depths: list[int] = dataclasses.field(default_factory=list)
  early: list[bool] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  text: str = ""
  finish: str = ""


@dataclasses.dataclass(frozen=True)
class Event:
  """One new token, as a stream hands it out.

  Attributes:
    token: its id; None where only text or the end is new.
    text: text that is certain now: whole characters, and no beginning of a stop string.
    depth: recursion steps taken to predict it.
    logprob: where asked for.
    finish: as in `Completion`.
    early: the same.
  """

  token: int | None
  text: str
  depth: int
  logprob: float | None
  finish: str
  early: bool = False


class Follower:
  """Turns a request's tokens into a completion and into events."""

  def __init__(self, request: Request, tokenizer: Any):
    if request.stop_strings and tokenizer is None:
      raise ValueError("stop_strings need a tokenizer; give one, or use stop_tokens")
    self.request = request
    self.completion = Completion()
    self.events: collections.deque[Event] | None = None  # where a stream wants them
    self._detokeniser = detokenise.Detokeniser(tokenizer.decode, request.prompt) if tokenizer is not None else None
    self._held = ""  # text that may belong to a stop string

  def add(self, token: int, depth: int, logprob: float, finish: str, early: bool = False) -> Event:
    """Takes the next token; `finish` is what the device says of it."""
    done, text = self.completion, ""
    stopped = finish == "stop" and token in self.request.stop_tokens
    if not stopped:
      done.tokens.append(token)
      done.depths.append(depth)
      done.early.append(early)
      if self.request.logprobs:
        done.logprobs.append(logprob)
      if self._detokeniser is not None:
        text = self._detokeniser.add(token)
    done.finish = finish
    text = self._release(text, self.request.stop_strings)
    return self._tell(Event(None if stopped else token, text, depth, logprob if self.request.logprobs else None,
                            done.finish, early))

  def end(self, finish: str) -> Event:
    """Ends the request from outside."""
    self.completion.finish = finish
    return self._tell(Event(None, self._release("", ()), 0, None, finish))

  def _tell(self, event: Event) -> Event:
    if self.events is not None:
      self.events.append(event)
    return event

  def _release(self, text: str, stops: tuple[str, ...]) -> str:
    """Takes text, and returns what no later token can change; a stop string ends the request."""
    done = self.completion
    held = self._held + text
    whole = held + (self._detokeniser.held if self._detokeniser is not None else "")
    end = min((i for i in (whole.find(stop) for stop in stops) if i >= 0), default=None)
    if end is not None:
      done.finish = "stop"
    elif done.finish:
      end = len(whole)
    else:
      end = min((_overlap(held, stop) for stop in stops), default=len(held))
    new, self._held = whole[:end], held[end:]
    # One reference, so that Python appends in place: a copy for each token would grow with the text.
    grown, done.text = done.text, ""
    grown += new
    done.text = grown
    return new


def make(prompt: Sequence[int], /, **fields: Any) -> Request:
  """Returns a request made of keyword arguments of `Request` and `Sampling` together."""
  names = {field.name for field in dataclasses.fields(sampling_lib.Sampling)}
  known = names | {field.name for field in dataclasses.fields(Request)} - {"prompt", "sampling"}
  unknown = sorted(set(fields) - known)
  if unknown:
    raise ValueError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
  for name in ("stop_tokens", "stop_strings"):
    if not isinstance(fields.get(name, ()), (list, tuple)):
      raise ValueError(f"{name}={fields[name]!r}; use a list")
  sampling = sampling_lib.Sampling(**{k: v for k, v in fields.items() if k in names})
  rest = {k: tuple(v) if k.startswith("stop_") else v for k, v in fields.items() if k not in names}
  return Request(prompt=tuple(int(t) if hasattr(t, "item") else t for t in prompt), sampling=sampling, **rest)


def _is_int(x: Any) -> bool:
  return isinstance(x, int) and not isinstance(x, bool)


def _overlap(text: str, stop: str) -> int:
  """Returns where a beginning of `stop` at the end of `text` starts; the text's end without one."""
  for size in range(min(len(stop) - 1, len(text)), 0, -1):
    if text.endswith(stop[:size]):
      return len(text) - size
  return len(text)
