"""Makes every figure of the documentation from the results that were measured.

  python -m benchmarks.figures

docs/depth.png from benchmarks/results/quickstart.json, docs/study.png from
benchmarks/results/study_cpu.json, docs/early_exit.png from
benchmarks/results/early_exit_smollm2.json.
"""

import collections
import json

from benchmarks import harness
from mor import plots

DOCS = harness.ROOT / "docs"


def depth(record: dict) -> bytes:
  """Draws a held-out text, each token on the colour of its depth."""
  return plots.text_by_depth(record["parts"], record["depths"], record["sizes"]["num_recursions"])


def early_exit(record: dict) -> bytes:
  """Draws speed against agreement with full depth, a line for each kind of request over its thresholds."""
  lines = collections.defaultdict(list)
  for row in record["batches"][0]["variants"]:
    lines[row["variant"].partition("-")[0]].append((row["to_full"]["median"], row["agreement"]["equal"]))
  return plots.trade_off(lines, "speed, full depth = 1", "tokens as the full depth's")


FIGURES = {  # file below docs/ -> result, and what draws it
    "depth.png": ("quickstart.json", depth),
    "study.png": ("study_cpu.json", plots.study_curves),
    "early_exit.png": ("early_exit_smollm2.json", early_exit),
}


def main(argv: list[str]) -> None:
  """Writes docs/*.png."""
  harness.Parser(prog="python -m benchmarks.figures", description=__doc__.splitlines()[0]).parse_args(argv)
  DOCS.mkdir(exist_ok=True)
  for name, (source, draw) in FIGURES.items():
    path = harness.DIRECTORY / source
    if not path.is_file():
      raise ValueError(f"docs/{name} has no {path}; run its benchmark with --out={path}")
    (DOCS / name).write_bytes(draw(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
  harness.run(main)
