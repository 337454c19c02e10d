"""Makes the next batch in a thread while the current one is used."""

from collections.abc import Callable, Iterator
from concurrent import futures
from typing import TypeVar

Batch = TypeVar("Batch")


def prefetch(batch_fn: Callable[[int], Batch], start: int, stop: int) -> Iterator[Batch]:
  """Yields batch_fn(start) .. batch_fn(stop - 1), one ahead of the consumer."""
  with futures.ThreadPoolExecutor(max_workers=1) as pool:
    pending = pool.submit(batch_fn, start) if start < stop else None
    for step in range(start, stop):
      batch = pending.result()
      if step + 1 < stop:
        pending = pool.submit(batch_fn, step + 1)
      yield batch
