"""Rewrites the tables of README.md and docs/ from the results that were measured.

  python -m benchmarks.tables

Between `<!-- table:NAME -->` and the next `<!-- end -->` stands the table of
`benchmarks/results/NAME.json`, which the benchmark that made it lays out (`table`),
above a line that says how (`NOTE`). Nothing else changes.
"""

import importlib
import json
import pathlib
import re

from benchmarks import harness
from mor.study import report as study_report

MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

FORMER = {"train_throughput": "train", "decode_throughput": "decode", "throughput_k2": "throughput"}  # of older results


def pages() -> list[pathlib.Path]:
  """Returns the pages that may show tables."""
  return [harness.ROOT / "README.md", *sorted((harness.ROOT / "docs").glob("**/*.md"))]


def rewrite(text: str, directory: pathlib.Path) -> str:
  """Returns the text with every marked table made anew.

  Raises:
    ValueError: a marked table has no result, or no end.
  """
  found = MARKED.findall(text)
  if len(found) != len(re.findall(r"<!-- table:", text)):
    raise ValueError("a <!-- table:NAME --> has no <!-- end --> after it; add one on its own line")
  return MARKED.sub(lambda match: match[1] + table(match[2], directory) + match[3], text)


def table(name: str, directory: pathlib.Path) -> str:
  """Returns the Markdown of `NAME.json`: the table, and how it was measured."""
  path = directory / f"{name}.json"
  if not path.is_file():
    raise ValueError(f"table:{name} has no {path}; run its benchmark with --out={path}")
  record = json.loads(path.read_text(encoding="utf-8"))
  if "study" in record:
    return study_report.tables(record)
  benchmark = importlib.import_module(f"benchmarks.{FORMER.get(record['benchmark'], record['benchmark'])}")
  head, *rows = benchmark.table(record)
  lines = [head, ["---"] * len(head), *rows]
  made = (f"{record['processor'] if record['device'] == 'cpu' else record['device']}, "
          f"{record['cores_used']} of {record['cores']} cores, {record['dtype']}, JAX {record['jax']}, "
          f"commit {record['commit']}")
  flags = f"XLA_FLAGS={record['xla_flags']} " if "xla_flags" in record else ""
  return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "",
                    f"{benchmark.NOTE.format(**record)} {made}:", f"`{flags}{record['command']}`", ""])


def main(argv: list[str]) -> None:
  """Rewrites the pages.

  Raises:
    ValueError: no page shows a result, or a page shows one that is not there.
  """
  harness.Parser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0]).parse_args(argv)
  shown = set()
  for page in pages():
    text = page.read_text(encoding="utf-8")
    shown |= {name for _, name, _ in MARKED.findall(text)}
    page.write_text(rewrite(text, harness.DIRECTORY), encoding="utf-8")
  hidden = sorted(path.stem for path in harness.DIRECTORY.glob("*.json") if path.stem not in shown)
  if hidden:
    raise ValueError(f"no page shows benchmarks/results/{hidden[0]}.json; add <!-- table:{hidden[0]} --> to one, or "
                     "remove the result")


if __name__ == "__main__":
  harness.run(main)
