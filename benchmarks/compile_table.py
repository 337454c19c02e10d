"""Compiles the paper's training steps for TPU slices, on any CPU.

  python -m benchmarks.compile_table --out=benchmarks/results/compile_tpu.json

For every model and slice: what a chip holds, what it moves, and the bound of a step
(`mor/aot/compiled.py`). Parameters and moments are split over all chips of a slice, or as
many as divide the model's width, a micro-batch is four rows a chip, and attention is the
splash kernel. A cell takes minutes, so the table may grow over several runs: what the file
has is kept, but for asked cells of another commit.
"""

import json
import math
import pathlib
import sys
import time
from typing import Any

import jax

from benchmarks import harness
from mor import config as config_lib
from mor.aot import chips
from mor.aot import compiled

SLICES = {"v5e-16": "v5e:4x4", "v5e-256": "v5e:16x16", "v5p-64": "v5p:2x4x4", "v6e-64": "v6e:8x8"}  # v5p counts cores
MODELS = ("vanilla-{}", "recursive-{}-r3", "mor-{}-r3")
SIZES = ("135m", "360m", "730m", "1.7b")
_ROWS = 4  # of a micro-batch on a chip


def fields(model: str, num_chips: int) -> config_lib.Config:
  """Returns the paper's config of a model, cut for that many chips."""
  from configs import paper  # pylint: disable=g-import-not-at-top
  config = paper.get_config(model)
  fsdp = math.gcd(num_chips, config.model.d_model)
  config.mesh.update(data=num_chips // fsdp, fsdp=fsdp)
  config.train.accumulation = max(1, config.data.batch_size // (num_chips * _ROWS))
  return config_lib.from_config_dict(config)


def measure(model: str, slice_name: str) -> dict[str, Any]:
  """Compiles one cell of the table, and returns its figures."""
  config, begun = fields(model, len(chips.devices(SLICES[slice_name]))), time.perf_counter()
  return {"model": model, "slice": slice_name, "accumulation": config.train.accumulation,
          **compiled.step_figures(config, SLICES[slice_name]), "compile_seconds": time.perf_counter() - begun}


def main(argv: list[str]) -> None:
  """Compiles the cells that are asked for, and writes the record."""
  parser = harness.Parser(prog="python -m benchmarks.compile_table", description=__doc__.splitlines()[0])
  parser.add_argument("--models", default=",".join(m.format(s) for s in SIZES for m in MODELS),
                      help="of configs/paper.py")
  parser.add_argument("--slices", default=",".join(SLICES), help=f"of {', '.join(SLICES)}")
  parser.add_argument("--out", default="", help="JSON file; standard output where empty")
  parser.add_argument("--effort", type=float, default=0.0, help="of the compiler, -1 (quickest) to 1")
  args = parser.parse_args(argv)
  jax.config.update("jax_exec_time_optimization_effort", args.effort)
  jax.config.update("jax_memory_fitting_effort", args.effort)
  models, slices = args.models.split(","), args.slices.split(",")
  for name in slices:
    if name not in SLICES:
      raise ValueError(f"--slices={args.slices}: no slice {name!r}; use {', '.join(SLICES)}")
  record = harness.header("compile_table", argv, "bfloat16", {"rows_of_a_chip": _ROWS, "seq_len": 2048})
  cells = {(cell["model"], cell["slice"]): cell for cell in _kept(args.out)}
  for key in ((m, s) for s in slices for m in models):
    model, slice_name = key
    if key in cells and cells[key]["commit"] == record["commit"]:
      continue
    cell = cells[key] = measure(model, slice_name) | {"commit": record["commit"]}
    print(f"{model} on {slice_name}: {cell['step']['hbm_bytes']['total'] / 2**30:.2f} GiB, "
          f"{cell['compile_seconds']:.0f} s", file=sys.stderr, flush=True)
    harness.write(record | {"cells": list(cells.values())}, args.out)


def _kept(path: str) -> list[dict[str, Any]]:
  return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["cells"] if pathlib.Path(path).is_file() else []


NOTE = (
    "Whole steps of the paper's 1,024 x {sizes[seq_len]} tokens, parameters split over the chips of a "
    "slice, micro-batches of {sizes[rows_of_a_chip]} rows a chip, compiled for TPUs on")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: a chip's memory, the collectives and the bound of a step, by model and slice."""
  head = ["model", "slice", "chips", "GiB a chip (of)", "parameter gathers, GiB", "reductions, GiB", "step >=, s",
          "MFU <=", "bound by"]
  rows = []
  for cell in record["cells"]:
    moved = {kind: one["bytes"] / 2**30 for kind, one in cell["step"]["collectives"].items()}
    bound = cell["bound"]
    limit = max(("compute", "memory", "collectives"), key=lambda name: bound[f"{name}_seconds"])
    rows.append([
        cell["model"], cell["slice"], str(cell["chips"]),
        f"{cell['step']['hbm_bytes']['total'] / 2**30:.1f} ({cell['hbm_of_a_chip'] / 2**30:.0f})",
        f"{moved.get('all-gather', 0.0):.1f}",
        f"{moved.get('reduce-scatter', 0.0) + moved.get('all-reduce', 0.0):.1f}",
        f"{bound['step_seconds']:.2f}", f"{bound['mfu']:.2f}", limit])
  return [head, *rows]


if __name__ == "__main__":
  harness.run(main)
