"""The benchmark times the real step and counts what XLA and the calculator count."""

import json
import subprocess
import sys

import pytest

from benchmarks import train as train_throughput

TINY = dict(vocab_size=61, d_model=64, num_heads=6, num_kv_heads=2, head_dim=16, d_ff=224, num_layers=4)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
  path = tmp_path_factory.mktemp("throughput") / "out" / "tiny.json"
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(train_throughput, "CPU", TINY)
    train_throughput.main(["--models=vanilla,mor-r2", "--seq_len=72", "--batch=3", "--rounds=3", f"--out={path}"])
  return json.loads(path.read_text())


def test_record_says_how_it_was_made(record):
  assert record["command"].startswith("python -m benchmarks.train --models=vanilla,mor-r2 --seq_len=72")
  assert record["device"] == "cpu" and record["dtype"] == "float32" and record["clock"] == "wall"
  assert record["sizes"] == TINY | dict(size="cpu", seq_len=72, batch=3, dtype="float32", remat="none", scan_layers=0,
                                          loss_block=2048)
  assert {"commit", "cores", "cores_used", "jax", "processor"} <= set(record)


def test_ratios_are_to_the_first_model_round_by_round(record):
  vanilla, mor = record["models"]
  assert [vanilla["model"], mor["model"]] == ["vanilla", "mor-r2"]
  for clock in ("wall", "cpu"):
    assert vanilla[f"{clock}_ratio"] == dict(min=1.0, median=1.0, max=1.0)
    least, greatest = mor[f"{clock}_seconds"]["min"], mor[f"{clock}_seconds"]["max"]
    base = vanilla[f"{clock}_seconds"]
    ratio = mor[f"{clock}_ratio"]
    assert least / base["max"] <= ratio["min"] <= ratio["median"] <= ratio["max"] <= greatest / base["min"]
  assert mor["step_ratio"] == mor["wall_ratio"]["median"]
  assert mor["step_per_flops"] == mor["step_ratio"] / (mor["flops"] / vanilla["flops"])


def test_the_steps_route_by_capacity(record):
  assert record["models"][0]["load"] == {}
  assert record["models"][1]["load"] == pytest.approx({"load_1": 1, "load_2": 1 / 2})


def test_memory_holds_the_state_and_the_batch(record):
  vanilla, _ = record["models"]
  params = vanilla["parameters_embedding"] + vanilla["parameters_non_embedding"]
  batch_bytes = 3 * 72 * (3 * 4 + 1)
  assert vanilla["memory_bytes"]["argument"] == pytest.approx(3 * 4 * params + batch_bytes, abs=64)
  # The donated state takes its place once; beside it come out scalars and pointers.
  temporary = vanilla["memory_bytes"]["temp"]
  assert vanilla["peak_memory_bytes"] - temporary == pytest.approx(3 * 4 * params + batch_bytes, abs=1024)


def test_xla_counts_what_is_executed(record):
  for row in record["models"]:
    assert row["flops_xla"] == pytest.approx(row["flops_executed"], rel=0.06)  # XLA also counts what is element-wise
    assert row["flops"] < 0.98 * row["flops_executed"]


def test_xla_counts_every_layer_and_block_of_a_loop(record, monkeypatch):
  monkeypatch.setattr(train_throughput, "CPU", TINY)
  args = train_throughput.parse(["--models=vanilla", "--seq_len=72", "--batch=3", "--scan_layers=1", "--loss_block=27"])
  config = train_throughput.make_config("vanilla", args.models, args)
  assert config.train.loss_block == 27
  row = train_throughput.step_costs(train_throughput.make_runner("vanilla", config))
  assert row["flops_xla"] == record["models"][0]["flops_xla"]


@pytest.mark.parametrize("size, layers", [("cpu", 14), ("135m", 38), ("360m", 38)])
def test_all_models_are_equally_deep(size, layers):
  args = train_throughput.parse([f"--models={','.join(train_throughput.MODELS)}", f"--size={size}"])
  models = [train_throughput.make_config(name, args.models, args).model for name in args.models]
  assert {model.num_layers for model in models} == {layers}
  assert {model.d_model for model in models} == {256 if size == "cpu" else {"135m": 576, "360m": 960}[size]}
  assert len({(model.sharing, model.num_recursions, model.kv_plan, model.router) for model in models}) == len(models)


@pytest.mark.parametrize("options, message", [
    ("--models=vanilla,mor-r7", "'mor-r7' is not a model; use some of mor-r2"),
    ("--models=vanilla,vanilla", "names a model twice"),
    ("--rounds=0", "--rounds=0; use 1 or more"),
    ("--batch=0", "data.batch_size=0; use at least 1 row"),
    ("--pin=4096", "--pin=4096 is not a core of this process"),
    ("--speed=9", "unrecognized arguments: --speed=9"),
])
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    train_throughput.main(options.split())


def test_the_command_fails_in_one_line():
  done = subprocess.run([sys.executable, "-m", "benchmarks.train", "--models=big"],
                        capture_output=True, text=True)
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith("error: --models: 'big' is not a model") and done.stderr.count("\n") == 1
