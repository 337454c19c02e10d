"""Figures are drawn from results, and a missing result is named."""

import json

import pytest

from benchmarks import figures
from benchmarks import harness
from benchmarks import quickstart
from benchmarks import tables

RECORD = dict(benchmark="quickstart", command="python -m benchmarks.quickstart", commit="abc", device="cpu",
              processor="A Processor", cores=2, cores_used=2, dtype="float32", jax="9.9", mean_depth=1.75,
              sizes=dict(steps=7, batch=4, seq_len=12, num_recursions=3), parts=["one ", "two ", "three "],
              depths=[1, 2, 3], summary=dict(bpb_causal=1.5, bpb_oracle=1.25, bpb_xz=2.0, bpb_gzip=2.5,
                                             params=1234, train_tokens=336))


def test_depth_picture_shows_the_depths():
  flat = figures.depth(RECORD | dict(depths=[1, 1, 1]))
  picture = figures.depth(RECORD)
  assert picture.startswith(b"\x89PNG") and picture != flat


def exits_row(variant, speed, equal):
  spread = dict(min=speed - 0.125, median=speed, max=speed + 0.125)
  return dict(variant=variant, tokens_per_second=dict(spread, median=30 * speed), to_full=spread, exit_rate=0.5,
              acceptance=None, confirmed_per_token=0.25, agreement=dict(equal=equal, prefix=0.1), nll=2.5,
              scores=dict(squad=dict(num=10, f1=0.3125, exact=0.25)))


EXITS = RECORD | dict(benchmark="early_exit", model="runs/some", sizes=dict(
    after=[10], prompt_tokens=24, new_tokens=96, rounds=5), batches=[dict(batch=1, variants=[
        exits_row("full", 1.0, 1.0), exits_row("trust-0.3", 1.5, 0.5), exits_row("trust-0.6", 1.25, 0.75)])])


def test_early_exit_is_drawn_by_speed_and_agreement():
  picture = figures.early_exit(EXITS)
  slower = EXITS | dict(batches=[dict(batch=1, variants=[exits_row("full", 1.0, 1.0), exits_row("trust-0.3", 1.2, 0.5)])])
  assert picture.startswith(b"\x89PNG") and picture != figures.early_exit(slower)


def test_table_of_early_exit(tmp_path):
  (tmp_path / "exits.json").write_text(json.dumps(EXITS))
  text = tables.table("exits", tmp_path)
  assert "| 1 | trust-0.3 | 45.0 | 1.50 (1.38–1.62) | 0.50 |  | 0.25 | 0.50 | 2.50 | 0.312 |  |" in text
  assert "runs/some, exits after [10]; 24 prompt and 96 new tokens, medians of 5 rounds in turn." in text


def test_a_missing_result_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(harness, "DIRECTORY", tmp_path)
  monkeypatch.setattr(figures, "DOCS", tmp_path / "docs")
  with pytest.raises(ValueError, match="docs/depth.png has no .*quickstart.json; run its benchmark"):
    figures.main([])


def test_table_of_the_quickstart(tmp_path):
  (tmp_path / "quickstart.json").write_text(json.dumps(RECORD))
  text = tables.table("quickstart", tmp_path)
  assert "| this model, causal routing | 1.500 |" in text
  assert "1,234 parameters, 7 steps of 4 x 12 tokens (336 in all), mean depth 1.75 of 3." in text


def test_an_unfinished_quickstart_is_named(tmp_path):
  with pytest.raises(ValueError, match="summary.json is not there; train to the end first"):
    quickstart.main([f"--workdir={tmp_path}"])
