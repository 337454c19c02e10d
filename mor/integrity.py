"""Hashes of the files of a checkpoint: SHA256SUMS in its directory, a line a file.

The file has the format of sha256sum, so `cd STEP && sha256sum --check SHA256SUMS` checks
a checkpoint without this program. It lists every file but itself and the two files in
which orbax notes its commit afterwards, and which no restore reads.
"""

from collections.abc import Iterator
import hashlib
import re

from etils import epath

NAME = "SHA256SUMS"
OF_THE_COMMIT = frozenset(("_CHECKPOINT_METADATA", "commit_success.txt"))


def write(directory: epath.Path) -> None:
  """Writes the hashes of all files of a directory.

  Raises:
    OSError: a file cannot be read, or the hashes cannot be written.
  """
  lines = [f"{_hash(directory / name)}  {name}\n" for name in sorted(_names(directory))]
  (directory / NAME).write_text("".join(lines), encoding="utf-8")


def check(directory: epath.Path, below: str = "", share: tuple[int, int] = (0, 1)) -> bool:
  """Compares the files of a directory with their hashes.

  Args:
    directory: directory with the files.
    below: beginning of the names of the files to look at; '' is all of them.
    share: (i, n) hashes only the i-th of n shares of the files.

  Returns:
    False if the directory has no hashes, which versions before them did not write.

  Raises:
    ValueError: a file is damaged, missing, or one too many; or the hashes are damaged.
    OSError: a file cannot be read.
  """
  listed = _read(directory)
  if listed is None:
    return False
  present = set(_names(directory))
  names = sorted(name for name in listed.keys() | present if name.startswith(below))
  for name in names:
    if name not in present:
      raise ValueError(f"{name} is missing")
    if name not in listed:
      raise ValueError(f"{name} is not listed in {NAME}")
  for name in names[share[0]::share[1]]:
    if _hash(directory / name) != listed[name]:
      raise ValueError(f"the hash of {name} is not that of {NAME}")
  return True


def is_whole(directory: epath.Path) -> bool:
  """Returns True if every file that has a hash is there; does not read the files.

  An array of which a file is removed while it is read may come as zeros. So a reader of a
  directory that another process may remove asks this after it has read.
  """
  listed = _read(directory)
  return directory.is_dir() if listed is None else listed.keys() <= set(_names(directory))


def _read(directory: epath.Path) -> dict[str, str] | None:
  path = directory / NAME
  if not path.exists():
    return None
  listed = {}
  for line in path.read_bytes().split(b"\n")[:-1]:
    found = re.fullmatch(rb"([0-9a-f]{64})  ([\x20-\x7e]+)", line)
    if not found:
      raise ValueError(f"{NAME} is damaged")
    listed[found[2].decode()] = found[1].decode()
  return listed


def _names(directory: epath.Path, prefix: str = "") -> Iterator[str]:
  """Yields the paths of the files that have hashes, below `directory`."""
  for path in directory.iterdir():
    if path.is_dir():
      yield from _names(path, f"{prefix}{path.name}/")
    elif prefix or path.name not in OF_THE_COMMIT | {NAME}:
      yield prefix + path.name


def _hash(path: epath.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
