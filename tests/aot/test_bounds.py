"""Full-size ticks, compiled for chips that are not there, stay within bounds: no loop, no copy, little memory."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMPILERS = {"tpu": ("libtpu", "mor[tpu]"), "gpu": ("jax_plugins", "mor[aot-gpu]")}  # module, what installs it

pytestmark = pytest.mark.aot


def compile_cell(tmp_path, chip, num_slots, program="tick"):
  """Returns the figures of a program of mor-360m-r3, compiled in a process without the flags of the tests."""
  module, extra = COMPILERS["gpu" if chip.startswith("h") else "tpu"]
  if importlib.util.find_spec(module) is None:
    pytest.skip(f"needs pip install '{extra}'")
  env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="")
  command = [sys.executable, "-m", "benchmarks.aot_decode", "--models=mor-360m-r3", f"--slots={num_slots}",
             f"--chips={chip}", f"--program={program}", f"--texts={tmp_path}", f"--out={tmp_path}/cell.json"]
  done = subprocess.run(command, cwd=ROOT, env=env, check=False, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  cell, = json.loads((tmp_path / "cell.json").read_text(encoding="utf-8"))["cells"]
  assert "error" not in cell, cell["error"]
  return cell


@pytest.mark.parametrize("chip,num_slots", [("v5e", 32), ("v5e", 128), ("h200", 32)])
def test_a_tick_has_no_loop_over_pages_and_copies_no_pool(tmp_path, chip, num_slots):
  cell = compile_cell(tmp_path, chip, num_slots)
  a_tick, beside = cell["a_tick"], cell["beside"]
  assert a_tick["loops"] == a_tick["known_loops"] == 0 and beside["known_loops"] == 1  # that of the ticks
  assert a_tick["pool_copies"] == beside["pool_copies"] == 0
  assert cell["temporaries_of_pool"] < 0.05
  if chip == "h200":
    assert a_tick["operations"] <= 300 and a_tick["predicates"] == beside["predicates"] == 0
  else:
    assert cell["cycles_ratio"] <= 2


@pytest.mark.parametrize("chip", ["v5e", "h200"])
def test_a_prefill_of_many_prompts_copies_no_pool(tmp_path, chip):
  cell = compile_cell(tmp_path, chip, 32, "prefill")
  assert cell["pool_copies"] == 0 and cell["temporaries_of_pool"] < 0.1
  assert cell["operations"] < (1000 if chip == "h200" else 2500)
