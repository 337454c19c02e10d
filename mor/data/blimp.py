"""BLiMP: minimal pairs of an acceptable and an unacceptable sentence.

67 paradigms (field `uid`) of 1000 pairs each, one JSON object per line. A model is right
on a pair if it gives the good sentence the higher probability.

Source: Warstadt et al. 2020; alexwarstadt/blimp, CC BY 4.0.
"""

import collections
import dataclasses
import pathlib

from mor.data import readers

_FIELDS = ("good", "bad", "uid")


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two sentences that differ in acceptability."""

  good: str
  bad: str
  uid: str


def read(path: pathlib.Path, pairs_per_paradigm: int) -> list[Pair]:
  """Reads the first pairs of each paradigm, in order of the file (.jsonl, .gz or .xz).

  Raises:
    ValueError: the file is damaged, or a line lacks a field.
  """
  pairs, seen = [], collections.Counter()
  for where, record in readers.records(path):
    if not all(isinstance(record.get(field), str) for field in _FIELDS):
      raise ValueError(f"{where}: not a minimal pair; each line is an object with the texts {', '.join(_FIELDS)}")
    pair = Pair(*(readers.text_of(where, record, field) for field in _FIELDS))
    seen[pair.uid] += 1
    if seen[pair.uid] <= pairs_per_paradigm:
      pairs.append(pair)
  if not pairs:
    raise ValueError(f"{path} holds no minimal pairs; restore the file")
  return pairs
