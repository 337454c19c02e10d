"""One writer of a workdir at a time.

A process that writes checkpoints holds an exclusive `flock` on the file `lock` of the
workdir. The kernel drops it when the process ends, however it ends, so a crash leaves
nothing to clean up. The content of the file says who holds it. Readers need no lock.

An object store has no locks: two processes on one gs:// workdir are not found out.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import sys
from typing import IO

from mor import distributed
from mor import paths

NAME = "lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system


class Lock:
  """The right to write a workdir. Use as a context manager; all processes of a run must.

  Entering takes the lock of a directory that exists, before anything in it is read.
  `acquire` creates the directory, so a run that cannot start may leave none.
  """

  def __init__(self, workdir: str | os.PathLike, work: str):
    """Prepares the lock.

    Args:
      workdir: run directory; the lock of a gs:// directory does nothing.
      work: what this process does there, for the message of others, e.g. "trains".
    """
    self._path = None if paths.is_url(workdir) else paths.directory(workdir) / NAME
    self._work = work
    self._held = False
    self._file: IO[str] | None = None

  def __enter__(self) -> "Lock":
    if self._path is not None and distributed.from_main(self._path.parent.is_dir()):
      self.acquire()
    return self

  def __exit__(self, *unused) -> None:
    if self._file is not None:
      self._file.close()
    self._file, self._held = None, False

  def acquire(self) -> None:
    """Takes the lock, unless it is held already; process 0 does so for all processes of a run.

    Raises:
      ValueError: another process holds it.
      OSError: the directory cannot be written.
    """
    if self._held or self._path is None:
      return
    error = None
    if distributed.is_main():
      try:
        self._take()
      except (OSError, ValueError) as caught:
        error = caught
    if distributed.any_process(error is not None):
      raise error or ValueError(f"{self._path.parent} is not free, as process 0 of this run says")
    self._held = True

  def _take(self) -> None:
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with contextlib.ExitStack() as opened:  # closes the file, and so gives the lock back, if an error follows
        file = opened.enter_context(open(self._path, "a+", encoding="utf-8"))
        self._flock(file)
        started = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        file.truncate(0)
        file.write(json.dumps(dict(pid=os.getpid(), host=socket.gethostname(), work=self._work, since=started)) + "\n")
        file.flush()
        opened.pop_all()
    except OSError as error:
      remedy = "free some space" if error.errno in paths.FULL else "give a --workdir that you may write"
      raise OSError(f"cannot write {self._path} ({error.strerror}); {remedy}") from error
    self._file = file

  def _flock(self, file: IO[str]) -> None:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"{self._path.parent} is in use: {_read_holder(file)}; wait for it or stop it, or give "
                       "another --workdir") from error
    except OSError as error:
      if error.errno not in _UNSUPPORTED:
        raise
      print(f"warning: {self._path} cannot be locked ({error.strerror}); make sure that no other process works in "
            "this directory", file=sys.stderr, flush=True)


def _read_holder(file: IO[str]) -> str:
  """Returns e.g. "process 17 on node3 trains here since 2026-01-02 03:04:05 UTC"."""
  try:
    file.seek(0)
    holder = json.loads(file.read())
    return f"process {holder['pid']} on {holder['host']} {holder['work']} here since {holder['since']}"
  except (OSError, ValueError, KeyError, TypeError):  # it has not written its line yet
    return "another process works here"
