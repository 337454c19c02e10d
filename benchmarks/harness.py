"""What every benchmark writes: one JSON object that says how it was made.

A result lies in `benchmarks/results/NAME.json`; `tables.py` turns it into a
table of docs/results.md. Beside its figures it holds `header`'s fields, so that the
same command on the same commit can be run again.
"""

import argparse
from collections.abc import Callable
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[1]
DIRECTORY = ROOT / "benchmarks" / "results"


class Parser(argparse.ArgumentParser):
  """Options as `--name=value`; a mistake in them is a `ValueError`."""

  def error(self, message: str):
    raise ValueError(f"{message}; --help lists the options")


def header(benchmark: str, argv: list[str], dtype: str, sizes: dict[str, Any]) -> dict[str, Any]:
  """The fields that all results share.

  Args:
    benchmark: module name below `benchmarks`; picks the table's form.
    argv: the command's arguments.
    dtype: compute dtype.
    sizes: shapes and settings of what is measured.
  """
  return {
      "benchmark": benchmark,
      "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *argv]),
      "commit": _commit(),
      "device": jax.devices()[0].device_kind,
      "processor": _processor(),
      "cores": os.cpu_count(),
      "cores_used": len(_affinity()),
      "load_average": os.getloadavg()[0],
      "dtype": dtype,
      "sizes": sizes,
      "jax": jax.__version__,
      **({"xla_flags": os.environ["XLA_FLAGS"]} if os.environ.get("XLA_FLAGS") else {}),
      "python": platform.python_version(),
  }


def write(record: dict[str, Any], path: str) -> None:
  """Writes the record to a file, or to standard output where `path` is empty."""
  text = json.dumps(record, indent=1) + "\n"
  if not path:
    sys.stdout.write(text)
    return
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  pathlib.Path(path).write_text(text, encoding="utf-8")


def pin(core: int) -> None:
  """Keeps this process on one core; before JAX starts its threads.

  Raises:
    ValueError: there is no such core, or the system cannot pin.
  """
  if not hasattr(os, "sched_setaffinity"):
    raise ValueError(f"--pin={core}: {platform.system()} cannot pin a process; leave it out")
  if core not in _affinity():
    raise ValueError(f"--pin={core} is not a core of this process; use one of {sorted(_affinity())}")
  os.sched_setaffinity(0, {core})


def num_cores() -> int:
  """Cores this process may use."""
  return len(_affinity())


def spread(values: list[float]) -> dict[str, float]:
  """Least, median and greatest."""
  return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def run(main: Callable[[list[str]], None]) -> None:
  """Runs a benchmark's `main`; what is wrong with the request is one line and status 2."""
  try:
    main(sys.argv[1:])
  except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
    if os.environ.get("MOR_TRACEBACK"):
      raise
    sys.exit(_fail(error))


def _fail(error: Exception) -> int:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  print(f"error: {(lines or [type(error).__name__])[0]}", file=sys.stderr)
  return 2


def _affinity() -> set[int]:
  return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count()))


def _commit() -> str:
  """Commit of the code, with "+" where files differ from it; "unknown" outside git."""
  def git(*arguments):
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, text=True,
                          capture_output=True).stdout.strip()
  try:
    return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "mor", "configs"))
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _processor() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  except OSError:
    return platform.processor()
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor()
