"""Records what a finished quickstart reached, and where its depth goes.

  python -m benchmarks.quickstart --workdir=runs/quickstart \\
    --out=benchmarks/results/quickstart.json
"""

import json
import pathlib

import numpy as np

from benchmarks import harness as results
from mor import checkpoint
from mor import report
from mor import sharding
from mor.data import text
from mor.train import loop


def main(argv: list[str]) -> None:
  """Writes the record of one workdir."""
  parser = results.Parser(prog="python -m benchmarks.quickstart", description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="of a finished run")
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  summary_path = pathlib.Path(args.workdir) / "summary.json"
  if not summary_path.is_file():
    raise ValueError(f"{summary_path} is not there; train to the end first, with ./launch/quickstart.sh")
  with checkpoint.Checkpoints(args.workdir, read_only=True) as checkpoints:
    config = checkpoints.config()
    state, _ = loop.restore_or_init(config, sharding.make_mesh(config.mesh), checkpoints)
  corpus = text.load(config.data, config.model.vocab_size)
  parts, depths = report.measure_held_out(config, {"params": state.params, "balance": state.balance}, corpus)
  model, data = config.model, config.data
  sizes = dict(steps=config.train.steps, batch=data.batch_size, seq_len=data.seq_len, d_model=model.d_model,
               num_layers=model.num_layers, num_recursions=model.num_recursions, vocab_size=model.vocab_size)
  record = results.header("quickstart", argv, model.compute_dtype, sizes)
  record |= dict(summary=json.loads(summary_path.read_text(encoding="utf-8")), parts=parts, depths=depths,
                 mean_depth=float(np.mean(depths)))
  results.write(record, args.out)


if __name__ == "__main__":
  results.run(main)
