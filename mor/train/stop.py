"""A polite answer to SIGINT and SIGTERM."""

import signal
import threading


class Stop:
  """While active, the first signal only sets `requested`; a second interrupts.

  The loop asks after every step. Signals reach this process alone: on several
  processes, send them to all between two steps, or rely on the checkpoints.
  """

  _SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __init__(self):
    self.requested = False
    self._before = {}

  def __enter__(self) -> "Stop":
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
      self._before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _handle(self, number: int, unused_frame) -> None:
    if self.requested:
      raise KeyboardInterrupt(signal.Signals(number).name)
    self.requested = True
