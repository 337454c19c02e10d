"""Problems as rows of T tokens, made when they are read: the interface of `data/rows.py`.

A row holds as many problems as fit, each a document of its own behind the opening token, and
padding behind the last. Only answers are targets. Row i of a stream is a function of (seed, stream, i),
and batch(step) has the rows step*B .. step*B + B-1, for any number of processes.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from mor.data.tasks import base

Batch = dict[str, np.ndarray]


class TaskRows:
  """The rows of one stream of a task.

  Args:
    task: maker of the problems.
    stream: `base.TRAIN`, `base.HELD_OUT` or `base.BEYOND`.
    levels: difficulties of the answers.
    seed: seed of the stream.
    seq_len: tokens in a row (T).
    batch_size: rows of the global batch (B).
    num_rows: number of rows that `in_order` reads at most.

  Raises:
    ValueError: a problem is longer than a row.
  """

  def __init__(self, task: base.Task, *, stream: int, levels: range, seed: int, seq_len: int, batch_size: int,
               num_rows: int):
    self._longest = 1 + task.longest(levels)
    if seq_len < self._longest:
      raise ValueError(f"data.seq_len={seq_len} is shorter than a problem, which may have {self._longest} tokens; use "
                       f"data.seq_len={self._longest} or more, or smaller problems by data.task")
    self._task, self._stream, self._levels, self._seed = task, stream, levels, seed
    self._seq_len, self._batch_size, self.num_rows = seq_len, batch_size, num_rows

  def batch(self, step: int, rows: slice = slice(None)) -> Batch:
    """Returns the global batch of a step, or only its `rows` (the share of one process).

    Returns:
      `tokens_BT`, `target_BT`, `segment_BT` (int32; 0 is padding, problems count from 1 within
      the row) and `loss_mask_BT` (bool; True where an answer is due).
    """
    start = step * self._batch_size
    batch = self._assemble(range(start, start + self._batch_size)[rows])
    del batch["difficulty_BT"]
    return batch

  def in_order(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
    """Yields the first rows once, with `difficulty_BT` besides; empty rows fill the last batch.

    Args:
      batch_size: rows of each batch.
      max_rows: number of rows to read; 0 reads `num_rows`.
    """
    num = min(max_rows or self.num_rows, self.num_rows)
    for start in range(0, num, batch_size):
      batch = self._assemble(range(start, min(start + batch_size, num)))
      missing = batch_size - len(batch["tokens_BT"])
      yield {name: np.pad(value, ((0, missing), (0, 0))) for name, value in batch.items()}

  def problems(self, index: int) -> list[base.Problem]:
    """Returns the problems of a row, which ends where the longest would no longer fit.

    So whether a problem is in a row does not depend on its length, and the mix of difficulties is that of the task.
    """
    draws, found, left = base.Draws(self._seed, self._stream, index), [], self._seq_len
    while left >= self._longest:
      problem = self._task.make(draws, self._levels)
      found.append(problem)
      left -= 1 + len(problem.tokens_T)
    return found

  def _assemble(self, indices: Iterable[int]) -> Batch:
    rows = [self.problems(index) for index in indices]
    batch = {name: np.zeros((len(rows), self._seq_len), np.int32)
             for name in ("tokens_BT", "target_BT", "segment_BT", "difficulty_BT")}
    for row, problems in enumerate(rows):
      start = 0
      for segment, problem in enumerate(problems, 1):
        stop = start + 1 + len(problem.tokens_T)
        batch["segment_BT"][row, start:stop] = segment
        batch["tokens_BT"][row, start] = self._task.opening
        batch["tokens_BT"][row, start + 1:stop] = problem.tokens_T
        batch["target_BT"][row, start + 1:stop] = problem.target_T
        batch["difficulty_BT"][row, start + 1:stop] = problem.difficulty_T
        start = stop
    return batch | {"loss_mask_BT": batch["difficulty_BT"] > 0}
