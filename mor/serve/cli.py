"""`--mode=generate`: prompts of a command line or of a file, through the engine.

A single prompt streams to a terminal as it comes. A file gives one JSON object for
each of its prompts, in their order, as soon as they are done; a wrong prompt of a
file fails alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from mor import depth as depth_lib
from mor.data import lines as lines_lib
from mor.exits import policy as exits_lib
from mor.serve import engine as engine_lib
from mor.serve import generate as generate_lib
from mor.serve import model as model_lib
from mor.serve import request as request_lib

_MOST_SLOTS = 16  # where none are asked for

Run = Callable[[Sequence[request_lib.Request], "Watch"], list[request_lib.Completion]]
Check = Callable[[request_lib.Request], Any]


class Watch:
  """Sees every new token: when the first ones came, and how deep they are.

  Args:
    stream: whether to print the text as it comes.
    done: called with the number and the completion of each request that ends.
  """

  def __init__(self, stream: bool = False, done: Callable[[int, request_lib.Completion], None] | None = None):
    self.done = done or (lambda index, completion: None)
    self._stream = stream
    self._start = 0.0
    self._first: dict[int, float] = {}
    self._depths: list[int] = []

  def start(self) -> None:
    """Starts the clock, once everything is compiled."""
    self._start = time.monotonic()

  def event(self, index: int, event: request_lib.Event) -> None:
    """Takes a new token of request `index`."""
    self._first.setdefault(index, time.monotonic() - self._start)
    self._depths.append(event.depth)
    if self._stream:
      print(event.text, end="", flush=True)

  def figures(self, completions: Sequence[request_lib.Completion], num_recursions: int) -> str:
    """Returns one line: tokens, their rate and depth, and the wait for the first."""
    seconds, tokens = time.monotonic() - self._start, sum(len(c.tokens) for c in completions)
    logprobs = [x for c in completions for x in c.logprobs]
    parts = [f"{tokens} tokens", f"{tokens / seconds:.1f} tokens/s",
             f"mean depth {np.mean(self._depths):.2f} of {num_recursions}",
             f"first token after {1000 * np.median(list(self._first.values())):.0f} ms"]
    if logprobs:
      parts.append(f"mean log-probability {np.mean(logprobs):.3f}")
    return ", ".join(parts)


def show(model: model_lib.Model, prompts: Sequence[str], options: Mapping[str, Any], how: Mapping[str, Any]) -> None:
  """Continues prompts; prints the texts, their tokens' depths and the speed.

  Args:
    model: to ask.
    prompts: texts.
    options: of `Engine.submit`.
    how: arguments of `Engine`; batching "none" is `Model.generate`, for any model.

  Raises:
    ValueError: a prompt, an option or `how` is wrong, and none is run; or the model fails at a prompt.
  """
  requests = [model.request(prompt, **options) for prompt in prompts]
  run, check, context = _runner(model, len(requests), how)
  for request in requests:
    check(request)
  stream = len(requests) == 1 and sys.stdout.isatty()
  if stream:
    print(prompts[0], end="", flush=True)
  watch = Watch(stream)
  completions = run(requests, watch)
  figures = watch.figures(completions, model.config.num_recursions)
  for prompt, request, completion in zip(prompts, requests, completions):
    print("" if stream else prompt + completion.text)
    print(f"\n{_by_depth(model, request, completion, context)}\n")
  print(figures)
  if errors := [completion.error for completion in completions if completion.error]:
    raise ValueError(errors[0])


def answer(model: model_lib.Model, path: str, options: Mapping[str, Any], how: Mapping[str, Any]) -> bool:
  """Continues the prompts of a file, a JSON object each; returns whether all were right.

  The figures go to stderr.

  Args:
    model: to ask.
    path: one prompt a line, or .jsonl: objects with "prompt" (text, or token ids)
      and options, which go before `options`. Blank lines count for nothing. Each line is
      read alone, so bytes that are no UTF-8 spoil only theirs.
    options: of `Engine.submit`.
    how: as in `show`.

  Raises:
    ValueError: the file holds no prompt, or `how` is wrong.
    OSError: the file cannot be read.
  """
  lines = _lines(path)
  if not lines:
    raise ValueError(f"--prompt_file={path}: no prompt in it; give one a line")
  run, check, _ = _runner(model, len(lines), how)
  answers, numbers, requests = _Answers(), [], []
  for i, line in enumerate(lines):
    prompt, request, error = _read(model, line, path.endswith(".jsonl"), options, check)
    answers.prompts.append(_echo(prompt, line))
    if request:
      numbers.append(i)
      requests.append(request)
    else:
      answers.put(i, {"error": error})
  if requests:
    watch = Watch(done=lambda index, completion: answers.put(numbers[index], _fields(requests[index], completion)))
    completions = run(requests, watch)
    print(watch.figures(completions, model.config.num_recursions), file=sys.stderr)
    return len(requests) == len(lines) and not any(completion.error for completion in completions)
  return False


def _lines(path: str) -> list[bytes]:
  """Returns the lines of a file that are not blank."""
  try:
    content = lines_lib.without_mark(pathlib.Path(path).read_bytes())
  except ValueError as error:
    raise ValueError(f"--prompt_file={path}: {error}") from error
  return [line for line in content.splitlines() if line.decode("utf-8", errors="replace").strip()]


def _fields(request: request_lib.Request, completion: request_lib.Completion) -> dict[str, Any]:
  if completion.error:
    return {"error": completion.error}
  names = ("text", "tokens", "depths", *(["logprobs"] if request.logprobs else []), "finish")
  return {name: getattr(completion, name) for name in names}


class _Answers:
  """Prints a JSON object for each prompt, in order, as soon as those before it are there."""

  def __init__(self):
    self.prompts: list[Any] = []
    self._waiting: dict[int, dict[str, Any]] = {}
    self._next = 0

  def put(self, i: int, fields: dict[str, Any]) -> None:
    self._waiting[i] = fields
    while self._next in self._waiting:
      fields = {"prompt": self.prompts[self._next], **self._waiting.pop(self._next)}
      print(json.dumps(fields, allow_nan=False), flush=True)
      self._next += 1


def _read(model: model_lib.Model, line: bytes, is_json: bool, options: Mapping[str, Any],
          check: Check) -> tuple[Any, request_lib.Request | None, str]:
  """Returns the prompt of a line, its request (None if it is wrong), and what is wrong with it."""
  prompt: Any = None
  try:
    if is_json:
      fields = lines_lib.parse(line)
      prompt = fields.pop("prompt", None)
      if not isinstance(prompt, str) and not _is_ids(prompt):
        raise ValueError('no object with a "prompt" that is text or a list of token ids')
      options = {**options, **fields}
    else:
      prompt = lines_lib.decode(line)
    if isinstance(prompt, str):
      lines_lib.check_pairs(prompt)
    request = model.request(prompt, **options)
    check(request)
    return prompt, request, ""
  except Exception as error:  # whatever a line holds, the others are answered; pylint: disable=broad-except
    return prompt, None, str(error) or type(error).__name__


def _echo(prompt: Any, line: bytes) -> str | list[int]:
  """Returns a prompt that is text or token ids, else its line, as text that is UTF-8."""
  if _is_ids(prompt):
    return prompt
  text = prompt if isinstance(prompt, str) else line.decode("utf-8", errors="replace")
  return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _is_ids(prompt: Any) -> bool:
  return isinstance(prompt, list) and all(isinstance(token, int) for token in prompt)


def read_exits(words: Mapping[str, Any]) -> dict[str, Any]:
  """Returns fields of `Exits` from the flags `--exit_…` that were given; those of `after` are words.

  Raises:
    ValueError: a layer is not a number.
  """
  if "after" not in words:
    return dict(words)
  after = words["after"]
  if not after or not all(word.strip().isdecimal() for word in after):
    raise ValueError(f"--exit_after={','.join(after)}; use numbers of layers, e.g. --exit_after=10,20")
  return {**words, "after": tuple(int(word) for word in after)}


def choose_exits(model: model_lib.Model, given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {"exits": …} for the engine, or {} for none: those of the run, changed by the flags that are given.

  Args:
    model: model with the exits that are stored with the run, if any.
    given: fields of `Exits` from flags.
    options: options of the requests; without given fields, an "exit" of trust or verify uses the stored exits.

  Raises:
    ValueError: flags name no layer and none is stored, or the exits are wrong.
  """
  stored = model.stored_exits
  if not given and (stored is None or options.get("exit", "none") == "none"):
    return {}
  fields = dict(after=stored.after, measure=stored.measure, first=stored.first) if stored else {}
  fields |= given
  if "after" not in fields:
    raise ValueError(f"--exit_{next(iter(given))} without exits; give --exit_after=LAYERS too")
  exits = exits_lib.Exits(**fields)
  uses = stored is not None and stored.fits(exits) and "threshold" not in options
  if uses and model.step != stored.step:
    print(f"the threshold of the exits was calibrated at step {stored.step}, and the model is of step {model.step}; "
          "--mode=calibrate does it again", file=sys.stderr)
  return {"exits": exits}


def _runner(model: model_lib.Model, num_requests: int, how: Mapping[str, Any]) -> tuple[Run, Check, int]:
  """Returns the function that decodes requests, one that raises where it would refuse a request, and the context."""
  if how.get("batching") != "none":
    how = how | {"devices": _read_devices(how["devices"])} if "devices" in how else how
    share = -(-num_requests * how.get("tensor", 1) // how.get("devices", how.get("tensor", 1)))
    engine = engine_lib.Engine(model, **{"num_slots": min(share, _MOST_SLOTS), **how})
    return (functools.partial(_through_engine, engine), lambda request: engine.abort(engine.submit_request(request)),
            engine.context)
  settings = {name: value for name, value in how.items() if name != "batching"}
  if "exits" in settings:
    raise ValueError("--exit_after with --batching=none, which knows no exits; leave it out, or use --batching=depth")
  for name in sorted(set(settings) - {"context", "weight_format"}):
    raise ValueError(f"--{name} with --batching=none, which runs all prompts in one batch with float32 keys; leave it "
                     "out, or use --batching=depth")
  context = settings.get("context", model.context)
  return functools.partial(_at_once, model, settings), functools.partial(_check_alone, model, context), context


def _read_devices(word: str) -> int:
  """Returns a number of devices, from the flag.

  Raises:
    ValueError: it is neither a count nor "all".
  """
  if word != "all" and not (word.isdecimal() and int(word)):
    raise ValueError(f"--devices={word}; use a count >= 1, or all")
  return jax.local_device_count() if word == "all" else int(word)


def _check_alone(model: model_lib.Model, context: int, request: request_lib.Request) -> None:
  generate_lib.check(request, model.config.vocab_size, context)


def _through_engine(engine: engine_lib.Engine, requests: Sequence[request_lib.Request],
                    watch: Watch) -> list[request_lib.Completion]:
  """Decodes requests through the engine, as slots fall free."""
  # A prompt of each length, rounded up as prefill does, compiles what the others need, on each device.
  kinds = {(len(request.prompt) - 2).bit_length(): request for request in requests}
  _serve(engine, _brief(request for request in kinds.values() for _ in engine.replicas), Watch())
  watch.start()
  return _serve(engine, requests, watch)


def _serve(engine, requests, watch):
  numbers = {engine.submit_request(request): index for index, request in enumerate(requests)}
  found: dict[int, request_lib.Completion] = {}
  while len(found) < len(requests):
    for number, event in engine.step():
      index = numbers[number]
      watch.event(index, event)
      if event.finish:
        found[index] = engine.take(number)
        watch.done(index, found[index])
  return [found[index] for index in range(len(requests))]


def _at_once(model: model_lib.Model, settings: Mapping[str, Any], requests: Sequence[request_lib.Request],
             watch: Watch) -> list[request_lib.Completion]:
  """Decodes all requests in one batch."""
  model.generate_requests(_brief(requests), **settings)
  watch.start()
  completions = model.generate_requests(requests, callback=watch.event, **settings)
  for index, completion in enumerate(completions):
    watch.done(index, completion)
  return completions


def _brief(requests: Iterable[request_lib.Request]) -> list[request_lib.Request]:
  return [dataclasses.replace(request, max_tokens=1) for request in requests]


def _by_depth(model: model_lib.Model, request: request_lib.Request, completion: request_lib.Completion,
              context: int) -> str:
  """Returns prompt and new tokens as text, each coloured by the steps that it took when it was read."""
  ids = [*request.prompt, *completion.tokens]
  depths = depth_lib.measure_ids(model.config, model.variables, np.asarray(ids, np.int32), context)
  read = len(request.prompt) - 1  # from here on the decoder itself has told
  depths[read:read + len(completion.depths)] = completion.depths
  parts = depth_lib.split_by_token(model.tokenizer, ids)
  most = max(model.config.num_recursions, int(depths.max()))  # a plain model has parts between its exits
  return depth_lib.format_terminal(parts, depths.tolist(), most, depth_lib.wants_colour())
