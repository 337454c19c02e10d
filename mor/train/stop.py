"""A polite answer to SIGINT and SIGTERM."""

import signal
import threading

from mor import distributed


class Stop:
  """While active, the first signal only sets `requested`; a second interrupts.

  A signal reaches one process, and all stop at the same step: the loop asks `agreed`
  after every step.
  """

  _SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __init__(self):
    self.requested = False
    self._before = {}
    self._votes = distributed.Votes()

  def __enter__(self) -> "Stop":
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
      self._before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def agreed(self) -> bool:
    """Whether to stop after this step, the same in every process; ask once a step."""
    return self._votes.ask(self.requested)

  def _handle(self, number: int, unused_frame) -> None:
    if self.requested:
      raise KeyboardInterrupt(signal.Signals(number).name)
    self.requested = True
