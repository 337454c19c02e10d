"""Directories that are computed once, written so that a torn one is never read.

`publish(path, write)` lets `write` fill a temporary directory beside `path`,
adds `complete.json` with the size of every file, flushes all of it to disk and
renames. A directory whose files do not match its `complete.json` (a crash of
the machine, a copy that was cut off) counts as absent and is made again.
"""

from collections.abc import Callable
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import IO

_RECORD = "complete.json"
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))


def root(cache_dir: str) -> pathlib.Path:
  """The cache directory of a config; "" is the user's ($XDG_CACHE_HOME)."""
  if cache_dir:
    return pathlib.Path(cache_dir).expanduser()
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mor"


def key(*parts: str | int | float) -> str:
  """A short name for a directory whose content depends on `parts` alone."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def publish(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """Returns `path`, filled by `write` unless it is whole already.

  Args:
    path: a name made with `key`: what is there is taken as what `write` makes.
    write: fills the empty directory it is given; must be deterministic.

  Raises:
    OSError: the cache cannot be written.
  """
  if _whole(path):
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path.with_name(f"{path.name}.lock"), "w", encoding="utf-8")
  except OSError as error:
    raise OSError(f"cannot write the data cache {path.parent} ({error.strerror}); set "
                  "data.cache_dir to a directory of yours") from error
  with lock:
    locked = _lock(lock)
    try:
      if not _whole(path):
        _replace(path, write, locked)
    except Exception as error:  # writers of other libraries hide the errno in their message
      if any(reason in str(error) for reason in _FULL):
        raise OSError(f"the disk of {path.parent} is full; free space there, or set data.cache_dir "
                      "to another disk") from error
      raise
  return path


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], None], locked: bool) -> None:
  if locked:  # then nobody else is writing: these are left over from a kill
    for stale in path.parent.glob(f"{path.name}.tmp-*"):
      shutil.rmtree(stale, ignore_errors=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix=f"{path.name}.tmp-", dir=path.parent))
  try:
    write(temporary)
    (temporary / _RECORD).write_text(json.dumps(_sizes(temporary)))
    _flush(temporary)
    if path.exists() and not _whole(path):
      shutil.rmtree(path)
    if not path.exists():  # without a lock somebody may have been faster
      temporary.rename(path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _lock(file: IO[str]) -> bool:
  """Waits for others who make the same directory; False where files cannot lock.

  The rename alone keeps the cache whole; the lock saves doing the work twice.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX)
  except OSError:
    return False
  return True


def _sizes(path: pathlib.Path) -> dict[str, int]:
  return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*"))
          if p.is_file() and p.name != _RECORD}


def _whole(path: pathlib.Path) -> bool:
  try:
    return json.loads((path / _RECORD).read_text()) == _sizes(path)
  except (OSError, ValueError):
    return False


def _flush(path: pathlib.Path) -> None:
  for item in [*path.rglob("*"), path]:
    descriptor = os.open(item, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
