"""Records what the simulator of `throughput.py` says of the paper's Table K.2.

  python -m benchmarks.throughput_k2 --out=benchmarks/results/throughput_k2.json
"""

import dataclasses

from benchmarks import harness as results
from benchmarks import throughput


def main(argv: list[str]) -> None:
  """Simulates and writes the record."""
  parser = results.Parser(prog="python -m benchmarks.throughput_k2", description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  rows = throughput.table_k2()
  record = results.header("throughput_k2", argv, "float64", {"requests": throughput.K2_REQUESTS})
  record["rows"] = [{**dataclasses.asdict(row), "error": row.error} for row in rows]
  record["largest_error"] = max(abs(row.error) for row in rows)
  results.write(record, args.out)


if __name__ == "__main__":
  results.run(main)
