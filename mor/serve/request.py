"""What is asked of a model, what it answers, and how a request's tokens become text.

A request is checked when it arrives, and a wrong one is refused alone.
"""

from collections.abc import Mapping, Set
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from mor import fields as fields_lib
from mor.data import detokenise
from mor.decode import sampling as sampling_lib
from mor.decode import slots as slots_lib
from mor.exits import policy as exits_lib

FINISH = ("", "stop", "length", "error", "aborted")  # why a request ended, by `slots.GOES_ON` to `FAILED`; "" goes on
NOT_FINITE = ("the logits are not finite (NaN or infinite): weights are damaged, or the run has diverged; use a whole "
              "checkpoint or file, or an earlier step")


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
    _check_prompt(self.prompt)
    _check_options(vars(self))
    wrong = [t for t in self.prompt if not 0 <= t < vocab_size]
    if wrong:
      raise ValueError(f"token {fields_lib.show(wrong[0])} of the prompt is not in the vocabulary; use ids 0 to "
                       f"{vocab_size - 1}")
    if len(self.prompt) > context:
      raise ValueError(f"the prompt has {len(self.prompt)} tokens, more than the context of {context}; shorten it, or "
                       "use a larger context")
    wrong = [t for t in self.stop_tokens if not 0 <= t < vocab_size]
    if wrong:
      raise ValueError(f"stop token {fields_lib.show(wrong[0])} is not in the vocabulary; use ids 0 to {vocab_size - 1}")
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
    finish: "" while it goes on, "stop", "length", "error" or "aborted".
    error: what went wrong, if finish is "error".
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  depths: list[int] = dataclasses.field(default_factory=list)
  early: list[bool] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)
  text: str = ""
  finish: str = ""
  error: str = ""


class Event(NamedTuple):
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
    self._tokenizer = tokenizer
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
    if self._detokeniser is not None:
      text = self._release(text, self.request.stop_strings)
    return Event(None if stopped else token, text, depth, logprob if self.request.logprobs else None, done.finish,
                 early)

  def end(self, finish: str, error: str = "") -> Event:
    """Ends the request from outside."""
    self.completion.finish, self.completion.error = finish, error
    return Event(None, self._release("", ()), 0, None, finish)

  def replay(self, num: int) -> "Follower":
    """Returns a follower that has taken the first `num` tokens of this one, whatever an exception left of it."""
    done, again = self.completion, Follower(self.request, self._tokenizer)
    for i in range(num):
      again.add(done.tokens[i], done.depths[i], done.logprobs[i] if self.request.logprobs else 0.0, "", done.early[i])
    return again

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


def make(prompt: Any, /, **options: Any) -> Request:
  """Returns a request made of keyword arguments of `Request` and `Sampling` together.

  Numbers and arrays of NumPy and JAX count as those of Python.

  Args:
    prompt: token ids: a list, a tuple, or an array of integers with one axis.
    **options: fields of both.

  Raises:
    ValueError: an option is unknown, or a value is wrong whatever the model.
  """
  names = {field.name for field in dataclasses.fields(sampling_lib.Sampling)}
  known = names | {field.name for field in dataclasses.fields(Request)} - {"prompt", "sampling"}
  unknown = sorted(set(options) - known)
  if unknown:
    raise ValueError(f"unknown option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
  options = {name: _plain(value) for name, value in options.items()}
  prompt = list(prompt) if isinstance(prompt, range) else _plain(prompt)
  sampling = {k: v for k, v in options.items() if k in names}
  rest = {k: v for k, v in options.items() if k not in names}
  _check_prompt(prompt)
  _check_options(rest)
  sampling_lib.check(sampling)
  rest |= {k: tuple(rest[k]) for k in ("stop_tokens", "stop_strings") if k in rest}
  return Request(prompt=tuple(prompt), sampling=sampling_lib.Sampling(**sampling), **rest)


def check_text(text: str) -> None:
  """Refuses a text that no tokenizer can read.

  Raises:
    ValueError: the text is empty, or holds a half of a surrogate pair.
  """
  if not text:
    raise ValueError("the prompt is empty; give some text")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"character {error.start} of the prompt, {text[error.start]!r}, is half of a surrogate pair, which "
                     "is no text; give text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')") from error


def check_prompts(prompts: Any) -> None:
  """Refuses what is no list of prompts.

  Raises:
    ValueError: says what to give.
  """
  if isinstance(prompts, (str, bytes)):
    raise ValueError("prompts is one text; give a list of prompts")
  if isinstance(prompts, (Mapping, Set)) or not hasattr(prompts, "__iter__"):
    raise ValueError(f"prompts={fields_lib.show(prompts)}; give a list of prompts")


def _check_prompt(prompt: Any) -> None:
  if isinstance(prompt, (bytes, bytearray)):
    raise ValueError(f"prompt={fields_lib.show(prompt)} is bytes; give text, e.g. prompt.decode('utf-8'), or token ids")
  if not isinstance(prompt, (list, tuple)):
    raise ValueError(f"prompt={fields_lib.show(prompt)}; give text, or a list of token ids")
  if not prompt:
    raise ValueError("the prompt is empty; give at least one token (a tokenizer's end-of-text token opens a text)")
  wrong = next((i for i, token in enumerate(prompt) if not _is_int(token)), None)
  if wrong is not None:
    raise ValueError(f"token {fields_lib.show(prompt[wrong])} of the prompt (at {wrong}) is no integer; give one list of "
                     "token ids")


def _check_options(options: Mapping[str, Any]) -> None:
  """Checks those of the fields of `Request` that are there, as far as that needs no model."""
  def require(name, is_right, remedy):
    if name in options and not is_right(options[name]):
      raise ValueError(f"{name}={fields_lib.show(options[name])}; use {remedy}")

  def is_list(value):
    return isinstance(value, (list, tuple))

  require("max_tokens", lambda x: _is_int(x) and x >= 1, "a count >= 1")
  require("stop_tokens", is_list, "a list")
  require("stop_tokens", lambda x: all(map(_is_int, x)), "a list of token ids")
  if len(options.get("stop_tokens", ())) > slots_lib.STOP_TOKENS:
    raise ValueError(f"{len(options['stop_tokens'])} stop tokens; use at most {slots_lib.STOP_TOKENS}, or stop strings")
  require("stop_strings", is_list, "a list")
  require("stop_strings", lambda x: all(isinstance(s, str) and s for s in x), "non-empty strings")
  require("logprobs", lambda x: isinstance(x, bool), "True or False")
  require("exit", lambda x: isinstance(x, str) and x in exits_lib.MODES, f"one of {', '.join(exits_lib.MODES)}")
  require("threshold", lambda x: x is None or (_is_int(x) or isinstance(x, float)) and 0 <= x <= 1,
          "None, or a confidence in [0, 1]")


def _plain(value: Any) -> Any:
  """Returns numbers and arrays of NumPy and JAX as those of Python, lists with them too; anything else as it is."""
  if isinstance(value, (list, tuple)):
    return [_plain(x) for x in value] if any(hasattr(x, "dtype") for x in value) else value
  if isinstance(value, (np.ndarray, np.generic, jax.Array)):
    return np.asarray(value).tolist()
  return value


def _is_int(x: Any) -> bool:
  return isinstance(x, int) and not isinstance(x, bool)


def _overlap(text: str, stop: str) -> int:
  """Returns where a beginning of `stop` at the end of `text` starts; the text's end without one."""
  for size in range(min(len(stop) - 1, len(text)), 0, -1):
    if text.endswith(stop[:size]):
      return len(text) - size
  return len(text)
