"""Flips bits of a checkpoint, one at a time, and reads it as training and its users do.

  python -m tests.soak_flips
  python -m tests.soak_flips --flips=2000 --seed=7

Every bit of meta/metadata is flipped, and the config is read; then `--flips` bits spread
over all files, and config and state are read. Prints one JSON object with, for each file,
how many flips were found (the checkpoint before was read instead, of a state with a
warning) and how many were harmless (what was read is bitwise what was saved). Exit status
1 if one flip was neither. Some minutes; run by hand.
"""

import argparse
import contextlib
import io
import json
import pathlib
import random
import sys
import tempfile
import time

import jax
import numpy as np

from mor import checkpoint
from mor import sharding
from mor.train import loop
from mor.train import step as step_lib
from tests.helpers import tiny


def save(workdir: pathlib.Path) -> tuple:
  """Saves the states of steps 1 and 2, with different configs; returns them by step."""
  configs = {step: tiny.config(train=dict(log_every=step)) for step in (1, 2)}
  mesh = sharding.make_mesh(configs[1].mesh)
  first = step_lib.init_state(configs[1], mesh)
  states = {1: first, 2: jax.tree.map(lambda x: x + np.ones_like(x), first)}
  with checkpoint.Checkpoints(workdir, keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, states[step], configs[step])
  return configs, states


def read_config(workdir: pathlib.Path, configs, unused_states) -> str:
  """Returns "found", "harmless" or "silent", by the config alone."""
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    config = checkpoints.config()
  return {configs[1]: "found", configs[2]: "harmless"}.get(config, "silent")


def read_all(workdir: pathlib.Path, configs, states) -> str:
  """Returns "found", "harmless" or "silent", by the config, the state and what was said."""
  said = io.StringIO()
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints, contextlib.redirect_stderr(said):
    config = checkpoints.config()
    checkpoints.check(configs[2])
    state, step = loop.restore_or_init(configs[2], sharding.make_mesh(configs[2].mesh), checkpoints)
  same = config in (configs[1], configs[2]) and all(
      np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(states[step]), strict=True))
  if not same or (step == 2) != (said.getvalue() == ""):
    return "silent"
  return "harmless" if step == 2 and config == configs[2] else "found"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--flips", type=int, default=200)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  rng, begun = random.Random(args.seed), time.perf_counter()
  with tempfile.TemporaryDirectory() as directory:
    workdir = pathlib.Path(directory)
    configs, states = save(workdir)
    newest = workdir / "checkpoints" / "2"
    files = {path.relative_to(newest).as_posix(): path for path in sorted(newest.rglob("*")) if path.is_file()}
    config_file = files["meta/metadata"]
    names = [name for name, path in files.items() if path.stat().st_size]
    flips = [("meta/metadata", bit, read_config) for bit in range(8 * config_file.stat().st_size)]
    for i in range(args.flips):
      name = names[i % len(names)]
      flips.append((name, rng.randrange(8 * files[name].stat().st_size), read_all))
    table = {}
    for name, bit, read in flips:
      path, whole = files[name], files[name].read_bytes()
      changed = bytearray(whole)
      changed[bit // 8] ^= 1 << bit % 8
      path.write_bytes(changed)
      try:
        outcome = read(workdir, configs, states)
      except Exception as error:  # no flip may stop a run that has a checkpoint before
        outcome = f"fails with {type(error).__name__}"
      path.write_bytes(whole)
      row = table.setdefault(name, {})
      row[outcome] = row.get(outcome, 0) + 1
      if outcome not in ("found", "harmless"):
        print(f"{name} bit {bit}: {outcome}", file=sys.stderr)
  totals = {outcome: sum(row.get(outcome, 0) for row in table.values()) for row in table.values() for outcome in row}
  ok = set(totals) <= {"found", "harmless"}
  print(json.dumps(dict(seed=args.seed, flips=len(flips), totals=totals, seconds=round(time.perf_counter() - begun),
                        files=table, ok=ok), indent=2))
  return 0 if ok else 1


if __name__ == "__main__":
  sys.exit(main())
