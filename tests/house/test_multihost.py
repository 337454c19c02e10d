"""A run of several processes is the run of one, whatever happens to them on the way."""

import os
import re
import signal

import jax
import numpy as np
import pytest

from mor import main
from mor.train import loop
from tests.helpers import processes
from tests.helpers import tiny

STEPS = 20


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
  """Runs of one tiny config, whose rows are made once; sizes split over two of each axis."""
  directory = tmp_path_factory.mktemp("multihost")
  data = dict(source=tiny.write_text(directory), cache_dir=str(directory / "cache"))
  train = dict(steps=STEPS, eval_every=7, checkpoint_every=3, keep_checkpoints=2, sample_prompt="")

  def make(name, **overrides):
    config = tiny.config(tiny.BYTES, dict(model=dict(vocab_size=264, num_layers=5), data=data, train=train), overrides)
    return processes.Run(directory / name, config)

  return make


@pytest.fixture(scope="module")
def alone(make_run):
  """The run of one process with one device."""
  run = make_run("alone")
  run.outcome = loop.train(run.config, run.workdir)
  return run


def assert_same(run, alone):
  """Losses, held-out figures' steps and state of the end."""
  assert list(run.losses()) == list(range(1, STEPS + 1))
  np.testing.assert_allclose(list(run.losses().values()), list(alone.losses().values()), rtol=1e-5)
  (ours, step), (theirs, _) = run.state(), alone.state()
  assert step == STEPS
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours.params, theirs.params)


def printed(started, index):
  """What a process says of the run, without the warnings of libraries."""
  said = "step |error|warning|stopped|resum|start|report"
  return [line for line in started.text(index).splitlines() if re.match(said, line)]


def test_two_processes_train_as_one(make_run, alone):
  run = make_run("two", mesh=dict(data=2))
  with run.start(2) as started:
    assert started.wait() == [0, 0], started.text(0) + started.text(1)
    assert "report: " in started.text(0) and printed(started, 1) == []
  assert_same(run, alone)
  assert (run.workdir / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count, mesh", [(2, dict(data=2, tensor=2)), (2, dict(data=1, tensor=4)), (4, dict(data=2, fsdp=2)),
                                         (4, dict(fsdp=2, tensor=2)), (4, dict(data=1, tensor=4))])
def test_any_number_of_processes_and_mesh_train_as_one(count, mesh, make_run, alone):
  name = f"{count}-{mesh}"
  if mesh.get("tensor") == 4:  # of two key heads, four devices cannot each have one
    alone = make_run(f"{name}-alone", model=dict(num_kv_heads=4))
    loop.train(alone.config, alone.workdir)
  run = make_run(name, mesh=mesh, model=dict(num_kv_heads=alone.config.model.num_kv_heads))
  with run.start(count) as started:
    assert started.wait() == [0] * count, started.text(0) + started.text(1)
  assert_same(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 3])
def test_a_killed_process_ends_all_and_fewer_go_on(victim, make_run, alone):
  run = make_run(f"killed-{victim}", mesh=dict(data=2, tensor=2))
  with run.start(4) as started:
    run.wait_for(8, started)
    started.processes[victim].kill()
    statuses = started.wait()
  assert statuses.pop(victim) == -signal.SIGKILL
  assert set(statuses) <= {main.LOST, -signal.SIGABRT}, statuses
  kept = run.saved()[-1]
  assert 3 <= kept < STEPS
  with run.start(2) as started:
    assert started.wait() == [0, 0]
    assert f"resuming at step {kept}" in started.text(0)
  assert_same(run, alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 3])
def test_a_signal_to_one_process_stops_all_at_one_step(victim, make_run, alone):
  run = make_run(f"stopped-{victim}", mesh=dict(data=2, tensor=2), train=dict(checkpoint_every=100))
  with run.start(4) as started:  # pairs of which have the same rows
    run.wait_for(5, started)
    started.processes[victim].send_signal(signal.SIGTERM)
    assert started.wait() == [main.STOPPED] * 4, started.text(0) + started.text(1)
    step, = run.saved()
    assert f"stopped at step {step} of {STEPS}" in started.text(0) and printed(started, 1) == []
  assert list(run.losses()) == list(range(1, step + 1)), "no step is lost, and none comes after"
  with run.start(2) as started:
    assert started.wait() == [0, 0]
    assert f"resuming at step {step}" in started.text(0)
  assert_same(run, alone)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_once(make_run, alone):
  run = make_run("damaged", mesh=dict(data=2), train=dict(checkpoint_every=5))
  with run.start(2) as started:
    run.wait_for(12, started)
    started.processes[1].send_signal(signal.SIGTERM)
    assert started.wait() == [main.STOPPED] * 2
  before, newest = run.saved()
  for path in (run.workdir / "checkpoints" / str(newest) / "state").rglob("*"):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)
  with run.start(2) as started:
    assert started.wait() == [0, 0], started.text(0)
    warning, = [line for line in printed(started, 0) if line.startswith("warning")]
    assert f"/{newest} is damaged" in warning and warning.endswith(f"/{before}")
    assert f"resuming at step {before}" in started.text(0) and printed(started, 1) == []
  assert (run.workdir / "checkpoints" / f"{newest}.damaged").is_dir()
  assert_same(run, alone)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(make_run):
  run = make_run("hung", mesh=dict(data=2), train=dict(steps=4000, checkpoint_every=4000, step_timeout=4.0))
  with run.start(2) as started:
    run.wait_for(5, started)
    started.processes[1].send_signal(signal.SIGSTOP)
    assert started.processes[0].wait(60) == main.LOST, started.text(0)
    assert "error: no step has finished since step" in started.text(0) and "in _read" in started.text(0)
