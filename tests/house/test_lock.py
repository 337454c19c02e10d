"""A second writer of a workdir is refused by name and harms nothing; a crash leaves no lock behind."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from mor import lock
from mor.conversion import command
from mor.study import plan as study_plan
from mor.study import run as study_run
from mor.train import loop
from tests.helpers import tiny

HOLD = """
import sys, time
from mor import lock
with lock.Lock(sys.argv[1], "trains") as held:
  held.acquire()
  print("held", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
  """Another process that holds the lock of a workdir."""
  process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_a_second_process_is_refused_by_name_and_harms_nothing(other, tmp_path):
  workdir = tmp_path / "run"
  unfinished = workdir / "checkpoints" / "4.orbax-checkpoint-tmp"  # a save of the first process
  unfinished.mkdir(parents=True)
  before = sorted(workdir.rglob("*"))
  said = (rf"{workdir} is in use: process {other.pid} on {socket.gethostname()} trains here since 20.* UTC; wait for it "
          "or stop it, or give another --workdir")
  config = tiny.config(tiny.BYTES)
  for work in (lambda: loop.train(config, workdir), lambda: command.convert(config, "mor:x", workdir),
               lambda: study_run.run(config, object.__new__(study_plan.Study), workdir, "")):
    with pytest.raises(ValueError, match=said):
      work()
  assert sorted(workdir.rglob("*")) == before
  assert json.loads((workdir / lock.NAME).read_text())["pid"] == other.pid


def test_a_killed_process_leaves_no_lock(other, tmp_path):
  other.send_signal(signal.SIGKILL)
  other.wait()
  with lock.Lock(tmp_path / "run", "trains"):
    assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_lock_is_taken_once_and_given_back(tmp_path):
  with lock.Lock(tmp_path / "new", "trains") as first:
    assert not (tmp_path / "new").exists()
    first.acquire()
    first.acquire()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on .* trains here since"):
      with lock.Lock(tmp_path / "new", "converts"):
        pass
  with lock.Lock(tmp_path / "new", "converts"):
    pass


def test_a_holder_that_has_not_signed_is_told_so(tmp_path):
  with lock.Lock(tmp_path, "trains") as held:
    held.acquire()
    (tmp_path / lock.NAME).write_text("")
    with pytest.raises(ValueError, match="in use: another process works here"):
      lock.Lock(tmp_path, "trains").acquire()


def test_an_object_store_has_no_lock(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with lock.Lock("gs://bucket/run", "trains") as held, lock.Lock("gs://bucket/run", "trains") as second:
    held.acquire()
    second.acquire()  # a lock would refuse it
    assert held._file is None and second._file is None
  assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
  def refuse(*unused):
    raise OSError(lock.errno.ENOLCK, "No locks available")

  monkeypatch.setattr(lock.fcntl, "flock", refuse)
  with lock.Lock(tmp_path, "trains"):
    pass
  assert "warning" in capsys.readouterr().err


def test_a_full_disk_is_told_and_gives_the_lock_back(tmp_path, monkeypatch):
  def fill(*unused):
    raise OSError(lock.errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as full:
    full.setattr(lock.json, "dumps", fill)  # the line of the holder is what needs space
    with pytest.raises(OSError, match=rf"cannot write {tmp_path}/lock \(No space left on device\); free some space"):
      with lock.Lock(tmp_path, "trains"):
        pass
  with lock.Lock(tmp_path, "trains"):
    pass
