"""Tables come from the results and nothing else of the text changes."""

import json

import pytest

from benchmarks import harness
from benchmarks import tables

RECORD = dict(
    benchmark="train_throughput", command="python -m benchmarks.train --pin=0", commit="abc123",
    device="cpu", processor="A Processor", cores=4, cores_used=1, dtype="float32", jax="9.9", clock="cpu", rounds=7,
    load_average=0.25,
    sizes=dict(batch=3, seq_len=12, num_layers=8, d_model=20, vocab_size=61))


def _row(model, ratio):
  spread = dict(min=ratio - 0.1, median=ratio, max=ratio + 0.2)
  return dict(model=model, parameters_non_embedding=3_200_000, cpu_seconds=dict(spread, median=1.23456),
              cpu_ratio=spread, flops_ratio=0.8, flops_executed_ratio=0.75, step_per_flops=1.05,
              step_per_flops_executed=1.12, peak_memory_bytes_ratio=0.7)


@pytest.fixture
def directory(tmp_path):
  (tmp_path / "speed.json").write_text(json.dumps(RECORD | dict(models=[_row("vanilla", 1.0), _row("mor-r2", 0.84)])))
  return tmp_path


def test_a_table_replaces_what_stood_there(directory):
  text = "before\n<!-- table:speed -->\nold\nrows\n<!-- end -->\nafter\n<!-- end -->\n"
  new = tables.rewrite(text, directory)
  lines = new.splitlines()
  assert new.startswith("before\n<!-- table:speed -->\n| model |")
  assert new.endswith("\n<!-- end -->\nafter\n<!-- end -->\n")
  assert "old" not in new
  assert lines[5] == ("| mor-r2 | 3.2M | 1.23 | 0.840 (0.740–1.040) | 0.800, 0.750 | 1.050, 1.120 | 0.700 |")
  assert "3 x 12 tokens" in new and "7 rounds in turn, cpu time, load average 0.2." in new
  assert "A Processor, 1 of 4 cores, float32, JAX 9.9, commit abc123:" in new
  assert f"`{RECORD['command']}`" in lines
  assert tables.rewrite(new, directory) == new


@pytest.mark.parametrize("text, message", [
    ("<!-- table:speed -->\n", "has no <!-- end -->"),
    ("<!-- table:speed -->\n<!-- table:speed -->\n<!-- end -->", "has no <!-- end -->"),
    ("<!-- table:slow -->\n<!-- end -->", "table:slow has no .*slow.json; run its benchmark"),
])
def test_bad_marks_are_named(directory, text, message):
  with pytest.raises(ValueError, match=message):
    tables.rewrite(text, directory)


def _spread(median):
  return dict(min=median - 1, median=median, max=median + 1)


def test_engines_show_their_gain_and_its_ceiling(tmp_path):
  row = lambda name, rate: dict(variant=name, tokens_per_second=_spread(rate),
                                metrics=dict(mean_depth=2.0, slot_utilisation=0.98765))
  gain = dict(routed="balanced-r3", gain=_spread(1.2), ceiling=1.25, ceiling_one_pass=1.2)
  record = RECORD | dict(
      benchmark="decode_throughput", sizes=dict(shape="135m", mix="plain", rounds=5),
      batches=[dict(batch=16, variants=[row("never-r3", 300), row("balanced-r3", 360)], gains=[gain])])
  (tmp_path / "decode.json").write_text(json.dumps(record))
  lines = tables.table("decode", tmp_path).splitlines()
  assert lines[2:4] == ["| 16 | never-r3 | 300 (299–301) | 2.00 | 0.988 |  |  |",
                        "| 16 | balanced-r3 | 360 (359–361) | 2.00 | 0.988 | 1.200 | 1.200 (1.000) / 1.250 (0.960) |"]
  assert "135m shape, plain requests, random weights; medians of 5 rounds in turn" in lines[5]


def test_peers_show_their_ratio_to_the_best(tmp_path):
  rates = {"vanilla bfloat16": _spread(330), "hf-bfloat16": _spread(300), "llamacpp-bfloat16": _spread(200)}
  record = RECORD | dict(benchmark="decode_throughput", sizes=dict(shape="135m", mix="plain", rounds=5),
                         peers=[dict(batch=16, best_peer="hf-bfloat16", tokens_per_second=rates)])
  (tmp_path / "peers.json").write_text(json.dumps(record))
  lines = tables.table("peers", tmp_path).splitlines()
  assert lines[2] == "| 16 | vanilla bfloat16 | 330 (329–331) | 1.10 |"


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_pages_show_the_committed_results(page):
  text = page.read_text(encoding="utf-8")
  assert tables.rewrite(text, harness.DIRECTORY) == text, "run python -m benchmarks.tables"


def test_a_known_peak_and_a_peer_add_columns_and_a_row(tmp_path):
  rows = [_row(model, ratio) | dict(tokens_per_second=rate, mfu=mfu, peak_memory_bytes=100)
          for model, ratio, rate, mfu in (("vanilla", 1.0, 45_678.9, 0.55), ("mor-r2", 0.84, 60_000.0, 0.54))]
  peer = dict(program="Peer", torch="2.0", wall_seconds=dict(median=1.5), tokens_per_second=30_000.0, mfu=0.4,
              peak_memory_bytes=150)
  (tmp_path / "speed.json").write_text(json.dumps(RECORD | dict(models=rows, peer=peer)))
  lines = tables.rewrite("<!-- table:speed -->\n<!-- end -->\n", tmp_path).splitlines()
  assert lines[1].endswith("| peak memory ratio | tokens/s | MFU |")
  assert lines[3].endswith("| 0.700 | 45,679 | 0.550 |")
  assert lines[5] == "| Peer, PyTorch 2.0 | 3.2M | 1.5 | 1.523 |  |  | 1.500 | 30,000 | 0.400 |"


def test_every_result_is_on_a_page(monkeypatch, tmp_path):
  (tmp_path / "hidden.json").write_text(json.dumps(RECORD))
  page = tmp_path / "page.md"
  page.write_text("no table")
  monkeypatch.setattr(tables, "pages", lambda: [page])
  monkeypatch.setattr(harness, "DIRECTORY", tmp_path)
  with pytest.raises(ValueError, match="no page shows benchmarks/results/hidden.json; add <!-- table:hidden -->"):
    tables.main([])
