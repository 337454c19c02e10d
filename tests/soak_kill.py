"""Kills a run at random moments, reruns it, and compares it with one left alone.

  python -m tests.soak_kill --kills=10
  python -m tests.soak_kill --kills=10 --processes=4
  python -m tests.soak_kill --kills=100 --steps=300 --processes=2

Prints one JSON object; exit status 1 unless parameters, optimizer state and
metrics are bitwise equal. A third of the kills fall on the start, a third on a
step, a third on a save. Of several processes one is killed, any of them; the others
have GRACE seconds to notice and end, as a launcher would have it, and all are started
again. Some minutes; run by hand.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from mor import checkpoint
from mor import config as config_lib
from mor import sharding
from mor.train import loop
from mor.train import metrics
from tests.helpers import processes
from tests.helpers import tiny

FIELDS = {
    "model.vocab_size": 3001, "model.d_model": 96, "model.num_heads": 4, "model.num_kv_heads": 2, "model.head_dim": 12,
    "model.d_ff": 200, "model.num_layers": 5, "data.tokenizer": "bytes", "data.seq_len": 24, "data.batch_size": 4,
    "data.validation_fraction": 0.2, "train.log_every": 1, "train.eval_every": 7,
    "train.eval_rows": 4, "train.checkpoint_every": 2, "train.sample_tokens": 3}
MOMENTS = ("save", "step", "start")
GRACE = 30


class Run:
  """A workdir, and `count` processes that train in it."""

  def __init__(self, directory: pathlib.Path, name: str, count: int, steps: int):
    self.workdir, self.count = directory / name, count
    fields = {**FIELDS, "train.steps": steps, "data.source": tiny.write_text(directory),
              "data.cache_dir": directory / "cache"}
    self.command = [sys.executable, "-m", "mor.main", "--config=base", f"--workdir={self.workdir}",
                    *(f"--config.{k}={v}" for k, v in fields.items())]

  def start(self) -> processes.Started:
    together = [f"--coordinator=localhost:{processes.free_port()}", f"--num_processes={self.count}"]
    return processes.Started([[*self.command, *([*together, f"--process_id={index}"] if self.count > 1 else [])]
                              for index in range(self.count)], self.workdir, self.count)

  def step(self) -> int:
    return max((row["step"] for row in metrics.read(self.workdir)), default=0)

  def saving(self) -> bool:
    return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))

  def state(self):
    with checkpoint.Checkpoints(self.workdir, read_only=True) as checkpoints:
      one = sharding.make_mesh(config_lib.MeshConfig(data=1, fsdp=1, tensor=1, sequence=1))
      return loop.restore_or_init(checkpoints.config(), one, checkpoints)

  def rows(self):
    return [{k: v for k, v in row.items() if k != "train/tokens_per_second"} for row in metrics.read(self.workdir)]


def kill_once(run: Run, moment: str, until_step: int, start_seconds: float) -> dict:
  """Starts the run, kills it at a moment and says what that left."""
  started, begun = run.start(), time.perf_counter()
  latest = begun + (random.uniform(0, start_seconds) if moment == "start" else 3600)
  while started.running() and run.step() < until_step and time.perf_counter() < latest:
    time.sleep(0.002)
  while moment == "save" and started.running() and not run.saving():
    pass
  if moment != "start":
    time.sleep(random.uniform(0, 0.05))
  ended = next((status for process in started.processes if (status := process.poll()) is not None), None)
  victim = random.randrange(run.count)
  started.processes[victim].kill()
  try:
    statuses = started.wait(GRACE)
  except subprocess.TimeoutExpired:
    statuses = None
  with checkpoint.Checkpoints(run.workdir, read_only=True) as checkpoints:
    kept = checkpoints.latest_step()
  return dict(moment=moment, seconds=round(time.perf_counter() - begun, 2), ended_before=ended, step=run.step(),
              checkpoint=kept, unfinished_save=run.saving(), victim=victim, statuses=statuses)


def run_through(run: Run) -> float:
  """Runs to the end; returns the seconds to the first step, compiled programs at hand."""
  for _ in range(2):
    shutil.rmtree(run.workdir, ignore_errors=True)
    started, begun, seconds = run.start(), time.perf_counter(), None
    while started.running():
      if seconds is None and run.step():
        seconds = time.perf_counter() - begun
      time.sleep(0.01)
    if any(started.wait()):
      sys.exit("".join(map(started.text, range(run.count))))
  return seconds


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=10)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--processes", type=int, default=1)
  parser.add_argument("--steps", type=int, default=60, help="of the run; some for every kill")
  args = parser.parse_args()
  random.seed(args.seed)
  with tempfile.TemporaryDirectory() as directory:
    os.environ.update(JAX_COMPILATION_CACHE_DIR=f"{directory}/programs", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
                      JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1")
    straight, killed = (Run(pathlib.Path(directory), name, args.processes, args.steps) for name in ("straight", "killed"))
    seconds = run_through(straight)
    kills = []
    for i in range(args.kills):
      # Leave steps for the kills to come; what was lost is trained again.
      until_step = killed.step() + random.randrange(1, max(2, (args.steps - killed.step()) // (args.kills - i)))
      kills.append(kill_once(killed, MOMENTS[i % len(MOMENTS)], until_step, seconds))
      print(kills[-1], file=sys.stderr)
    status = max(killed.start().wait(1200), key=abs)
    (ours, step), (theirs, _) = killed.state(), straight.state()
    leaves = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    result = dict(
        kills=len([kill for kill in kills if kill["ended_before"] is None]),
        during_a_save=sum(kill["unfinished_save"] for kill in kills),
        survivors_ended_alone=sum(kill["statuses"] is not None for kill in kills),
        steps=step, exit_status=status,
        arrays=len(leaves),
        arrays_equal=sum(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves),
        metrics_equal=killed.rows() == straight.rows(),
        moments=kills)
    result["ok"] = bool(status == 0 and step == args.steps and result["arrays"] == result["arrays_equal"]
                        and result["metrics_equal"] and result["kills"] == args.kills)
    print(json.dumps(result, indent=2))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
  sys.exit(main())
