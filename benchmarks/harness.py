"""How every benchmark measures, and what it writes.

Variants take turns, A B C A B C, after rounds that only warm up (`take_turns`). Each
notes its seconds on two clocks, when the device is done (`Timed`):

  wall   seconds by the clock
  cpu    processor seconds of this process; pinned to one core (`--pin=0`) they are
         the time that the work takes on a quiet core

Rates and ratios go by the wall, or by the processor where the process is pinned to a core.
An accelerator's work takes no processor time, so `choose_clock` refuses to pin beside one.

A ratio is taken round by round (`ratios`), so that what else the machine does falls
on all variants alike; its median stands in the tables, beside least and greatest.

A result lies in `benchmarks/results/NAME.json`; `tables.py` turns it into a table of a
page. Beside its figures it holds the fields of `header`, so that the same command on
the same commit can be run again.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[1]
DIRECTORY = ROOT / "benchmarks" / "results"


@dataclasses.dataclass
class Timed:
  """A variant, and what it took in each round; a benchmark's variants inherit.

  Attributes:
    name: name of the variant in the record.
    amounts: work done in each round, e.g. tokens.
    wall, cpu: seconds of each round.
  """

  name: str
  amounts: list[float] = dataclasses.field(default_factory=list, init=False)
  wall: list[float] = dataclasses.field(default_factory=list, init=False)
  cpu: list[float] = dataclasses.field(default_factory=list, init=False)

  def start_round(self) -> None:
    """Begins a round, in which nothing has been done."""
    for values in (self.amounts, self.wall, self.cpu):
      values.append(0)

  def time(self, function: Callable[[], Any]) -> Any:
    """Calls the function and adds what it takes, device included, to the round; returns what it returns."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function())
    self.cpu[-1] += time.process_time() - cpu
    self.wall[-1] += time.perf_counter() - wall
    return result

  def seconds(self, clock: str) -> list[float]:
    """Returns the seconds of each round."""
    return {"wall": self.wall, "cpu": self.cpu}[clock]

  def rates(self, clock: str) -> list[float]:
    """Returns the work a second of each round."""
    return [amount / seconds for amount, seconds in zip(self.amounts, self.seconds(clock))]


@dataclasses.dataclass
class Program(Timed):
  """A variant that is one function, which does `amount` of work."""

  function: Callable[[], Any]
  amount: float = 1.0

  def run(self) -> None:
    """Runs and times the function once."""
    self.time(self.function)
    self.amounts[-1] += self.amount


def take_turns(variants: Sequence[Any], rounds: int, warm_up: int = 0, play: Callable[[], None] | None = None,
               tell: Callable[[Any], str] | None = None, label: str = "") -> None:
  """Times the variants in turn; afterwards each holds `rounds` rounds.

  Args:
    variants: objects of `Timed`.
    rounds: rounds that count.
    warm_up: rounds before them, which do not.
    play: plays a round; None calls each variant's `run`.
    tell: says of a variant what a line on stderr tells after each round; None is silent.
    label: beginning of that line.
  """
  for index in range(warm_up + rounds):
    for variant in variants:
      variant.start_round()
    if play is None:
      for variant in variants:
        variant.run()
    else:
      play()
    if tell is not None:
      told = ", ".join(f"{variant.name} {tell(variant)}" for variant in variants)
      print(f"{label}round {index + 1} of {warm_up + rounds}: {told}", file=sys.stderr, flush=True)
  for variant in variants:
    for values in (variant.amounts, variant.wall, variant.cpu):
      del values[:warm_up]


def ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
  """Returns the spread of the ratio, round by round."""
  return spread([a / b for a, b in zip(values, others, strict=True)])


class Parser(argparse.ArgumentParser):
  """Options as `--name=value`; a mistake in them is a `ValueError`."""

  def error(self, message: str):
    raise ValueError(f"{message}; --help lists the options")


def header(benchmark: str, argv: list[str], dtype: str, sizes: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields that all results share.

  Args:
    benchmark: module name below `benchmarks`, whose `table` lays the record out.
    argv: the command's arguments.
    dtype: compute dtype.
    sizes: shapes and settings of what is measured.
  """
  return {
      "benchmark": benchmark,
      "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *argv]),
      "commit": commit(),
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


def choose_clock(core: int | None) -> str:
  """Returns the clock by which rates are judged: "wall", or "cpu" after pinning this process to a core.

  Raises:
    ValueError: there is no such core, the system cannot pin, or the work is done on an accelerator.
  """
  if core is None:
    return "wall"
  pin(core)
  if jax.default_backend() != "cpu":
    raise ValueError(f"--pin={core} judges by processor time, and the work is done on a {jax.default_backend()}; leave it "
                     "out, so that wall time counts")
  return "cpu"


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
  """Returns the number of cores that this process may use."""
  return len(_affinity())


def spread(values: Sequence[float]) -> dict[str, float]:
  """Returns least, median and greatest."""
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


def commit(directory: pathlib.Path = ROOT) -> str:
  """Returns the commit of a checkout's code, with "+" where files differ from it; "unknown" outside git."""
  def git(*arguments):
    return subprocess.run(["git", "-C", str(directory), *arguments], check=True, text=True,
                          capture_output=True).stdout.strip()
  try:
    return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "mor", "configs", "benchmarks/*.py"))
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def _processor() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
  except OSError:
    return platform.processor()
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor()
