"""Records what a finished quickstart reached, and where its depth goes.

  python -m benchmarks.quickstart --workdir=runs/quickstart \\
    --out=benchmarks/results/quickstart.json
"""

import json
import pathlib

import numpy as np

from benchmarks import harness
from mor import checkpoint
from mor import report
from mor import run as run_lib
from mor import sharding
from mor.train import loop


def main(argv: list[str]) -> None:
  """Writes the record of one workdir."""
  parser = harness.Parser(prog="python -m benchmarks.quickstart", description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="of a finished run")
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  summary_path = pathlib.Path(args.workdir) / "summary.json"
  if not summary_path.is_file():
    raise ValueError(f"{summary_path} is not there; train to the end first, with ./launch/quickstart.sh")
  with checkpoint.Checkpoints(args.workdir, read_only=True) as checkpoints:
    config = checkpoints.config()
    state, _ = loop.restore_or_init(config, sharding.make_mesh(config.mesh), checkpoints)
  corpus = run_lib.load_corpus(args.workdir, config)
  parts, depths = report.measure_held_out(config, {"params": state.params, "balance": state.balance}, corpus)
  model, data = config.model, config.data
  sizes = dict(steps=config.train.steps, batch=data.batch_size, seq_len=data.seq_len, d_model=model.d_model,
               num_layers=model.num_layers, num_recursions=model.num_recursions, vocab_size=model.vocab_size)
  record = harness.header("quickstart", argv, model.compute_dtype, sizes)
  record |= dict(summary=json.loads(summary_path.read_text(encoding="utf-8")), parts=parts, depths=depths,
                 mean_depth=float(np.mean(depths)))
  harness.write(record, args.out)


NOTE = (
    "{summary[params]:,.0f} parameters, {sizes[steps]} steps of {sizes[batch]} x {sizes[seq_len]} tokens "
    "({summary[train_tokens]:,.0f} in all), mean depth {mean_depth:.2f} of {sizes[num_recursions]}.")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: held-out bits per byte beside the compressors'."""
  labels = dict(bpb_causal="this model, causal routing", bpb_oracle="this model, oracle routing",
                bpb_xz="`xz -9`", bpb_gzip="`gzip -9`")
  rows = [[label, f"{record['summary'][name]:.3f}"] for name, label in labels.items()]
  return [["held-out text", "bits per byte"], *rows]


if __name__ == "__main__":
  harness.run(main)
