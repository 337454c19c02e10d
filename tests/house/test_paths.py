"""A run in a bucket is the run in a directory."""

import importlib.util
import pathlib

from etils import epath
import jax
import numpy as np
import pytest

from mor import checkpoint
from mor import paths
from mor import report
from mor.conversion import command
from mor.study import plan as study_plan
from mor.study import run as study
from mor.train import loop
from mor.train import metrics
from tests.helpers import bucket
from tests.helpers import tiny


@pytest.fixture
def root(monkeypatch, tmp_path):
  bucket.install(monkeypatch, tmp_path / "buckets")
  return tmp_path / "buckets"


def test_local_directories_are_absolute(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert str(paths.directory("runs/a")) == str(tmp_path / "runs/a")
  assert str(paths.directory("~/a")) == str(tmp_path / "home/a")
  assert str(paths.directory(pathlib.Path("/a/b"))) == "/a/b"
  assert not list(tmp_path.iterdir())


def test_a_bucket_stays_a_bucket(root):
  assert str(paths.directory("gs://mine/runs/a") / "checkpoints") == "gs://mine/runs/a/checkpoints"
  assert not paths.is_url("runs/gs:a") and paths.is_url("gs://mine")


@pytest.mark.parametrize("workdir, message", [
    ("gs://mine/a", "gs://mine/a needs gcsfs, which is not installed; pip install gcsfs"),
    ("gs://", "gs:// is no place .*; use gs://BUCKET/DIR or"),
    ("http://mine/a", "http://mine/a is no place .*; use gs://BUCKET/DIR or"),
    ("s3://mine/a", "orbax cannot save arrays to s3://; mount the bucket"),
])
def test_what_cannot_hold_a_run_is_named(monkeypatch, workdir, message):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=message):
    paths.directory(workdir)


def test_modes_that_need_a_disk_say_so():
  with pytest.raises(ValueError, match="--mode=study keeps its files on a local disk; give a local --workdir"):
    study.run(tiny.config(), study_plan.read("configs/study_cpu.py"), "gs://mine/a", "")
  with pytest.raises(ValueError, match="--mode=convert keeps its files on a local disk"):
    command.convert(tiny.config(), "hf:nowhere", "gs://mine/a")


def test_metrics_reach_the_bucket_at_evaluations_copies_and_the_end(root):
  steps = lambda: [row["step"] for row in metrics.read("gs://mine/run")]
  with metrics.Writer("gs://mine/run", 0) as writer:
    writer.write(1, "train", dict(loss=1.0))
    assert steps() == []
    writer.write(1, "eval", dict(nll=1.0))
    assert steps() == [1, 1]
    writer.write(2, "train", dict(loss=1.0))
    writer.copy()
    assert steps() == [1, 1, 2]
    writer.write(3, "train", dict(loss=1.0))
  assert steps() == [1, 1, 2, 3]
  with metrics.Writer("gs://mine/run", 2):
    assert steps() == [1, 1, 2]
  assert len(list((root / "mine/run/tensorboard").iterdir())) == 2


def test_a_bucket_that_fails_is_one_line(root, monkeypatch):
  with metrics.Writer("gs://mine/run", 0) as writer:
    def refuse(self, data):
      raise RuntimeError("403 forbidden\nand so on")

    with monkeypatch.context() as patch:
      patch.setattr(epath.Path, "write_bytes", refuse)
      with pytest.raises(OSError, match="cannot copy the metrics to gs://mine/run: RuntimeError 403 forbidden"):
        writer.copy()


def test_training_in_a_bucket_is_training_on_a_disk(root, tmp_path):
  data = dict(source=tiny.write_text(tmp_path), cache_dir=str(tmp_path / "cache"))
  config = lambda **train: tiny.config(tiny.BYTES, dict(data=data, train=train, optim=dict(schedule="constant")))
  loop.train(config(steps=2), "gs://mine/run")
  loop.train(config(steps=4), "gs://mine/run", report.finish)
  loop.train(config(steps=4), tmp_path / "run", report.finish)
  (_, step, ours), (_, wanted_step, wanted) = (checkpoint.load_variables(w) for w in ("gs://mine/run", tmp_path / "run"))
  assert step == wanted_step == 4
  jax.tree.map(np.testing.assert_array_equal, ours, wanted)
  rows = [row["step"] for row in metrics.read("gs://mine/run") if "train/loss" in row]
  assert rows == [row["step"] for row in metrics.read(tmp_path / "run") if "train/loss" in row]
  names = {file.name for file in (root / "mine/run").iterdir()}
  assert names | {"lock"} == {file.name for file in (tmp_path / "run").iterdir()}
  assert {"report.html", "run.json"} <= names
  assert checkpoint.load_pretrained("gs://mine/run") is None
  with checkpoint.Checkpoints("gs://mine/run", read_only=True) as checkpoints:
    assert str(checkpoints.directory) == "gs://mine/run/checkpoints"
