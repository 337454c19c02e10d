"""What an engine measures of itself, under the names that serving systems use.

  output_throughput            new tokens / second of the engine's own time
  ttft_*, tpot_*               seconds from submit to the first token; per token after it
  slot_utilisation             fraction of slot-ticks in which a slot ran the stack
  mean_depth                   recursion steps of a new token
  pool_peak, edge_pool_peak    largest fraction of the pages in use at the end of a dispatch
  stalled, crowded             slot-ticks that waited for a page; for room in a pass
  exit_rate                    fraction of new tokens that an exit chose
  drafts, confirmed            drafts that the full depth has judged; that it confirmed
  acceptance                   the fraction of them
  preemptions                  requests sent back to the queue
"""

from collections.abc import Iterator
import contextlib
import time
from typing import Any

import numpy as np

from mor.serve import scheduler


class Meter:
  """Counts; one an engine."""

  def __init__(self, num_slots: int, pool: scheduler.Pool):
    self._num_slots, self._pool = num_slots, pool
    self._submitted: dict[int, float] = {}
    self._first: dict[int, float] = {}
    self._ttft: list[float] = []
    self._tpot: list[float] = []
    self._seconds = 0.0
    self._counts = dict(requests=0, prompt_tokens=0, tokens=0, ticks=0, ran=0, depth=0, stalled=0, crowded=0,
                        early=0, drafts=0, kept=0, preemptions=0)
    self._peak, self._edge_peak = 0.0, 0.0

  @contextlib.contextmanager
  def busy(self) -> Iterator[None]:
    """Counts the seconds of the engine's own work inside the `with` block."""
    start = time.monotonic()
    try:
      yield
    finally:
      self._seconds += time.monotonic() - start

  def submitted(self, number: int) -> None:
    self._submitted[number] = time.monotonic()

  def prefilled(self, tokens: int) -> None:
    self._counts["prompt_tokens"] += tokens

  def began(self, number: int) -> None:
    """Notes the first token of a request."""
    if number not in self._first:
      self._first[number] = time.monotonic()
      self._ttft.append(self._first[number] - self._submitted[number])

  def finished(self, number: int, tokens: int) -> None:
    """Counts a request that has ended with so many tokens, one way or the other, once."""
    if self._submitted.pop(number, None) is None:
      return
    self._counts["requests"] += 1
    first = self._first.pop(number, None)
    if tokens > 1 and first is not None:
      self._tpot.append((time.monotonic() - first) / (tokens - 1))

  def preempted(self) -> None:
    self._counts["preemptions"] += 1

  def harvested(self, out: Any, num_ticks: int) -> None:
    """Counts the results of a dispatch, numpy arrays."""
    ticks, new, emitted_KBW = out.ticks, out.ticks.new, out.ticks.new.token_BW[:num_ticks] >= 0
    counts = dict(ticks=num_ticks, tokens=emitted_KBW.sum(), ran=ticks.ran_B[:num_ticks].sum(),
                  stalled=ticks.stalled_B[:num_ticks].sum(), crowded=ticks.crowded_B[:num_ticks].sum(),
                  depth=new.depth_BW[:num_ticks][emitted_KBW].sum())
    if new.exits is not None:
      counts |= dict(early=new.exits.early_BW[:num_ticks][emitted_KBW].sum(),
                     drafts=new.exits.drafts_B[:num_ticks].sum(), kept=new.exits.kept_B[:num_ticks].sum())
    for name, value in counts.items():
      self._counts[name] += int(value)
    self._peak = max(self._peak, 1 - int(out.free) / self._pool.num_pages)
    if self._pool.num_edge_pages:
      self._edge_peak = max(self._edge_peak, 1 - int(out.edge_free) / self._pool.num_edge_pages)

  def figures(self) -> dict[str, float]:
    """Returns all figures; see the module docstring."""
    counts = self._counts

    def ratio(a, b):
      return a / b if b else 0.0

    figures = {
        "requests": counts["requests"], "prompt_tokens": counts["prompt_tokens"], "output_tokens": counts["tokens"],
        "seconds": self._seconds, "output_throughput": ratio(counts["tokens"], self._seconds),
        "slot_utilisation": ratio(counts["ran"], counts["ticks"] * self._num_slots),
        "mean_depth": ratio(counts["depth"], counts["tokens"]), "ticks": counts["ticks"],
        "pool_peak": self._peak, "edge_pool_peak": self._edge_peak, "stalled": counts["stalled"],
        "crowded": counts["crowded"], "exit_rate": ratio(counts["early"], counts["tokens"]),
        "drafts": counts["drafts"], "confirmed": counts["kept"], "acceptance": ratio(counts["kept"], counts["drafts"]),
        "preemptions": counts["preemptions"],
    }
    for name, values in (("ttft", self._ttft), ("tpot", self._tpot)):
      for label, percent in (("p50", 50), ("p99", 99)):
        figures[f"{name}_{label}_seconds"] = float(np.percentile(values, percent)) if values else 0.0
    return figures
