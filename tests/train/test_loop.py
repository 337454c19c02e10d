"""Interrupted or not, a run ends with the same numbers; a bad one keeps the last good state."""

import functools
import json
import os
import signal
from unittest import mock

import jax
import numpy as np
import pytest

from mor import checkpoint
from mor import report
from mor import sharding
from mor.model import depths
from mor.train import loop
from mor.train import metrics
from mor.train import signals
from mor.train import step as step_lib
from tests.helpers import tiny


@pytest.fixture(scope="module", autouse=True)
def traced_once():
  """One traced step for all runs of a config."""
  with mock.patch.object(step_lib, "make_train_step", functools.cache(step_lib.make_train_step)):
    yield


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
  """Tiny runs on one small text, whose rows are made once."""
  directory = tmp_path_factory.mktemp("text")
  data = dict(source=tiny.write_text(directory), cache_dir=str(directory / "cache"))
  return lambda **overrides: tiny.config(tiny.BYTES, dict(data=data), overrides)


@pytest.fixture(scope="module")
def straight(make_config, tmp_path_factory):
  """A run of 5 steps from beginning to end."""
  workdir = tmp_path_factory.mktemp("straight")
  return workdir, loop.train(make_config(), workdir, report.finish)


def final_state(config, workdir):
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    return loop.restore_or_init(config, sharding.make_mesh(config.mesh), checkpoints)


def without_speed(rows):
  return [{k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in rows]


def signal_at(monkeypatch, step, number=signal.SIGTERM):
  """Sends this process a signal when the loop has dispatched `step`."""
  put = loop._Log.put

  def hook(log, at, values):
    put(log, at, values)
    if at == step:
      os.kill(os.getpid(), number)

  monkeypatch.setattr(loop._Log, "put", hook)


def test_a_run_leaves_a_report_and_each_step_once(straight, make_config):
  workdir, outcome = straight
  assert outcome.step == 5 and outcome.summary["step"] == 5
  rows = metrics.read(workdir)
  assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5]
  assert [row["step"] for row in rows if "eval/bpb_causal" in row] == [3, 5]
  assert json.loads((workdir / "summary.json").read_text()) == outcome.summary
  for name in ("causal", "oracle", "gzip -9", "xz -9"):
    assert name in outcome.text
  assert {"bpb_causal", "bpb_oracle", "bpb_gzip", "bpb_xz", "agreement", "params"} <= set(outcome.summary)
  assert (workdir / "report.html").stat().st_size > 1000 and (workdir / "report.png").exists()
  state, _ = final_state(make_config(), workdir)
  assert outcome.summary["params"] == sum(x.size for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_bitwise(number, straight, make_config, tmp_path, monkeypatch):
  before = signal.getsignal(number)
  with monkeypatch.context() as patched:
    signal_at(patched, 3, number)
    outcome = loop.train(make_config(), tmp_path)
  assert outcome.step == 3 and outcome.summary is None and "run the same command" in outcome.text
  assert signal.getsignal(number) == before, "our handler is gone"
  assert loop.train(make_config(), tmp_path).step == 5

  (ours, step), (theirs, _) = final_state(make_config(), tmp_path), final_state(make_config(), straight[0])
  assert step == 5 and int(ours.step) == 5
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert without_speed(metrics.read(tmp_path)) == without_speed(metrics.read(straight[0]))


@pytest.mark.slow
def test_a_run_that_draws_its_recursions_resumes_bitwise(make_config, tmp_path, monkeypatch):
  config = make_config(model=dict(router=tiny.FIXED, recursions_train=dict(distribution="poisson", most=4)))
  loop.train(config, tmp_path / "straight")
  with monkeypatch.context() as patched:
    signal_at(patched, 3)
    assert loop.train(config, tmp_path / "stopped").step == 3
  assert loop.train(config, tmp_path / "stopped").step == 5
  (ours, _), (theirs, _) = final_state(config, tmp_path / "stopped"), final_state(config, tmp_path / "straight")
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  rows = [metrics.read(tmp_path / name) for name in ("stopped", "straight")]
  assert without_speed(rows[0]) == without_speed(rows[1])
  drawn = [depths.draw(config.model, config.seed, step) for step in range(5)]
  assert [row["train/recursions"] for row in rows[0] if "train/loss" in row] == drawn and len(set(drawn)) > 1


def test_a_finished_run_does_not_train_again(straight, make_config, monkeypatch):
  workdir, outcome = straight
  monkeypatch.setattr(step_lib, "make_train_step", lambda *unused: pytest.fail)
  again = loop.train(make_config(), workdir, report.finish)
  assert (again.step, again.summary) == (5, outcome.summary)


def poison(monkeypatch, change):
  """Lets `change(state, values)` replace what step 3, the fourth, returns."""
  make = step_lib.make_train_step

  def poisoned(config, mesh, teacher):
    train_step = make(config, mesh, teacher)

    def step_fn(state, batch, step):
      state, values = train_step(state, batch, step)
      return change(state, values) if step == 3 else (state, values)

    step_fn.must_compile = train_step.must_compile
    return step_fn

  monkeypatch.setattr(step_lib, "make_train_step", poisoned)


@pytest.mark.parametrize("bad", ["loss", "grad_norm"])
def test_a_step_that_is_not_finite_stops_the_run_and_is_not_saved(bad, make_config, tmp_path, monkeypatch):
  poison(monkeypatch, lambda state, values: (state, {**values, bad: values[bad] * np.nan}))
  with pytest.raises(FloatingPointError, match=f"{bad}=nan .*at step 4, so nothing was saved after"):
    loop.train(make_config(), tmp_path)  # step 4 would have been saved
  with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step() == 2


@pytest.mark.parametrize("value", [np.nan, 2e5])
def test_a_state_that_has_diverged_is_not_saved(value, make_config, tmp_path, monkeypatch):
  def break_params(state, values):  # the update breaks the parameters; its loss and gradient are finite
    params = {**state.params, "embedding": state.params["embedding"].at[1, 2].set(value)}
    return state.replace(params=params), values

  poison(monkeypatch, break_params)
  with pytest.raises(FloatingPointError, match="params/embedding of the state after step 4 .* was not saved; lower"):
    loop.train(make_config(), tmp_path)
  with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step() == 2


@pytest.mark.slow
def test_a_rate_that_is_absurd_saves_nothing(make_config, tmp_path):
  with pytest.raises(FloatingPointError, match="of the state after step 1 .* was not saved"):
    loop.train(make_config(optim=dict(learning_rate=1e9), train=dict(checkpoint_every=1)), tmp_path)
  with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
    assert checkpoints.latest_step() is None


def test_an_evaluation_that_is_not_finite_stops_the_run(make_config, tmp_path, monkeypatch):
  monkeypatch.setattr(loop, "make_evaluate", lambda *unused: lambda state: dict(nll_causal=float("nan")))
  with pytest.raises(FloatingPointError, match="nll_causal=nan in the evaluation of step 3"):
    loop.train(make_config(), tmp_path)
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_metrics_are_read_one_step_late(make_config, tmp_path, monkeypatch):
  read = []
  monkeypatch.setattr(loop._Log, "_read", lambda log, step, values: read.append(step))
  config = make_config()
  with metrics.Writer(tmp_path, 0) as writer:
    log = loop._Log(config, sharding.make_mesh(config.mesh), writer, metrics.Progress(0, 5), signals.Watchdog(0),
                    signals.Stop())
    log.put(1, {})
    assert read == []
    log.put(2, {})
    assert read == [1]
    log.flush()
    log.flush()
    assert read == [1, 2]


def test_another_config_is_refused_and_nothing_is_lost(straight, make_config):
  with pytest.raises(ValueError, match=r"another config: model.d_ff=30 \(there 28\)"):
    loop.train(make_config(model=dict(d_ff=30)), straight[0])
  assert final_state(make_config(), straight[0])[1] == 5


def test_bad_data_leaves_no_workdir(make_config, tmp_path):
  with pytest.raises((ValueError, OSError), match="nowhere.txt"):
    loop.train(make_config(data=dict(source="nowhere.txt")), tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_a_second_signal_interrupts():
  with signals.Stop() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_finished_wsd_run_trains_longer_as_if_it_had_always_been_to(make_config, tmp_path, capsys):
  """It keeps the checkpoint before its cooldown, with the optimizer's state."""
  save = dict(checkpoint_every=100, eval_every=100, keep_checkpoints=1)
  loop.train(make_config(train=dict(steps=5, **save)), tmp_path / "run")
  assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["4", "5"]
  longer = make_config(train=dict(steps=7, **save))
  loop.train(longer, tmp_path / "run")
  assert "resuming at step 4" in capsys.readouterr().err
  loop.train(longer, tmp_path / "straight")
  (ours, step), (theirs, _) = final_state(longer, tmp_path / "run"), final_state(longer, tmp_path / "straight")
  assert step == 7
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
