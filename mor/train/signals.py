"""How a run ends before its last step: by a signal, or because its steps no longer finish.

`Stop` answers SIGINT and SIGTERM politely: the first signal lets the run save and end, a
second one interrupts it.

`Watchdog` ends a process whose steps no longer finish. A lost machine or a deadlock in a
collective leaves the other processes waiting without an error. The process then prints the
stack of every thread and ends with `HUNG`, so that whoever started the run starts it again;
it goes on from its newest checkpoint.
"""

from collections.abc import Callable, Mapping
import faulthandler
import os
import signal
import sys
import threading
import time

import jax

from mor import sharding

HUNG = 76
SLACK = 10  # a first step compiles; evaluations and saves take longer than steps


class Stop:
  """While active, the first signal only sets `requested`; a second interrupts.

  A signal reaches one process, and all stop at the same step: each gives its vote with
  a batch, the step (`train/step.py`) tells all of them whether there was one,
  and they read that with its metrics. A collective of its own could run beside the step's.
  """

  _SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __init__(self):
    self.requested = False
    self._before = {}
    self._heard = False

  def __enter__(self) -> "Stop":
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
      self._before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def vote(self, mesh: jax.sharding.Mesh, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """A batch with this process's vote; unchanged where it is the only process."""
    return batch if jax.process_count() == 1 else {**batch, "votes": sharding.put_votes(mesh, self.requested)}

  def hear(self, values: Mapping[str, float]) -> dict[str, float]:
    """Takes the result of the vote from a step's metrics; returns the others."""
    self._heard = self._heard or bool(values.get("stop"))
    return {name: value for name, value in values.items() if name != "stop"}

  def agreed(self) -> bool:
    """Whether to stop after this step, the same in every process."""
    return self.requested if jax.process_count() == 1 else self._heard

  def _handle(self, number: int, unused_frame) -> None:
    if self.requested:
      raise KeyboardInterrupt(signal.Signals(number).name)
    self.requested = True


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
