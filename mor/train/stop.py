"""A polite answer to SIGINT and SIGTERM."""

from collections.abc import Mapping
import signal
import threading

import jax

from mor import sharding


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
