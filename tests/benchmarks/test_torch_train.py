"""The peer of the training benchmark learns its batch, and is asked for the model's shape."""

import json

import pytest

from benchmarks import torch_train
from benchmarks import train as train_throughput

SIZES = dict(vocab_size=61, d_model=96, num_heads=6, num_kv_heads=2, head_dim=16, d_ff=96, num_layers=2, seq_len=24,
             batch=2)
OPTIONS = [f"--{name}={value}" for name, value in SIZES.items()]


@pytest.mark.parametrize("remat", [0, 1])
def test_steps_are_timed_and_learn(capsys, remat):
  torch_train.main([*OPTIONS, "--rounds=9", f"--remat={remat}"])
  made = json.loads(capsys.readouterr().out)
  assert len(made["seconds"]) == 9 and min(made["seconds"]) > 0
  assert len(made["losses"]) == 9 + torch_train.WARM_UP
  assert made["losses"][-1] < made["losses"][0] - 0.05
  assert made["remat"] == bool(remat) and made["device"] == "cpu"


def test_every_size_is_needed():
  with pytest.raises(ValueError, match="--batch"):
    torch_train.parse(OPTIONS[:-1])


def test_the_benchmark_puts_it_beside_the_models(tmp_path, monkeypatch):
  monkeypatch.setattr(train_throughput, "CPU", {name: SIZES[name] for name in train_throughput.CPU})
  path = tmp_path / "tiny.json"
  train_throughput.main(["--models=vanilla", "--seq_len=24", "--batch=2", "--rounds=2", "--peer=1", "--xla_counts=0",
                         f"--out={path}"])
  record = json.loads(path.read_text())
  peer, vanilla = record["peer"], record["models"][0]
  assert peer["tokens_per_second"] == pytest.approx(48 / peer["wall_seconds"]["median"])
  assert peer["ours_to_peer"] == {"vanilla": pytest.approx(vanilla["tokens_per_second"] / peer["tokens_per_second"])}
  assert "flops_xla" not in vanilla and "mfu" not in vanilla


def test_a_peer_that_fails_says_why(monkeypatch):
  monkeypatch.setattr(train_throughput, "CPU", {name: SIZES[name] for name in train_throughput.CPU})
  args = train_throughput.parse(["--models=vanilla", "--seq_len=24", "--batch=2"])
  config = train_throughput.make_config("vanilla", args.models, args)
  with monkeypatch.context() as only_here:
    only_here.setattr(torch_train, "SIZES", torch_train.SIZES[:-1])
    with pytest.raises(OSError, match="--peer=1: error: .*required: --batch"):
      train_throughput.run_peer(config, rounds=1)
  monkeypatch.setattr(train_throughput, "PEER_SECONDS", 0.01)
  with pytest.raises(OSError, match="not done in 0.01 seconds"):
    train_throughput.run_peer(config, rounds=1)
