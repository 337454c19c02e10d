"""Times whole training steps of several models in turn, beside what they cost.

  python -m benchmarks.train --models=vanilla,mor-r2,mor-r3

Run it where `configs/` is. Models are named as in `configs/paper.py`, without
the size; all have the same unrolled depth and take the same tokens. A step is
`mor/train/step.py`'s: forward, backward, clipping, AdamW, metrics, on one
device, on random tokens that are there already. Models take turns (`harness.py`).

A step's FLOPs are counted three ways: `flops`, the calculator's, with the causal
half of the attention; `flops_executed`, the calculator's, with its whole square,
which is what runs; `flops_xla`, of the compiled program. XLA counts a loop's body
once, so its counts, also of bytes, are of the same step with the loops over layers
and over blocks of the loss unrolled; `--scan_layers=0` times that program too. Of a conditional
(token-choice's overflow) XLA counts the dearer branch. Peak memory is XLA's
plan for the timed program: arguments + temporaries + outputs - donated.

On a device whose peak is known, `mfu` is `flops` over time and peak. `--profile=1` says
where a step's time goes on a GPU, and `--peer=1` times a PyTorch Llama of the first
model's shape before ours, alone on the device, as both at once might not fit.
"""

from concurrent import futures
import dataclasses
import json
import math
import re
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from benchmarks import profile
from benchmarks import torch_train
from configs import paper
from mor import config as config_lib
from mor import costs
from mor import sharding
from mor.train import metrics as metrics_lib
from mor.train import step as step_lib

# CPU: 1 + 12 + 1 layers, so that R = 2, 3 and 4 divide. Others: as in the paper.
CPU = dict(vocab_size=4096, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, d_ff=704, num_layers=14)
DEFAULTS = {  # size -> where no option says otherwise
    "cpu": dict(seq_len=512, batch=4, dtype="float32", remat="none", scan_layers=0, loss_block=2048),
    **{size: dict(seq_len=2048, batch=8, dtype="bfloat16", remat="dots", scan_layers=1, loss_block=2048)
       for size in paper.SIZES},
}
PEER_SECONDS = 150  # compiling included
MODELS = sorted({member.replace("-135m", "") for member in paper.members() if "-135m" in member})
WARM_UP = 2  # rounds that are not counted


@dataclasses.dataclass
class Runner(harness.Timed):
  """One model: its compiled step and its state."""

  config: config_lib.Config
  compiled: Any
  state: step_lib.TrainState
  batch: dict
  metrics: dict = dataclasses.field(default_factory=dict)

  def run(self) -> None:
    """Runs and times one step."""
    self.state, self.metrics = self.time(lambda: self.compiled(self.state, self.batch, None))


def make_config(name: str, models: list[str], args) -> config_lib.Config:
  """Returns the member `name` of the family at the sizes of `args`, as deep as all of `models`.

  The depth is the least, from the size's own, whose inner layers every R divides.
  """
  recursions = [int(r) for r in re.findall(r"-r(\d+)", ",".join(models))]
  fields = paper.get_config(re.sub(r"(-r\d+)?$", rf"-{'135m' if args.size == 'cpu' else args.size}\1", name, count=1))
  if args.size == "cpu":
    fields.model.update(CPU)
  depth = CPU["num_layers"] if args.size == "cpu" else paper.SIZES[args.size][0]
  multiple = math.lcm(*recursions)
  fields.model.update(num_layers=2 + -(-(depth - 2) // multiple) * multiple, compute_dtype=args.dtype,
                      remat=args.remat, scan_layers=bool(args.scan_layers))
  fields.data.update(seq_len=args.seq_len, batch_size=args.batch)
  fields.train.update(accumulation=1, loss_block=args.loss_block)
  fields.mesh.data = 1
  return config_lib.from_config_dict(fields)


def make_batch(config: config_lib.Config) -> dict[str, np.ndarray]:
  """Returns random tokens, one document a row, no padding."""
  rng = np.random.default_rng(config.seed)
  shape_BT = (config.data.batch_size, config.data.seq_len)

  def draw():
    return rng.integers(0, config.model.vocab_size, shape_BT, dtype=np.int32)

  return dict(tokens_BT=draw(), target_BT=draw(), segment_BT=np.ones(shape_BT, np.int32),
              loss_mask_BT=np.ones(shape_BT, bool))


def make_runner(name: str, config: config_lib.Config) -> Runner:
  """Initialises and compiles."""
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  state = step_lib.init_state(config, mesh)
  batch = sharding.put_batch(mesh, make_batch(config))
  return Runner(name, config, compile_step(config, mesh, state, batch), state, batch)


def compile_step(config: config_lib.Config, mesh: jax.sharding.Mesh, state, batch) -> Any:
  """Compiles the training step ahead; the arguments need only shapes."""
  with jax.set_mesh(mesh):
    return step_lib.make_train_step(config, mesh).jitted.lower(state, batch, None, None).compile()


def unrolled(config: config_lib.Config) -> config_lib.Config:
  """Returns the config of the same step without a loop over layers or over blocks of the loss."""
  tokens = config.data.batch_size * config.data.seq_len
  return dataclasses.replace(
      config, model=dataclasses.replace(config.model, scan_layers=False),
      train=dataclasses.replace(config.train, loss_block=max(tokens, config.train.loss_block)))


def count(runner: Runner) -> dict[str, float]:
  """Returns what XLA counts of the step without its loops."""
  config, counted = runner.config, runner.compiled
  one_block = config.data.batch_size * config.data.seq_len <= config.train.loss_block
  if config.model.scan_layers or not one_block:
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    counted = compile_step(unrolled(config), mesh, runner.state, runner.batch)
  analysis = counted.cost_analysis()
  return {"flops_xla": analysis["flops"], "bytes_accessed_xla": analysis["bytes accessed"]}


def step_costs(runner: Runner, counted: bool = True) -> dict[str, Any]:
  """Returns parameters, FLOPs and memory of one step, and what XLA counts of it."""
  config, compiled = runner.config, runner.compiled
  tokens = config.data.batch_size * config.data.seq_len
  embedding, rest = costs.parameter_count(config.model)
  plan = compiled.memory_analysis()
  parts = {part: getattr(plan, f"{part}_size_in_bytes") for part in ("argument", "temp", "output", "alias")}
  return {
      "parameters_embedding": embedding,
      "parameters_non_embedding": rest,
      "flops": 3 * tokens * costs.forward_flops_per_token(config.model, config.data.seq_len, executed=False),
      "flops_executed": 3 * tokens * costs.forward_flops_per_token(config.model, config.data.seq_len, executed=True),
      **(count(runner) if counted else {}),
      "memory_bytes": parts,
      "peak_memory_bytes": parts["argument"] + parts["temp"] + parts["output"] - parts["alias"],
  }


def compare(runners: list[Runner], clock: str, counted: bool = True) -> list[dict[str, Any]]:
  """Returns one row a model: its costs and seconds, and their ratios to the first's.

  Args:
    runners: timed models.
    clock: "wall" or "cpu", on which `step_ratio` and `tokens_per_second` go.
    counted: whether XLA's counts are wanted, for which a step may compile once more.
  """
  rows, peak = [], metrics_lib.peak_flops(jax.devices()[0].device_kind)
  for runner in runners:
    row = {"model": runner.name, **step_costs(runner, counted)}
    for kind in ("wall", "cpu"):
      seconds = runner.seconds(kind)
      row[f"{kind}_seconds"] = harness.spread(seconds)
      row[f"{kind}_ratio"] = harness.ratios(seconds, runners[0].seconds(kind))
    row["step_ratio"] = row[f"{clock}_ratio"]["median"]
    tokens = runner.config.data.batch_size * runner.config.data.seq_len
    row["tokens_per_second"] = tokens / row[f"{clock}_seconds"]["median"]
    if peak:
      row["mfu"] = row["flops"] / row[f"{clock}_seconds"]["median"] / peak
    first, xla = rows[0] if rows else row, ("flops_xla",) * counted
    for name in ("flops", "flops_executed", "peak_memory_bytes", *xla, *("bytes_accessed_xla",) * counted):
      row[f"{name}_ratio"] = row[name] / first[name]
    for name in ("flops", "flops_executed", *xla):
      row[f"step_per_{name}"] = row["step_ratio"] / row[f"{name}_ratio"]
    row["load"] = {k: float(v) for k, v in runner.metrics.items() if k.startswith("load_")}
    rows.append(row)
  return rows


def run_peer(config: config_lib.Config, rounds: int) -> dict[str, Any]:
  """Times the steps of a PyTorch Llama of the model's shape, in a process of its own.

  Raises:
    OSError: it failed, or took more than `PEER_SECONDS`.
  """
  model, data = config.model, config.data
  sizes = {name: getattr(model, name) for name in CPU} | {"seq_len": data.seq_len, "batch": data.batch_size}
  options = [*(f"--{name}={sizes[name]}" for name in torch_train.SIZES), f"--dtype={model.compute_dtype}",
             f"--remat={int(model.remat == 'full')}", f"--rounds={rounds}"]
  try:
    done = subprocess.run([sys.executable, "-m", "benchmarks.torch_train", *options], capture_output=True, text=True,
                          timeout=PEER_SECONDS)
  except subprocess.TimeoutExpired as error:
    raise OSError(f"--peer=1: not done in {PEER_SECONDS} seconds; use --peer=0 or fewer rounds") from error
  if done.returncode:
    raise OSError(f"--peer=1: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
  peer = json.loads(done.stdout.splitlines()[-1])
  peer["wall_seconds"] = harness.spread(peer.pop("seconds"))
  peer["tokens_per_second"] = data.batch_size * data.seq_len / peer["wall_seconds"]["median"]
  return peer


def compare_peer(peer: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the peer's MFU, of the FLOPs of the first model, and each model's speed over it."""
  peak = metrics_lib.peak_flops(jax.devices()[0].device_kind)
  mfu = {"mfu": rows[0]["flops"] / peer["wall_seconds"]["median"] / peak} if peak else {}
  return peer | mfu | {"ours_to_peer": {row["model"]: row["tokens_per_second"] / peer["tokens_per_second"]
                                        for row in rows}}


def parse(argv: list[str]):
  """Reads the options, with the size's defaults filled in."""
  parser = harness.Parser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
  parser.add_argument("--models", default="vanilla,mor-r2,mor-r3", help=f"of {', '.join(MODELS)}; base first")
  parser.add_argument("--size", default="cpu", choices=DEFAULTS)
  parser.add_argument("--seq_len", type=int, help="tokens in a row")
  parser.add_argument("--batch", type=int, help="rows")
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="compute dtype")
  parser.add_argument("--remat", choices=["none", "dots", "full"])
  parser.add_argument("--scan_layers", type=int, choices=[0, 1], help="1 loops over layers, 0 unrolls them")
  parser.add_argument("--loss_block", type=int, help="tokens whose logits exist at once")
  parser.add_argument("--rounds", type=int, default=10, help="timed steps of each model")
  parser.add_argument("--xla_counts", type=int, choices=[0, 1],
                      help="1 lets XLA count the unrolled step, which compiles it too; default 1 for size cpu only")
  parser.add_argument("--profile", type=int, default=0, choices=[0, 1], help="1 says where the time goes on a GPU")
  parser.add_argument("--peer", type=int, default=0, choices=[0, 1], help="1 times a PyTorch Llama too")
  parser.add_argument("--pin", type=int, help="run on this core only and judge by processor time")
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  for name, default in DEFAULTS[args.size].items():
    if getattr(args, name) is None:
      setattr(args, name, default)
  args.xla_counts = args.size == "cpu" if args.xla_counts is None else bool(args.xla_counts)
  args.models = args.models.split(",")
  for name in args.models:
    if name not in MODELS:
      raise ValueError(f"--models: {name!r} is not a model; use some of {', '.join(MODELS)}")
  if len(set(args.models)) < len(args.models):
    raise ValueError(f"--models={','.join(args.models)} names a model twice; name each once")
  if args.rounds < 1:
    raise ValueError(f"--rounds={args.rounds}; use 1 or more")
  return args


def main(argv: list[str]) -> None:
  """Builds the models, times them in turn, writes the record."""
  args = parse(argv)
  clock = harness.choose_clock(args.pin)
  configs = {name: make_config(name, args.models, args) for name in args.models}
  model = configs[args.models[0]].model
  sizes = {name: getattr(args, name) for name in DEFAULTS["cpu"]}
  sizes |= {name: getattr(model, name) for name in CPU}
  peer = run_peer(configs[args.models[0]], args.rounds) if args.peer else None  # before we hold the device
  record = harness.header("train", argv, args.dtype, {"size": args.size, **sizes})
  print(f"compiling {', '.join(configs)}", file=sys.stderr)
  with futures.ThreadPoolExecutor() as pool:
    runners = list(pool.map(make_runner, configs, configs.values()))
  harness.take_turns(runners, args.rounds, WARM_UP, tell=lambda runner: f"{runner.wall[-1]:.3f} s")
  rows = compare(runners, clock, args.xla_counts)
  record |= {"clock": clock, "warm_up": WARM_UP, "rounds": args.rounds, "models": rows}
  if peer:
    record["peer"] = compare_peer(peer, rows)
  for runner, row in zip(runners, rows) if args.profile else ():
    row["profile"] = profile.breakdown(runner.run, runner.compiled.as_text())
  harness.write(record, args.out)


NOTE = (
    "*without the embedding. Whole steps of {sizes[batch]} x {sizes[seq_len]} tokens, {sizes[num_layers]}"
    " unrolled layers, D={sizes[d_model]}, V={sizes[vocab_size]}; medians of {rounds} rounds in turn, "
    "{clock} time, load average {load_average:.1f}.")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: time, FLOPs and memory of a step against the first model's."""
  head = ["model", "parameters*", "seconds a step", "time ratio (min–max)", "FLOP ratio: causal, executed",
          "time / FLOP ratio", "peak memory ratio"]
  rows, known = [], "mfu" in record["models"][0]
  for row in record["models"]:
    ratio, seconds = row[f"{record['clock']}_ratio"], row[f"{record['clock']}_seconds"]
    rows.append([
        row["model"],
        f"{row['parameters_non_embedding'] / 1e6:.1f}M",
        f"{seconds['median']:.3g}",
        f"{ratio['median']:.3f} ({ratio['min']:.3f}–{ratio['max']:.3f})",
        f"{row['flops_ratio']:.3f}, {row['flops_executed_ratio']:.3f}",
        f"{row['step_per_flops']:.3f}, {row['step_per_flops_executed']:.3f}",
        f"{row['peak_memory_bytes_ratio']:.3f}",
        *([f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.3f}"] if known else []),
    ])
  if "peer" in record:
    peer, first = record["peer"], record["models"][0]
    rows.append([f"{peer['program']}, PyTorch {peer['torch']}", rows[0][1], f"{peer['wall_seconds']['median']:.3g}",
                 f"{first['tokens_per_second'] / peer['tokens_per_second']:.3f}", "", "",
                 f"{peer['peak_memory_bytes'] / first['peak_memory_bytes']:.3f}" if peer["peak_memory_bytes"] else "",
                 *([f"{peer['tokens_per_second']:,.0f}", f"{peer['mfu']:.3f}"] if known else [])])
  return [head + ["tokens/s", "MFU"] * known, *rows]


if __name__ == "__main__":
  harness.run(main)
