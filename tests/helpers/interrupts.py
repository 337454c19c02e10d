"""Things that happen in the middle of an engine's step: at a line of its code, or at a time.

  with interrupts.at_line(120, interrupts.interrupt):
    engine.step()
"""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import random
import signal
import sys
from typing import Any

import pytest

from mor.serve import engine as engine_lib
from tests.helpers import serving

ROOM = str(pathlib.Path(engine_lib.__file__).parent)
# Lines at which Python looks for no signal (the guard's), or at which an exception is the caller's as of any function:
# `step` hands its result over after its turn.
APART = ("step", "busy", "call", "settle")


def interrupt(*_: Any) -> None:
  raise KeyboardInterrupt


@contextlib.contextmanager
def at_line(number: int, act: Callable[[], Any], lines: list[int] | None = None) -> Iterator[None]:
  """Acts before a line of `mor/serve` is run, the first of which is 1; counts them all in `lines`."""
  lines = [0] if lines is None else lines

  def local(frame, event, arg):
    if event == "line":
      lines[0] += 1
      if lines[0] == number:
        act()
    return local

  def enter(frame, event, arg):
    code = frame.f_code
    return local if code.co_filename.startswith(ROOM) and code.co_name not in APART else None

  before = sys.gettrace()
  sys.settrace(enter)
  try:
    yield
  finally:
    sys.settrace(before)


@contextlib.contextmanager
def at_time(seconds: float) -> Iterator[None]:
  """Interrupts the main thread by a signal after some time, if the body is not done by then."""
  inside = [True]

  def handle(*_):
    if inside[0]:
      raise KeyboardInterrupt

  before = signal.signal(signal.SIGALRM, handle)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    inside[0] = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def assert_refuses(engine: engine_lib.Engine, number: int) -> None:
  """Every call says for good that the engine was interrupted."""
  for call in (engine.step, engine.wait, lambda: engine.submit([1]), lambda: engine.stream([1]),
               lambda: engine.generate([[1]]), lambda: engine.take(number), lambda: engine.abort(number)):
    with pytest.raises(RuntimeError, match="interrupted"):
      call()
  assert engine.metrics()["requests"] >= 0


def run(engine: engine_lib.Engine, requests: list, expected: list, skip: int,
        interruption: contextlib.AbstractContextManager) -> str:
  """Runs requests, one step of which is interrupted; returns "missed", "exact" or "refused".

  Raises:
    AssertionError: a completion, or the events that `step` has returned, are not those expected.
  """
  places = {engine.submit(prompt, **options): place for place, (prompt, options) in enumerate(requests)}
  tokens, done, outcome = {number: [] for number in places}, {}, "missed"
  for turn in range(300):
    if len(done) == len(places):
      break
    events: list = []
    try:
      with interruption if turn == skip else contextlib.nullcontext():
        events = engine.step()
    except (KeyboardInterrupt, Exception) as error:  # JAX makes others of an interrupt, e.g. in a comparison
      if turn != skip:
        if not isinstance(error, RuntimeError):
          raise
        assert_refuses(engine, next(iter(places)))
        return "refused"
      outcome = "exact"
    for number, event in events:
      tokens[number] += [event.token] if event.token is not None else []
      if event.finish:
        done[number] = engine.take(number)
  assert len(done) == len(places), "an event is lost"
  while not engine.idle:
    assert not engine.step()
  for number, place in places.items():
    serving.assert_same(done[number], expected[place], requests[place])
    assert tokens[number] == expected[place].tokens
  serving.assert_all_free(engine)
  return outcome


def count_lines(engine: engine_lib.Engine, requests: list, expected: list) -> int:
  """Returns the lines that the longest of some steps runs; compiles what the requests need."""
  counts = [[0] for _ in range(6)]
  for skip, lines in enumerate(counts):
    run(engine, requests, expected, skip, at_line(0, interrupt, lines))
  return max(lines for lines, in counts)


def choose(rng: random.Random, lines: int, seconds: float) -> contextlib.AbstractContextManager:
  """Returns an interruption at a random line, or at a random time."""
  if rng.random() < 0.5:
    return at_line(rng.randint(1, lines), interrupt)
  return at_time(rng.uniform(1e-5, seconds))
