"""Ends a process whose steps no longer finish.

A lost machine or a deadlock in a collective leaves the others waiting without an error. The
process then says where every thread stands and ends with `HUNG`, so that whoever started the
run starts it again; it goes on from its newest checkpoint.
"""

from collections.abc import Callable
import faulthandler
import os
import sys
import threading
import time

HUNG = 76
SLACK = 10  # a first step compiles; evaluations and saves take longer than steps


class Watchdog:
  """A thread that expects a `beat` every `seconds`. Use as a context manager.

  Up to the first beat, and from a `pause` to the next, it waits `SLACK` times as long.
  """

  def __init__(self, seconds: float, step: int = 0, end: Callable[[int], None] = os._exit):
    """Sleeps until the context is entered.

    Args:
      seconds: that a step may take; 0 watches nothing.
      step: finished so far.
      end: ends the process with a status, whatever its other threads do.
    """
    self._seconds, self._end = seconds, end
    self._step, self._until = step, 0.0
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> "Watchdog":
    self.pause()
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *unused) -> None:
    self._closed.set()
    if self._seconds:
      self._thread.join()

  def beat(self, step: int) -> None:
    """Step `step` has finished."""
    self._step, self._until = step, time.monotonic() + self._seconds

  def pause(self) -> None:
    """Something that is no step begins, and may take longer."""
    self._until = time.monotonic() + SLACK * self._seconds

  def _watch(self) -> None:
    while not self._closed.wait(min(1.0, self._seconds / 4)):
      if time.monotonic() > self._until:
        print(f"error: no step has finished since step {self._step}, in train.step_timeout={self._seconds:g} s "
              f"or {SLACK} times that where it compiles, evaluates or saves; start the run again, it goes on from "
              "its newest checkpoint. Where every thread stands:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        return self._end(HUNG)
