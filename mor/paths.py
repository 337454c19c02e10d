"""Directories of runs: on a local disk, or in a bucket of an object store.

Only `directory` turns a --workdir into a path. A local path becomes absolute. A gs://
path stays as it is; etils and orbax read and write it. An object store cannot append to
a file, so files that grow are kept locally and copied (`mor/train/metrics.py`).

s3:// is refused: orbax 0.12 can read its metadata there, but writes arrays to local and
gs:// paths only, and renames directories, which a bucket cannot do in one step.
"""

import atexit
import errno
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tempfile

from etils import epath

FULL = (errno.ENOSPC, errno.EDQUOT)  # errno of a disk or quota without space


def is_url(path: str | os.PathLike) -> bool:
  """Returns True if the path names an object store, not a local file."""
  return re.match(r"[a-z][a-z0-9+.-]*://", os.fspath(path)) is not None


def directory(workdir: str | os.PathLike) -> epath.Path:
  """Returns the workdir as a path: a local one absolute with ~ expanded, a URL as given.

  Raises:
    ValueError: the object store is not supported, or its library is missing.
  """
  if not is_url(workdir):
    return epath.Path(pathlib.Path(workdir).expanduser().absolute())
  workdir = os.fspath(workdir)
  if workdir.startswith("s3://"):
    raise ValueError(f"--workdir={workdir}: orbax cannot save arrays to s3://; mount the bucket as a file system "
                     "that renames directories and give its path, or use gs://BUCKET/DIR")
  if not re.match("gs://[^/]+", workdir):
    raise ValueError(f"--workdir={workdir} is no place that a run can be kept in; use gs://BUCKET/DIR or a local "
                     "directory")
  if importlib.util.find_spec("gcsfs") is None:  # its installation includes the client that orbax imports
    raise ValueError(f"--workdir={workdir} needs gcsfs, which is not installed; pip install gcsfs")
  return epath.Path(workdir)


def local(workdir: str | os.PathLike, mode: str) -> pathlib.Path:
  """Returns the workdir of a mode that can write to a local disk only.

  Raises:
    ValueError: the workdir is an object store.
  """
  if is_url(workdir):
    raise ValueError(f"--mode={mode} keeps its files on a local disk; give a local --workdir instead of {workdir}, "
                     "and copy it afterwards")
  return pathlib.Path(workdir).expanduser()


def write_whole(path: pathlib.Path | epath.Path, content: str) -> None:
  """Writes a text file whole or not at all, as an object store always does."""
  if is_url(path):
    path.write_text(content, encoding="utf-8")
    return
  temporary = path.parent / (path.name + ".partial")
  temporary.write_text(content, encoding="utf-8")
  temporary.replace(path)


def user_cache() -> pathlib.Path | None:
  """Returns the directory that keeps compiled programs and tokenised text; None if none can be written.

  It is $XDG_CACHE_HOME/mor, or ~/.cache/mor. A user without a home, or with one that is read-only, has none.
  """
  given = os.environ.get("XDG_CACHE_HOME")
  try:
    path = (pathlib.Path(given) if given else pathlib.Path.home() / ".cache") / "mor"
    path.mkdir(parents=True, exist_ok=True)
  except (RuntimeError, OSError):  # RuntimeError: HOME is not set, and the user has no entry
    return None
  return path if os.access(path, os.W_OK) else None


@functools.cache
def temporary_cache() -> pathlib.Path:
  """Makes a cache that lasts until this process ends, and says so once."""
  path = pathlib.Path(tempfile.mkdtemp(prefix="mor-cache-"))
  atexit.register(shutil.rmtree, path, ignore_errors=True)
  print(f"warning: no cache directory can be written, so tokenised text is kept in {path} until this process ends; set "
        "data.cache_dir, or XDG_CACHE_HOME, to a directory of yours", file=sys.stderr, flush=True)
  return path
