"""Documents as packed rows of T inputs and T targets, read at random by step.

Every document is [eos, token, token, ...]: eos opens it and so predicts its first
token, and is the target of the last token before. The documents are put end to
end, closed by one more eos, and cut with stride T into records of T + 1 tokens,
so every token is a target exactly once:

  record r = stream[r*T : r*T + T + 1]; inputs are all but its last, targets all but its first

Only the last record may be shorter. `batch(step)` is a function of the step alone: rows
step*B .. step*B + B-1 of an endless sequence in which every epoch is another permutation
of the records. So the position in the data is one integer, for any number of processes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
import pathlib
from typing import TypeVar

import numpy as np

Batch = dict[str, np.ndarray]
Made = TypeVar("Made")


def write(path: pathlib.Path, documents: Sequence[np.ndarray], eos_id: int, seq_len: int,
          dtype: type[np.integer]) -> None:
  """Writes documents of token ids as records; `PackedRows` must have the same `dtype` and `seq_len`."""
  from array_record.python import array_record_module

  eos_1 = np.array([eos_id], dtype)
  parts = [part for document in documents for part in (eos_1, document.astype(dtype, copy=False))]
  stream = np.concatenate([*parts, eos_1])
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for start in range(0, len(stream) - 1, seq_len):
    writer.write(stream[start:start + seq_len + 1].tobytes())
  writer.close()


class PackedRows:
  """The records of one file.

  Args:
    path: file that `write` wrote.
    eos_id: token that opens a document.
    seq_len: tokens in a row (T).
    batch_size: rows of the global batch (B).
    seed: seed of the training order.
    dtype: dtype of the records.
  """

  def __init__(self, path: pathlib.Path, *, eos_id: int, seq_len: int, batch_size: int, seed: int,
               dtype: type[np.integer]):
    import grain

    self._eos_id = eos_id
    self._seq_len = seq_len
    self._batch_size = batch_size
    self._dtype = dtype
    self._source = grain.sources.ArrayRecordDataSource([str(path)])
    self.num_rows = len(self._source)
    self._endless = grain.MapDataset.source(self._source).seed(seed).shuffle().repeat()

  def batch(self, step: int, rows: slice = slice(None)) -> Batch:
    """Returns the global batch of a step, or only its `rows` (the share of one process).

    Returns:
      `tokens_BT`, `target_BT`, `segment_BT` (int32; 0 is padding, documents count
      from 1 within the row) and `loss_mask_BT` (bool).
    """
    start = step * self._batch_size
    places = range(start, start + self._batch_size)[rows]
    return self._assemble([self._endless[place] for place in places])

  def in_order(self, batch_size: int, max_rows: int = 0) -> Iterator[Batch]:
    """Yields every row once, in the order of the text; empty rows fill the last batch.

    Args:
      batch_size: rows of each batch.
      max_rows: number of rows to read, spread evenly over the text; 0 reads all.
    """
    num = min(max_rows or self.num_rows, self.num_rows)
    chosen = [index * self.num_rows // num for index in range(num)]
    for start in range(0, num, batch_size):
      records = [self._source[index] for index in chosen[start:start + batch_size]]
      yield self._assemble(records + [b""] * (batch_size - len(records)))

  def _assemble(self, records: Iterable[bytes]) -> Batch:
    arrays = [np.frombuffer(record, self._dtype) for record in records]
    record_BS = np.full((len(arrays), self._seq_len + 1), -1, np.int32)
    for index, array in enumerate(arrays):
      record_BS[index, :len(array)] = array
    tokens_BT, target_BT = record_BS[:, :-1], record_BS[:, 1:]
    valid_BT = target_BT >= 0
    opens_BT = tokens_BT == self._eos_id
    segment_BT = np.cumsum(opens_BT, axis=1, dtype=np.int32)
    segment_BT += ~opens_BT[:, :1]  # a row that begins inside a document
    return {
        "tokens_BT": np.where(valid_BT, tokens_BT, 0),
        "target_BT": np.where(valid_BT, target_BT, 0),
        "segment_BT": np.where(valid_BT, segment_BT, 0),
        "loss_mask_BT": valid_BT,
    }


def prefetch(batch_fn: Callable[[int], Made], start: int, stop: int) -> Iterator[Made]:
  """Yields batch_fn(start) .. batch_fn(stop - 1), and makes the next batch in a thread."""
  with futures.ThreadPoolExecutor(max_workers=1) as pool:
    pending = pool.submit(batch_fn, start) if start < stop else None
    for step in range(start, stop):
      batch = pending.result()
      if step + 1 < stop:
        pending = pool.submit(batch_fn, step + 1)
      yield batch
