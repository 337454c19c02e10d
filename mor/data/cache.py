"""Directories that are computed once, written so that an incomplete one is never read.

`publish(path, write)` lets `write` fill a temporary directory beside `path`, adds
`complete.json` with the size of every file, flushes all files to disk and renames the
directory. If the files do not match `complete.json` (after a crash of the machine, or an
incomplete copy), the directory counts as absent and is made again.
"""

from collections.abc import Callable
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import IO

from mor import paths

_RECORD = "complete.json"
_FULL = tuple(map(os.strerror, paths.FULL))


def root(cache_dir: str) -> pathlib.Path:
  """Returns the cache directory of a config; "" is the cache of the user (`paths.user_cache`)."""
  if cache_dir:
    return pathlib.Path(cache_dir).expanduser()
  return paths.user_cache() or paths.temporary_cache()


def key(*parts: str | int | float) -> str:
  """Returns a short name for a directory whose content depends on `parts` alone."""
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def publish(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """Returns `path`, after `write` has filled it unless it is complete.

  Args:
    path: directory named by `key`, so that equal paths have equal content.
    write: function that fills an empty directory; must be deterministic.

  Raises:
    OSError: the cache cannot be written.
  """
  if _is_complete(path):
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
      if not _is_complete(path):
        _replace(path, write, locked)
    except Exception as error:  # writers of other libraries hide the errno in their message
      if any(reason in str(error) for reason in _FULL):
        raise OSError(f"the disk of {path.parent} is full; free space there, or set data.cache_dir "
                      "to another disk") from error
      raise
  return path


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], None], locked: bool) -> None:
  if locked:  # no other process is writing, so these are the remains of a killed one
    for stale in path.parent.glob(f"{path.name}.tmp-*"):
      shutil.rmtree(stale, ignore_errors=True)
  temporary = pathlib.Path(tempfile.mkdtemp(prefix=f"{path.name}.tmp-", dir=path.parent))
  try:
    write(temporary)
    (temporary / _RECORD).write_text(json.dumps(_sizes(temporary)))
    _flush(temporary)
    if path.exists() and not _is_complete(path):
      shutil.rmtree(path)
    if not path.exists():  # without a lock another process may have been faster
      temporary.rename(path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _lock(file: IO[str]) -> bool:
  """Waits for processes that make the same directory; returns False if files cannot be locked.

  The rename alone keeps the cache complete. The lock prevents doing the work twice.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX)
  except OSError:
    return False
  return True


def _sizes(path: pathlib.Path) -> dict[str, int]:
  return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*"))
          if p.is_file() and p.name != _RECORD}


def _is_complete(path: pathlib.Path) -> bool:
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
