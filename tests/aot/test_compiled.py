"""Compiling for chips that are not there."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from mor import main
from mor.aot import chips
from mor.aot import compiled
from tests.helpers import tiny
from tests.house import test_main

ROOT = pathlib.Path(__file__).parents[2]
HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None


def run(*arguments):
  env = dict(os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", XLA_FLAGS="")
  return subprocess.run([sys.executable, "-m", "mor.main", "--mode=compile", *arguments], cwd=ROOT, env=env, check=False,
                        capture_output=True, text=True)


@pytest.mark.parametrize("given,said", [
    ((), "--mode=compile needs chips to compile for; give --topology="),
    (("--topology=v5e:2x2",), "--mode=compile needs a config"),
])
def test_what_is_missing_is_said(given, said, capsys):
  assert test_main.run("--mode=compile", *given) == main.WRONG
  assert said in capsys.readouterr().err


@pytest.mark.skipif(HAS_TPU_COMPILER, reason="the TPU compiler is installed")
def test_a_missing_compiler_names_the_package(capsys):
  given = ("--mode=compile", "--config=configs/quickstart.py", "--topology=v5e:2x2")
  assert test_main.run(*given) == main.WRONG
  assert capsys.readouterr().err == "error: the TPU compiler is not installed; run pip install 'mor[tpu]'\n"


@pytest.mark.aot
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="needs pip install 'mor[tpu]'")
def test_compiles_a_step_and_a_tick_for_a_tpu():
  done = run("--config=configs/quickstart.py", "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=-1")
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout)
  assert found["chips"] == 4 and found["mesh"]["fsdp"] == 4 and found["fits"]
  assert found["step"]["collectives"]["all-gather"]["bytes"] > 0
  assert found["step"]["hbm_bytes"]["total"] > 0 and found["tick"]["hbm_bytes"]["total"] > 0


def test_the_bound_is_the_slowest_of_three():
  config = tiny.config()
  figures = {"bytes": 8e9, "collectives": {"all-reduce": {"count": 1, "bytes": 6e9}, "all-gather": {"count": 2, "bytes": 3e9}}}
  bound = compiled.bound(config, chips.Chip(flops=1e12, memory=1, bandwidth=1e9, links=1e9), 4, figures)
  assert bound["memory_seconds"] == 8 and bound["collectives_seconds"] == 15 == bound["step_seconds"]
  assert bound["tokens_per_second"] == pytest.approx(4 * 12 / 15)
  whole = compiled.bound(config, chips.Chip(flops=1.0, memory=1, bandwidth=1e9, links=1e9), 4, figures)
  assert whole["step_seconds"] == whole["compute_seconds"] and 0 < whole["mfu"] < 1
