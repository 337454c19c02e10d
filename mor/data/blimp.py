"""BLiMP: minimal pairs of an acceptable and an unacceptable sentence.

67 paradigms (field `uid`) of 1000 pairs each, one JSON object per line. A model is right
on a pair if it gives the good sentence the higher probability.

Source: Warstadt et al. 2020; alexwarstadt/blimp, CC BY 4.0.
"""

import collections
import dataclasses
import gzip
import json
import lzma
import pathlib
import zlib

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
  opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
  pairs, seen, number = [], collections.Counter(), 0
  try:
    with opener(path, "rt", encoding="utf-8") as file:
      for number, line in enumerate(file, 1):
        record = json.loads(line)
        pair = Pair(*(record[field] for field in _FIELDS))
        seen[pair.uid] += 1
        if seen[pair.uid] <= pairs_per_paradigm:
          pairs.append(pair)
  except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is damaged after line {number} ({error}); restore the file") from error
  except (json.JSONDecodeError, KeyError, TypeError) as error:
    raise ValueError(f"{path}, line {number}: not a minimal pair ({error!r}); each line is an object with "
                     f"{', '.join(_FIELDS)}") from error
  if not pairs:
    raise ValueError(f"{path} holds no minimal pairs; restore the file")
  return pairs
