"""Uptraining of a recursive SmolLM2 for a small budget: with and without deltas, and a teacher.

  python -m benchmarks.uptraining --source=gguf:SmolLM2-135M-Instruct.Q4_1.gguf

Every run reads the same batches and is judged on the same held-out rows, before and
after. A run is named MODEL/METHOD[/alone]: a model of `configs/uptrain_smollm2.py`,
an `init.method`, and "alone" without the teacher. `nll` is in nats per token, causal;
`step_seconds` the median of wall times; `temporary_bytes` what the compiled step
needs beside its arguments, `teacher_bytes` the teacher's parameters.
"""

import dataclasses
import gc
import json
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import harness
from configs import uptrain_smollm2
from mor import config as config_lib
from mor import run as run_lib
from mor import sharding
from mor.conversion import pretrained
from mor.conversion import recursive_init
from mor.conversion import command
from mor.data import text
from mor.data import tokenizer as tokenizer_lib
from mor.train import evaluate
from mor.train import step as step_lib

RUNS = ("r2/stepwise", "r2/average", "r2-lora128/stepwise", "r2-lora128/average", "r2/stepwise/alone",
        "r2-lora128/average/alone", "r3/stepwise", "r3-lora128/average", "r2-lora128-mor/average")


def make_config(run: str, args) -> config_lib.Config:
  """Returns the config of a run.

  Raises:
    ValueError: the name is wrong.
  """
  model, _, rest = run.partition("/")
  method, _, alone = rest.partition("/")
  if method not in recursive_init.METHODS or alone not in ("", "alone"):
    raise ValueError(f"run {run!r}; use MODEL/METHOD or MODEL/METHOD/alone, with a method of "
                     f"{', '.join(recursive_init.METHODS)}")
  fields = uptrain_smollm2.get_config(model)
  fields.init.method = method
  fields.data.update(tokenizer=f"{args.workdir}/tokenizer.json", batch_size=args.batch, seq_len=args.seq_len)
  fields.train.update(steps=args.steps, eval_rows=args.eval_rows)
  fields.optim.update(learning_rate=args.learning_rate, warmup_steps=min(4, args.steps))
  fields.distill.teacher = "" if alone else "the source"
  fields.mesh.data = 1
  return config_lib.from_config_dict(fields)


def measure(run: str, config: config_lib.Config, source: pretrained.Source,
            tokenizer: tokenizer_lib.Tokenizer) -> dict[str, Any]:
  """Trains one run; returns its figures."""
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  corpus = text.load(config.data, config.model.vocab_size, tokenizer)
  state = step_lib.start(config, jax.tree.map(jnp.asarray, recursive_init.convert(
      config.model, config.init, config.seed, source.model, source.variables)))
  teacher = None
  if config.distill.teacher:
    teacher = step_lib.Teacher(jax.tree.map(jnp.asarray, source.variables["params"]), {}, source.model)
  judge = evaluate.make(config, mesh, corpus.tokenizer.num_bytes_V)

  def held_out():
    return judge(state.params, {}, corpus.validation.in_order(
        config.data.batch_size, config.train.eval_rows))["nll_causal"]

  row = {"run": run, "nll_before": held_out()}

  def batch(i):
    return sharding.put_batch(mesh, corpus.train.batch(i))

  with jax.set_mesh(mesh):
    train_step = step_lib.make_train_step(config, mesh, teacher).jitted.lower(state, batch(0), teacher, None).compile()
  timed, losses = harness.Timed(run), []
  for i in range(config.train.steps):
    fresh = batch(i)
    timed.start_round()
    state, metrics = timed.time(lambda: train_step(state, fresh, teacher))
    losses.append({name: float(metrics[name]) for name in ("nll", "kl") if name in metrics})

  def count(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

  memory = train_step.memory_analysis()
  return row | {
      "nll_after": held_out(), "step_seconds": statistics.median(timed.wall), "last_metrics": losses[-1],
      "parameters": count(state.params) // 4, "teacher_bytes": teacher.num_bytes if teacher else 0,
      "temporary_bytes": memory.temp_size_in_bytes, "argument_bytes": memory.argument_size_in_bytes}


def main(argv: list[str]) -> None:
  """Trains the runs and writes the record."""
  parser = harness.Parser(prog="python -m benchmarks.uptraining", description=__doc__.splitlines()[0])
  parser.add_argument("--source", required=True, help="hf:FOLDER or gguf:FILE of SmolLM2-135M")
  parser.add_argument("--workdir", default="runs/smollm2", help="run converted from the source; its tokenizer is used")
  parser.add_argument("--runs", default=",".join(RUNS))
  parser.add_argument("--steps", type=int, default=32)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--seq_len", type=int, default=256)
  parser.add_argument("--learning_rate", type=float, default=2e-4)
  parser.add_argument("--eval_rows", type=int, default=32)
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  configs = {run: make_config(run, args) for run in args.runs.split(",")}
  source = command.read(args.source)
  tokenizer = run_lib.load_tokenizer(args.workdir, next(iter(configs.values())).data)
  sizes = {name: getattr(args, name) for name in ("steps", "batch", "seq_len", "learning_rate", "eval_rows")}
  record = harness.header("uptraining", argv, "float32", sizes)
  record |= {"source_nll": _source_nll(configs, source, tokenizer), "runs": []}
  for run, config in configs.items():
    record["runs"].append(measure(run, config, source, tokenizer))
    print(json.dumps(record["runs"][-1]), file=sys.stderr, flush=True)
    harness.write(record, args.out) if args.out else None  # what is done is kept
    gc.collect()
    jax.clear_caches()
  harness.write(record, args.out)


def _source_nll(configs: dict[str, config_lib.Config], source: pretrained.Source,
                tokenizer: tokenizer_lib.Tokenizer) -> float:
  """Returns the source's own loss on the held-out rows."""
  config = next(iter(configs.values()))
  config = dataclasses.replace(config, model=source.model)
  corpus = text.load(config.data, config.model.vocab_size, tokenizer)
  judge = evaluate.make(config, sharding.make_mesh(config.mesh, jax.devices()[:1]), corpus.tokenizer.num_bytes_V)
  return judge(jax.tree.map(jnp.asarray, source.variables["params"]), {},
               corpus.validation.in_order(config.data.batch_size, config.train.eval_rows))["nll_causal"]


NOTE = (
    "{sizes[steps]} steps of {sizes[batch]} x {sizes[seq_len]} tokens of books, learning rate "
    "{sizes[learning_rate]}; the model itself is at {source_nll:.3f} on the same {sizes[eval_rows]} rows.")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: loss before and after, time and memory of a step."""
  rows = [[row["run"], f"{row['parameters'] / 1e6:.0f}M", f"{row['nll_before']:.3f}", f"{row['nll_after']:.3f}",
           f"{row['step_seconds']:.1f}", f"{row['temporary_bytes'] / 2**30:.2f}", f"{row['teacher_bytes'] / 2**30:.2f}"]
          for row in record["runs"]]
  return [["model / initialisation", "parameters", "nats before", "nats after", "seconds a step", "GiB of a step",
           "GiB of the teacher"], *rows]


if __name__ == "__main__":
  harness.run(main)
