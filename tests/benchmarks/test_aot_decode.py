"""The table of programs compiled for chips that are not there."""

import json

import pytest

from benchmarks import aot_decode
from configs import paper
from mor import config as config_lib

CELL = {
    "model": "mor-360m-r3", "num_slots": 32, "chip": "v5e", "when": "after", "temporaries": 2e6,
    "temporaries_of_pool": 0.001, "bytes": 1.4e9, "bytes_ratio": 2.0, "cycles_seconds": 0.0012, "cycles_ratio": 1.5,
    "a_tick": {"operations": 558.0, "loops": 0.0, "predicates": 0.0, "pool_copies": 0.0}}


def record(program, *cells):
  return {"sizes": {"program": program}, "cells": list(cells)}


@pytest.mark.parametrize("num_slots,turns", [(32, 13.5), (128, 12.875)])
def test_groups_of_rows_are_as_long_as_their_longest(num_slots, turns):
  """Rows of 16, 11 and 6 pages as 3 to 2 to 1; sorted groups of 8 have 16, 16, 11, 11 with 32 slots."""
  model = config_lib.from_config_dict(paper.get_config("mor-360m-r3")).model
  assert aot_decode.mean_turns(model, num_slots) == turns


def test_a_row_for_a_cell():
  head, tpu, gpu, failed = aot_decode.table(record(
      "tick", CELL, {k: v for k, v in CELL.items() if "cycles" not in k} | {"chip": "h200"},
      {"model": "mor-360m-r3", "num_slots": 128, "chip": "v5e", "when": "before",
       "error": "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (21.00G) exceeds available HBM (15.75G)."}))
  assert len(head) == len(tpu) == len(gpu) == len(failed)
  assert tpu[4:] == ["558", "0", "-", "0", "2 (0.1%)", "1.40 (2.0)", "1.20 (1.5)"]
  assert gpu[6] == "0" and gpu[-1] == "-"
  assert failed[4] == "does not compile: needs 21.00G of 15.75G"


def test_calls_of_a_prefill_are_added_up():
  cell = {k: v for k, v in CELL.items() if k != "a_tick"} | {"operations": 500.0, "pool_copies": 3.0, "calls": 8}
  head, row = aot_decode.table(record("prefill", cell))
  assert len(head) == len(row) and row[4:7] == ["8", "4,000", "24"] and row[-2:] == ["11.20 (16.0)", "9.60 (12.0)"]


def test_a_text_that_is_there_is_not_compiled_again(tmp_path, monkeypatch):
  monkeypatch.setattr(aot_decode, "make_setup", lambda *given: None)
  (tmp_path / "tick-mor-360m-r3-b32-v5e-4652a6b.json").write_text(json.dumps({"error": "too\n large"}))
  args = type("Args", (), {"texts": str(tmp_path), "program": "tick"})
  cell = aot_decode.measure("mor-360m-r3", 32, "v5e", True, "0", args)
  assert cell["error"] == "too large" and cell["commit"] == aot_decode.BEFORE


def test_a_chip_that_is_not_listed_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no chip 'v4'; use v5e, v6e, h100, h200"):
    aot_decode.main(["--chips=v5e,v4", f"--texts={tmp_path}"])
