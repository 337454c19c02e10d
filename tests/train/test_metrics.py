"""Every step is written once, whatever happened in between."""

import json
import pathlib
import time

import pytest
from tensorboard.backend.event_processing import event_accumulator

from mor.train import metrics


def write(workdir, start, stop):
  with metrics.Writer(workdir, start) as writer:
    for step in range(start + 1, stop + 1):
      writer.write(step, "train", dict(loss=float(step), run=float(start)))
      if step % 2 == 0:
        writer.write(step, "eval", dict(nll=step / 2))


def test_a_resumed_run_has_each_step_once(tmp_path):
  write(tmp_path, 0, 5)
  with (tmp_path / "metrics.jsonl").open("a") as lines:
    lines.write('{"step": 6, "train/lo')  # killed here
  write(tmp_path, 3, 6)
  rows = metrics.read(tmp_path)
  assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
  assert [r["train/run"] for r in rows if "train/loss" in r] == [0, 0, 0, 3, 3, 3]
  assert [r["step"] for r in rows if "eval/nll" in r] == [2, 4, 6]


def test_tensorboard_shows_the_resumed_run_once(tmp_path):
  write(tmp_path, 0, 5)
  write(tmp_path, 3, 6)
  board = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
  board.Reload()
  assert [(e.step, e.value) for e in board.Scalars("train/run")] == [(s, 0) for s in (1, 2, 3)] + [
      (s, 3) for s in (4, 5, 6)]


def test_a_disabled_writer_writes_nothing(tmp_path):
  with metrics.Writer(tmp_path / "other", 0, enabled=False) as writer:
    writer.write(1, "train", dict(loss=1.0))
  assert not (tmp_path / "other").exists() and metrics.read(tmp_path / "other") == []


def full(*unused_args, **unused_kwargs):
  raise OSError(28, "No space left on device")


FULL = "cannot write .*/metrics.jsonl: No space left on device; free some space and run the same command again"


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
  writer = metrics.Writer(tmp_path, 0)
  monkeypatch.setattr(writer._events, "flush", full)
  with pytest.raises(OSError, match=FULL):
    writer.write(1, "train", dict(loss=1.0))


def test_a_disk_that_is_full_before_and_at_the_end_is_one_line(tmp_path, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError, match=FULL):
      metrics.Writer(tmp_path, 0)
  with pytest.raises(OSError, match=FULL):
    with metrics.Writer(tmp_path, 0) as writer:
      monkeypatch.setattr(writer._events, "close", full)
  with pytest.raises(ValueError, match="the first error"):
    with metrics.Writer(tmp_path, 0) as writer:
      monkeypatch.setattr(writer._events, "close", full)
      raise ValueError("the first error")


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "tensorboard").write_text("a file")
  with pytest.raises(OSError, match="cannot write .*/metrics.jsonl: File exists; make its directory writable"):
    metrics.Writer(tmp_path, 0)


@pytest.mark.parametrize("line", [b"5", b"null", b"[]", b"{}", b'{"step": 1', b'{"step": "1"}', b'{"step": true}', b"\xff\xfe",
                                  b'{"step": 1, "train/loss": "x"}', b"[" * 100_000])
def test_a_damaged_line_is_named_but_for_the_last(line, tmp_path):
  write(tmp_path, 0, 2)
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  path.write_bytes(whole + line)  # the process was killed here
  assert len(metrics.read(tmp_path)) == 3
  path.write_bytes(line + b"\n" + whole)
  with pytest.raises(ValueError, match=f"{path} line 1 is not a JSON object .*; delete that line") as caught:
    metrics.Writer(tmp_path, 1)
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
  assert path.read_bytes() == line + b"\n" + whole


@pytest.mark.parametrize("kind, peak", [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12),
                                        ("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("cpu", None)])
def test_peaks_of_devices(kind, peak):
  assert metrics.peak_flops(kind) == peak


def test_throughput_counts_steps_between_restarts(monkeypatch):
  now = [10.0]
  monkeypatch.setattr(time, "perf_counter", lambda: now[0])
  meter = metrics.Throughput(tokens_per_step=48, flops_per_token=lambda step: step * 5e8, device_kind="NVIDIA H200", num_devices=2)
  assert meter.read(1) == {}
  now[0] += 4
  assert meter.read(3) == pytest.approx(dict(tokens_per_second=24, mfu=24 * (2 + 3) / 2 * 5e8 / (2 * 989e12)))
  meter.pause()
  assert not meter.running
  now[0] += 100
  meter.restart(3)
  now[0] += 1
  assert meter.read(4)["tokens_per_second"] == 48
  on_cpu = metrics.Throughput(48, lambda step: 1e9, "cpu", 1)
  on_cpu.restart(0)
  now[0] += 1
  assert on_cpu.read(1) == dict(tokens_per_second=48)


def test_without_a_terminal_progress_is_plain_lines(capsys, monkeypatch):
  now = iter((5.0, 14.0))
  monkeypatch.setattr(time, "perf_counter", lambda: next(now))
  with metrics.Progress(0, 120) as shown:
    shown.step(1)
    shown.step(2)
    shown.show(10, dict(loss=1.25, tokens_per_second=12345.0, other=3))
    shown.say("[saved] /tmp/x")
  err = capsys.readouterr().err.splitlines()
  assert err[0].startswith("step 10/120  loss 1.2500  tok/s 12,345  left 1:50")
  assert err[1] == "[saved] /tmp/x" and len(err) == 2


def test_lines_are_json(tmp_path):
  write(tmp_path, 0, 2)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[0]) == {"step": 1, "train/loss": 1.0, "train/run": 0.0} and len(lines) == 3
