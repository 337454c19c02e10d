"""What a run is trained on, by content: the size and the SHA-256 of each file of its sources.

The digest of an `Identity` changes whenever the documents may change, and only then: a
corpus that is moved or touched keeps it. The cache keeps the hashes of a source by path, size and
time of change of its files, so an unchanged source is hashed once.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from mor import config as config_lib
from mor.data import cache
from mor.data import readers
from mor.data import sources


@dataclasses.dataclass(frozen=True)
class File:
  """A file of a source.

  Attributes:
    path: where it was read.
    size: bytes.
    sha256: of its content, in hexadecimal.
    reader: how it is read: a suffix such as ".txt", or a dataset's name, version and split.
  """

  path: str
  size: int
  sha256: str
  reader: str


@dataclasses.dataclass(frozen=True)
class Identity:
  """The data of a run.

  Attributes:
    source: `data.source`.
    validation_source: `data.validation_source`.
    settings: the other fields of the config that choose documents.
    files: of `source`, in the order of reading.
    validation_files: of `validation_source`.
  """

  source: str
  validation_source: str
  settings: dict[str, Any]
  files: tuple[File, ...]
  validation_files: tuple[File, ...]

  @property
  def digest(self) -> str:
    contents = [[[file.reader, file.sha256] for file in files] for files in (self.files, self.validation_files)]
    return hashlib.sha256(json.dumps([self.settings, contents]).encode()).hexdigest()


def make(config: config_lib.DataConfig, documents: Sequence[sources.Documents], cache_root: pathlib.Path) -> Identity:
  """Returns the identity of `data.source` and, if it is given, `data.validation_source`.

  Args:
    config: the fields of the data.
    documents: the opened sources, one or two.
    cache_root: directory of the cache, which keeps the hashes.

  Raises:
    ValueError: a file cannot be read.
    OSError: the cache cannot be written.
  """
  files, validation_files = (*(_hash_files(part, cache_root) for part in documents), ())[:2]
  settings = dict(text_key=config.text_key, max_bytes=config.max_bytes)
  if not config.validation_source:
    settings |= dict(validation_fraction=config.validation_fraction, shuffle_seed=config.shuffle_seed)
  return Identity(config.source, config.validation_source, settings, files, validation_files)


def from_dict(values: dict[str, Any]) -> Identity:
  """Returns the identity of its `dataclasses.asdict`, also after a round trip through JSON."""
  groups = {name: tuple(File(**file) for file in values[name]) for name in ("files", "validation_files")}
  return Identity(values["source"], values["validation_source"], values["settings"], **groups)


def describe_change(old: Identity, new: Identity) -> str:
  """Returns the first differences of two identities, e.g. "b.txt is new, c.txt has other text"."""
  found = [f"data.{name}={new.settings.get(name)!r} (there {old.settings.get(name)!r})"
           for name in sorted(old.settings.keys() | new.settings.keys())
           if old.settings.get(name) != new.settings.get(name)]
  found += _compare(old.files, new.files) + _compare(old.validation_files, new.validation_files)
  more = f" and {len(found) - 3} more" if len(found) > 3 else ""
  return ", ".join(found[:3] or ["its files, or their order, differ"]) + more


def _compare(old: tuple[File, ...], new: tuple[File, ...]) -> list[str]:
  before, after = ({pathlib.PurePath(file.path).name: file for file in files} for files in (old, new))
  changes = [f"{name} is new" for name in after if name not in before]
  changes += [f"{name} is gone" for name in before if name not in after]
  for name in before.keys() & after.keys():
    if before[name].sha256 != after[name].sha256:
      changes.append(f"{name} has other text ({after[name].size} bytes, there {before[name].size})")
    elif before[name].reader != after[name].reader:
      changes.append(f"{name} is read as {after[name].reader} (there {before[name].reader})")
  return changes


def _hash_files(documents: sources.Documents, cache_root: pathlib.Path) -> tuple[File, ...]:
  def write(directory: pathlib.Path) -> None:
    files = []
    for path, reader in documents.files:
      try:
        with path.open("rb") as file:
          digest = hashlib.file_digest(file, "sha256").hexdigest()
      except OSError as error:
        raise readers.unreadable(path, error) from error
      files.append(dataclasses.asdict(File(str(path), path.stat().st_size, digest, reader)))
    (directory / "files.json").write_text(json.dumps(files), encoding="utf-8")

  directory = cache.publish(cache_root / "hashes" / cache.key("hashes", *documents.parts), write)
  return tuple(File(**file) for file in json.loads((directory / "files.json").read_text(encoding="utf-8")))
