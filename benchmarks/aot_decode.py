"""Compiles the engine's programs for chips that are not there, before and after it was made for them.

  python -m benchmarks.aot_decode --before=TREE --texts=DIR --out=benchmarks/results/aot_decode.json
  python -m benchmarks.aot_decode --program=prefill --models=mor-360m-r3 --slots=32 --chips=v5e,h200 --before=TREE \\
    --texts=DIR --out=benchmarks/results/aot_prefill.json

TREE is a clone of this repository at commit 4652a6b, which `aot_before.py` compiles in a
process of its own. Needs the extras `tpu` and `aot-gpu`, and JAX_PLATFORMS=cpu. A cell takes
minutes, so the table may grow over several runs: DIR keeps the texts of the programs
of each commit, and a text that is there is only counted again.

Sequences hold 1,024 tokens, and slots are at steps 0, 1, 2 as 3 to 2 to 1, with rows of p,
2p/3 and p/3 entries (balanced exits). Loops over pages run to the longest of 8 rows.
"""

import json
import math
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import jax

from benchmarks import harness
from mor import config as config_lib
from mor import costs
from mor.aot import chips
from mor.aot import decoding
from mor.aot import hlo
from mor.decode import decoder as decoder_lib
from mor.decode import storage

BEFORE = "4652a6b"
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "h100": "h100:1", "h200": "h200:1"}
_CONTEXT, _POSITION, _PAGE = 2048, 1024, 64
_GROUP = 8  # rows of one loop over pages
_PROMPTS, _TOKENS = 8, 64  # of the prefill


def make_setup(model: str, num_slots: int, chip: str) -> decoding.DecodingSetup:
  """Returns an engine of a model of the paper on a chip."""
  from configs import paper  # pylint: disable=g-import-not-at-top
  config = config_lib.from_config_dict(paper.get_config(model))
  return decoding.DecodingSetup(config, chips.devices(CHIPS[chip])[0], num_slots, _CONTEXT, _PAGE, _POSITION)


def mean_turns(model: config_lib.ModelConfig, num_slots: int) -> float:
  """Returns the mean rounds of a loop over the pages of 8 rows, which are sorted by length."""
  fractions = costs.step_fractions(model, _POSITION)
  pages = [math.ceil(fractions[step] * _POSITION / _PAGE) for step in range(len(fractions))
           for _ in range(round(num_slots * fractions[step] / sum(fractions)))]
  longest = sorted(pages, reverse=True)[::_GROUP]
  return sum(longest) / len(longest)


def compile_before(setup: decoding.DecodingSetup, model: str, chip: str, program: str, tree: str,
                   base: str) -> None:
  """Compiles a program of commit 4652a6b, in a process in its tree."""
  command = [sys.executable, str(harness.ROOT / "benchmarks" / "aot_before.py"), f"--topology={CHIPS[chip]}",
             f"--chips={chips.__file__}", f"--model={model}", f"--program={program}", f"--slots={setup.num_slots}",
             f"--context={_CONTEXT}", f"--out={pathlib.Path(base).absolute()}"]
  done = subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True)
  if done.returncode:
    raise OSError(f"--before={tree}: {' '.join(done.stderr.split()[-40:])}")


def compile_after(setup: decoding.DecodingSetup, program: str, base: str) -> None:
  """Compiles a program of this tree, and keeps its text, or why it does not compile, as `aot_before.py` does."""
  begun = time.perf_counter()
  try:
    compiled = (decoding.compile_tick(setup) if program == "tick" else
                decoding.compile_prefill(setup, _PROMPTS, _TOKENS))
  except jax.errors.JaxRuntimeError as error:
    record = {"error": str(error)}
  else:
    pathlib.Path(f"{base}.hlo").write_text(compiled.text, encoding="utf-8")
    record = {"arguments": compiled.arguments, "temporaries": compiled.temporaries, "pool": compiled.pool}
  record["seconds"] = time.perf_counter() - begun
  harness.write(record, f"{base}.json")


def count(setup: decoding.DecodingSetup, program: str, base: str, before: bool) -> dict[str, Any]:
  """Returns the figures of a program whose text is kept; the ideal of a prefill is that of all prompts in one call."""
  kept = json.loads(pathlib.Path(f"{base}.json").read_text(encoding="utf-8"))
  if "error" in kept:
    return {"error": " ".join(kept["error"].split())[:200]}
  compiled = decoding.CompiledText(
      pathlib.Path(f"{base}.hlo").read_text(encoding="utf-8"), kept["arguments"], kept["temporaries"],
      tuple(kept.get("pool") or _paged_pool(setup)))
  if program == "prefill":
    return decoding.prefill_figures(setup, compiled, _PROMPTS, _TOKENS) | {"calls": _PROMPTS if before else 1}
  model = setup.config.model
  rounds, rows = mean_turns(model, setup.num_slots), re.compile(rf"f32\[{_GROUP},{model.num_heads}[,\]]")

  def turns(loop: hlo.Instruction) -> float:
    return rounds if rows.search(loop.type) and f",{model.vocab_size}]" not in loop.type else 1

  found = decoding.tick_figures(setup, compiled, turns)
  return found | {"storage": "Paged" if before else found["storage"]}


def _paged_pool(setup: decoding.DecodingSetup) -> list[float]:
  """Returns the bytes of each buffer of the pool of commit 4652a6b: keys and values apart, in `Paged`."""
  model = setup.config.model
  tables = decoder_lib.Decoder(
      model, storage.Paged(_PAGE, model.num_kv_heads, model.head_dim, "bfloat16")).tables
  edge = setup.num_slots * setup.pages_per_row * _PAGE * model.num_kv_heads * model.head_dim * 2
  return [float(edge)] * (2 * tables.num_edges) + [float(edge * tables.num_rows)] * (2 * tables.schedule.depth)


def main(argv: list[str]) -> None:
  """Compiles the cells that are asked for, and writes the record.

  Raises:
    ValueError: a chip is unknown.
    OSError: a compiler is missing, or the tree of the commit before does not run.
  """
  parser = harness.Parser(prog="python -m benchmarks.aot_decode", description=__doc__.splitlines()[0])
  parser.add_argument("--program", choices=("tick", "prefill"), default="tick", help="of the engine")
  parser.add_argument("--models", default="mor-360m-r3,mor-1.7b-r3", help="of configs/paper.py")
  parser.add_argument("--slots", default="32,128", help="counts of slots")
  parser.add_argument("--chips", default=",".join(CHIPS), help=f"of {', '.join(CHIPS)}")
  parser.add_argument("--before", default="", help=f"tree of commit {BEFORE}; none where empty")
  parser.add_argument("--texts", required=True, help="directory that keeps the texts of the programs")
  parser.add_argument("--out", default="", help="JSON file; standard output where empty")
  args = parser.parse_args(argv)
  names = args.chips.split(",")
  for name in names:
    if name not in CHIPS:
      raise ValueError(f"--chips={args.chips}: no chip {name!r}; use {', '.join(CHIPS)}")
  pathlib.Path(args.texts).mkdir(parents=True, exist_ok=True)
  record = harness.header("aot_decode", argv, "bfloat16", {
      "program": args.program, "context": _CONTEXT, "position": _POSITION, "page_size": _PAGE})
  cells = []
  for model in args.models.split(","):
    for num_slots in (int(number) for number in args.slots.split(",")):
      for chip in names:
        for before in (True, False) if args.before else (False,):
          cells.append(measure(model, num_slots, chip, before, record["commit"], args))
          harness.write(record | {"cells": cells}, args.out or "/dev/null")
  harness.write(record | {"cells": cells}, args.out)


def measure(model: str, num_slots: int, chip: str, before: bool, commit: str, args: Any) -> dict[str, Any]:
  """Returns the figures of one cell, whose program is compiled unless its text is kept."""
  setup, commit = make_setup(model, num_slots, chip), BEFORE if before else commit
  base = f"{args.texts}/{args.program}-{model}-b{num_slots}-{chip}-{commit}"
  if not pathlib.Path(f"{base}.json").is_file():
    if before:
      compile_before(setup, model, chip, args.program, args.before, base)
    else:
      compile_after(setup, args.program, base)
  found = count(setup, args.program, base, before)
  cell = {"model": model, "chip": chip, "when": "before" if before else "after", "commit": commit,
          "num_slots": num_slots, **found}
  seen = found.get("error") or {name: found[name] for name in ("bytes_ratio", "temporaries_of_pool")}
  print(f"{model}, {num_slots} slots, {chip}, {cell['when']}: {seen}", file=sys.stderr, flush=True)
  return cell


NOTE = ("In bfloat16 at {sizes[context]} positions, of which {sizes[position]} are stored when a tick runs. Nothing was run; "
        "compiled on")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: what a tick, or the prefill of 8 prompts, executes, before and after."""
  prefill = record["sizes"]["program"] == "prefill"
  head = ["model", "slots", "chip", "", *(["calls"] if prefill else []), "operations",
          *([] if prefill else ["loops", "GPU host waits"]), "pool copies", "temporaries, MB (of the pool)",
          "GB (to ideal)", "TPU cycles, ms (to ideal)"]
  return [head, *(_row(cell, prefill, len(head)) for cell in record["cells"])]


def _row(cell: dict[str, Any], prefill: bool, width: int) -> list[str]:
  """Returns the row of a cell; of a program in several calls, their sum."""
  front = [cell["model"], str(cell["num_slots"]), cell["chip"], cell["when"]]
  if "error" in cell:
    return [*front, f"does not compile: {_explain(cell['error'])}", *[""] * (width - len(front) - 1)]
  calls, counted = (cell["calls"], cell) if prefill else (1, cell["a_tick"])
  waits = f"{counted['predicates']:,.0f}" if cell["chip"] in ("h100", "h200") else "-"
  cycles = (f"{1e3 * calls * cell['cycles_seconds']:.2f} ({calls * cell['cycles_ratio']:.1f})"
            if "cycles_seconds" in cell else "-")
  return [*front, *([str(calls)] if prefill else []), f"{calls * counted['operations']:,.0f}",
          *([] if prefill else [f"{counted['loops']:,.0f}", waits]), f"{calls * counted['pool_copies']:,.0f}",
          f"{cell['temporaries'] / 1e6:,.0f} ({cell['temporaries_of_pool']:.1%})",
          f"{calls * cell['bytes'] / 1e9:.2f} ({calls * cell['bytes_ratio']:.1f})", cycles]


def _explain(error: str) -> str:
  """Returns the compiler's figure of an error, or its beginning."""
  needed = re.search(r"(\d[\d.]*[MG])\)? exceeds available HBM \((\d[\d.]*[MG])|Used (\d[\d.]*[MG]) of (\d[\d.]*[MG])", error)
  if not needed:
    return error[:80]
  used, of = needed[1] or needed[3], needed[2] or needed[4]
  return f"needs {used} of {of}"


if __name__ == "__main__":
  harness.run(main)
