"""Exits of a run with the threshold that was calibrated for them: `exits.json` of its workdir.

`--mode=calibrate` writes the file. `mor.load` reads it, so a request with an exit and
without a threshold gets the stored one, where the exits of the engine are the same.
"""

import dataclasses
import json
import os
from typing import Any

from mor import json_file
from mor import paths
from mor.exits import calibration
from mor.exits import policy as exits_lib

NAME = "exits.json"


@dataclasses.dataclass(frozen=True)
class StoredExits:
  """Exits, their threshold, and where it comes from.

  Attributes:
    after: layers after which a token may leave; `measure` and `first` are fields of `policy.Exits`, too.
    measure: name of the confidence.
    first: tokens that an exit chooses from; 0 is the whole vocabulary.
    method: name in `calibration.METHODS`.
    options: arguments of the method.
    threshold: confidence above which a token leaves.
    num_pairs: tokens that the threshold was fitted on.
    exit_rate: share of these tokens that leave.
    agreement: share of the leaving tokens whose exit chose the token of full depth; None if no token leaves.
    text: file of the text, or "held-out".
    text_sha256: hash of the text.
    step: training step of the checkpoint.
  """

  after: tuple[int, ...]
  measure: str
  first: int
  method: str
  options: dict[str, Any]
  threshold: float
  num_pairs: int
  exit_rate: float
  agreement: float | None
  text: str
  text_sha256: str
  step: int

  def __post_init__(self):
    self.exits  # whose fields it checks
    if self.method not in calibration.METHODS:
      raise ValueError(f"method={self.method!r}; use one of {', '.join(calibration.METHODS)}")
    if isinstance(self.threshold, bool) or not 0 <= self.threshold <= 1:
      raise ValueError(f"threshold={self.threshold!r}; use a confidence in [0, 1]")
    if not isinstance(self.step, int):
      raise ValueError(f"step={self.step!r}; use a count")

  @property
  def exits(self) -> exits_lib.Exits:
    """The exits, for an engine."""
    return exits_lib.Exits(after=self.after, measure=self.measure, first=self.first)

  def fits(self, exits: exits_lib.Exits) -> bool:
    """Returns True if the threshold was calibrated for these exits."""
    return (self.after, self.measure, self.first) == (exits.after, exits.measure, exits.first)

  def command(self) -> str:
    """Returns the flags of these exits."""
    after = ",".join(map(str, self.after))
    return f"--exit_after={after} --exit_measure={self.measure} --exit_first={self.first}"


def write(workdir: str | os.PathLike, stored: StoredExits) -> None:
  """Writes the file of a run, whole or not at all.

  Raises:
    OSError: the file cannot be written.
  """
  paths.write_whole(paths.directory(workdir) / NAME, json.dumps(dataclasses.asdict(stored), indent=1) + "\n")


def read(workdir: str | os.PathLike) -> StoredExits | None:
  """Returns the stored exits of a run, None if it has none.

  Raises:
    ValueError: the file is damaged.
  """
  path = paths.directory(workdir) / NAME
  if not path.is_file():
    return None
  with json_file.naming_damage(path, "write it again with --mode=calibrate, or delete it"):
    fields = json.loads(path.read_text(encoding="utf-8"))
    return StoredExits(**{**fields, "after": tuple(fields["after"])})
