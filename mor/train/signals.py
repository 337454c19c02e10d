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
  """Turns the first signal into a request to stop; a second one interrupts.

  A signal reaches one process, but all processes must stop at the same step. So each
  process sends its vote with a batch, the step (`train/step.py`) reduces the votes, and
  every process reads the result with the metrics of the step. A separate collective
  could run at the same time as those of the step.
  """

  _SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __init__(self):
    self.requested = False
    self._handlers_before = {}
    self._agreed = False

  def __enter__(self) -> "Stop":
    if threading.current_thread() is threading.main_thread():  # other threads may not set handlers
      self._handlers_before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._handlers_before.items():
      signal.signal(number, handler)

  def add_vote(self, mesh: jax.sharding.Mesh, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """Returns the batch with the vote of this process; unchanged if it is the only process."""
    return batch if jax.process_count() == 1 else {**batch, "votes": sharding.put_votes(mesh, self.requested)}

  def read_votes(self, values: Mapping[str, float]) -> dict[str, float]:
    """Removes the result of the vote from the metrics of a step, and remembers it."""
    self._agreed = self._agreed or bool(values.get("stop"))
    return {name: value for name, value in values.items() if name != "stop"}

  def should_stop(self) -> bool:
    """Returns True if the run must stop after this step; the same in every process."""
    return self.requested if jax.process_count() == 1 else self._agreed

  def _handle(self, number: int, unused_frame) -> None:
    if self.requested:
      raise KeyboardInterrupt(signal.Signals(number).name)
    self.requested = True


class Watchdog:
  """A thread that expects a `beat` every `seconds`. Use as a context manager.

  Before the first beat, and after a `pause`, it waits `SLACK` times as long.
  """

  def __init__(self, seconds: float, step: int = 0, end: Callable[[int], None] = os._exit):
    """Prepares the thread, which starts when the context is entered.

    Args:
      seconds: longest time of a step; 0 turns the watchdog off.
      step: finished steps.
      end: function that ends the process with an exit status, whatever its threads do.
    """
    self._seconds, self._end = seconds, end
    self._step, self._deadline = step, 0.0
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
    """Records that `step` has finished, and waits for the next one."""
    self._step, self._deadline = step, time.monotonic() + self._seconds

  def pause(self) -> None:
    """Allows for a long pause: an evaluation or a save begins."""
    self._deadline = time.monotonic() + SLACK * self._seconds

  def _watch(self) -> None:
    while not self._closed.wait(min(1.0, self._seconds / 4)):
      if time.monotonic() > self._deadline:
        print(f"error: no step has finished since step {self._step}, in train.step_timeout={self._seconds:g} s "
              f"or {SLACK} times that where it compiles, evaluates or saves; start the run again, it goes on from "
              "its newest checkpoint. Where every thread stands:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        return self._end(HUNG)
