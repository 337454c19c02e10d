"""A cached directory is whole or absent."""

import errno
import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mor.data import cache
from mor.data import rows


def write_two_files(directory):
  (directory / "a").write_text("four")
  (directory / "sub").mkdir()
  (directory / "sub/b").write_text("seven!!")


def fail(directory):
  raise AssertionError(f"{directory} is there already")


def test_writes_once(tmp_path):
  path = cache.publish(tmp_path / "x" / "name", write_two_files)
  assert (path / "a").read_text() == "four"
  assert (path / "sub/b").read_text() == "seven!!"
  assert cache.publish(path, fail) == path


@pytest.mark.parametrize("tear", [
    lambda path: (path / "a").write_text("fou"),
    lambda path: (path / "sub/b").unlink(),
    lambda path: (path / "complete.json").unlink(),
    lambda path: (path / "complete.json").write_text('{"a"'),
], ids=["short", "missing", "no_record", "torn_record"])
def test_makes_a_torn_directory_again(tmp_path, tear):
  path = cache.publish(tmp_path / "name", write_two_files)
  tear(path)
  cache.publish(path, write_two_files)
  assert (path / "a").read_text() == "four"
  assert (path / "sub/b").read_text() == "seven!!"
  cache.publish(path, fail)


def test_two_at_once_write_once(tmp_path):
  writes = []

  def write_slowly(directory):
    writes.append(directory)
    time.sleep(0.2)
    write_two_files(directory)

  threads = [threading.Thread(target=cache.publish, args=(tmp_path / "name", write_slowly)) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(writes) == 1
  cache.publish(tmp_path / "name", fail)


def test_failed_write_leaves_nothing(tmp_path):
  def stop(directory):
    write_two_files(directory)
    raise RuntimeError("stopped")

  with pytest.raises(RuntimeError, match="stopped"):
    cache.publish(tmp_path / "name", stop)
  assert [p.name for p in tmp_path.iterdir()] == ["name.lock"]


def test_killed_write_is_never_read_and_is_swept(tmp_path):
  program = ("import os, pathlib, signal, sys\nfrom mor.data import cache\n"
             "def die(path):\n  (path / 'a').write_text('fo')\n  os.kill(os.getpid(), signal.SIGKILL)\n"
             "cache.publish(pathlib.Path(sys.argv[1]) / 'name', die)\n")
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, check=False)
  assert done.returncode == -9
  assert not (tmp_path / "name").exists()
  assert list(tmp_path.glob("name.tmp-*"))
  path = cache.publish(tmp_path / "name", write_two_files)
  assert (path / "a").read_text() == "four"
  assert not list(tmp_path.glob("name.tmp-*"))


def test_somebody_faster_wins_where_files_cannot_lock(tmp_path, monkeypatch):
  def refuse(file, operation):
    raise OSError(errno.ENOLCK, "no locks")

  def write_late(directory):
    write_two_files(directory)
    cache.publish(tmp_path / "name", write_two_files)

  monkeypatch.setattr(cache.fcntl, "flock", refuse)
  cache.publish(tmp_path / "name", write_late)
  cache.publish(tmp_path / "name", fail)
  assert not list(tmp_path.glob("name.tmp-*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("Failed: write() failed: No space left on device; at byte 7"),
                                   OSError(errno.EDQUOT, "Disk quota exceeded")], ids=str)
def test_full_disk_is_one_line(tmp_path, error):
  def fill(directory):
    raise error

  with pytest.raises(OSError, match="is full; free space.*data.cache_dir") as caught:
    cache.publish(tmp_path / "name", fill)
  assert "\n" not in str(caught.value)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs the device /dev/full")
def test_full_disk_under_array_record(tmp_path):
  def fill(directory):
    (directory / "x").symlink_to("/dev/full")
    rows.write(directory / "x", [np.arange(9)], eos_id=0, seq_len=4, dtype=np.uint16)

  with pytest.raises(OSError, match="is full; free space.*data.cache_dir"):
    cache.publish(tmp_path / "name", fill)


def test_unwritable_root_names_the_remedy(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="set data.cache_dir"):
    cache.publish(tmp_path / "file" / "rows" / "name", write_two_files)


def test_root(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert cache.root("") == tmp_path / "mor"
  monkeypatch.delenv("XDG_CACHE_HOME")
  assert cache.root("") == pathlib.Path.home() / ".cache" / "mor"
  assert cache.root("~/x") == pathlib.Path(os.path.expanduser("~/x"))


def test_key_depends_on_every_part():
  keys = {cache.key(*parts) for parts in [("a", "b"), ("ab",), ("a", "b", ""), ("b", "a"), ("a", 1), ("a", "1")]}
  assert len(keys) == 6
