"""What a run writes down and shows: metrics.jsonl, TensorBoard events, throughput, progress.

`metrics.jsonl` has one JSON object per line, {"step": s, "train/loss": …}, where s
counts finished optimizer steps: one line of train/ values for every logged step
and one of eval/ values for every evaluation. A resumed run first drops the lines
written after its checkpoint, so that no step appears twice.

An object store cannot append. So for a gs:// workdir both files are written to a temporary
local directory and copied to the store as a whole: at every evaluation, at every save
(`Writer.copy`) and at the end. A killed run loses only lines after its last save, and the
resumed run measures these steps again.
"""

import contextlib
import json
import os
import pathlib
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import rich.console
import rich.progress
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto import summary_pb2
from tensorboard.summary.writer import record_writer

from mor import paths

# Dense bfloat16 peak of one device in FLOP/s, by a part of its `device_kind`;
# the first match counts. Vendors' data sheets. None is listed for CPUs.
PEAK_FLOPS = (
    ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("GH200", 989e12), ("B200", 2250e12),
    ("A100", 312e12), ("A10G", 70e12), ("L40S", 362e12), ("L4", 121e12), ("RTX 4090", 165e12), ("V100", 125e12),
    ("T4", 65e12), ("TPU v6", 918e12), ("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12),
    ("TPU v5", 459e12), ("TPU v4", 275e12), ("TPU v3", 61.5e12), ("TPU v2", 22.5e12))

_SHOWN = (  # metric, label, format
    ("loss", "loss", ".4f"),
    ("learning_rate", "lr", ".2e"),
    ("grad_norm", "grad", ".2f"),
    ("tokens_per_second", "tok/s", ",.0f"),
    ("mfu", "mfu", ".1%"),
)


def peak_flops(device_kind: str) -> float | None:
  """Returns the peak FLOP/s of a device by the name that jax gives it; None if unknown."""
  return next((peak for name, peak in PEAK_FLOPS if name.lower() in device_kind.lower()), None)


class Throughput:
  """Tokens per second, and MFU if the peak of the device is known.

  Only the time between `restart` and `pause` counts, so compilation, evaluation
  and saving are left out.
  """

  def __init__(self, tokens_per_step: int, flops_per_token: Callable[[int], float], device_kind: str,
               num_devices: int):
    """Prepares the clock.

    Args:
      tokens_per_step: tokens of a batch.
      flops_per_token: function from the number of a finished step, from 1, to its FLOPs per token.
      device_kind: name of the device, as jax gives it.
      num_devices: number of devices.
    """
    self._tokens_per_step = tokens_per_step
    self._flops_per_token = flops_per_token
    peak = peak_flops(device_kind)
    self._peak = peak and peak * num_devices
    self._mark = None

  @property
  def running(self) -> bool:
    return self._mark is not None

  def pause(self) -> None:
    """Stops the clock, until `restart` or `read`."""
    self._mark = None

  def restart(self, step: int) -> None:
    """Starts the clock at `step`, which has just finished."""
    self._mark = (step, time.perf_counter())

  def read(self, step: int) -> dict[str, float]:
    """Returns the rates since the last reading; {} if no step has finished since then."""
    mark = self._mark
    self.restart(step)
    if mark is None or step <= mark[0]:
      return {}
    rate = (step - mark[0]) * self._tokens_per_step / (self._mark[1] - mark[1])
    if not self._peak:
      return {"tokens_per_second": rate}
    flops = statistics.fmean(map(self._flops_per_token, range(mark[0] + 1, step + 1)))
    return {"tokens_per_second": rate, "mfu": rate * flops / self._peak}


class Writer:
  """Appends to a workdir's metrics.jsonl and TensorBoard events."""

  def __init__(self, workdir: str | os.PathLike, start_step: int, enabled: bool = True):
    """Opens the files, and drops the lines of steps after `start_step`.

    Args:
      workdir: run directory.
      start_step: finished steps of the state that the run starts from.
      enabled: whether to write; True on one process only.

    Raises:
      OSError: the files cannot be written.
      ValueError: metrics.jsonl is damaged.
    """
    self._lines = self._events = self._remote = None
    if not enabled:
      return
    if paths.is_url(workdir):
      self._remote = paths.directory(workdir)
      self._temporary = tempfile.TemporaryDirectory(prefix="mor-metrics-")
      path = pathlib.Path(self._temporary.name) / "metrics.jsonl"
    else:
      path = pathlib.Path(workdir).expanduser() / "metrics.jsonl"
    self._path = path
    with _writing(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      _keep_until(start_step, workdir, path)
      self._open(start_step)
    self.copy()

  def _open(self, start_step: int) -> None:
    path = self._path
    self._lines = path.open("a", encoding="utf-8")
    board = path.parent / "tensorboard"
    board.mkdir(exist_ok=True)
    # Events are written in this thread: the writer thread of TensorBoard's
    # EventFileWriter hides a full disk until much later.
    name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{start_step}"
    self._events = record_writer.RecordWriter((board / name).open("wb"))
    self._put_event(file_version="brain.Event:2")
    if start_step:
      self._put_event(step=start_step + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind, *unused) -> None:
    try:
      if self._lines:
        with _writing(self._path), contextlib.closing(self._events), self._lines:
          pass
        self.copy()
    except OSError:
      if kind is None:  # an error on its way says more than a second error of the same disk
        raise
    finally:
      if self._remote:
        self._temporary.cleanup()

  def copy(self) -> None:
    """Copies the files to the workdir if it is an object store.

    Raises:
      OSError: the store cannot be written.
    """
    if self._remote is None:
      return
    local = pathlib.Path(self._temporary.name)
    try:
      for file in sorted(file for file in local.rglob("*") if file.is_file()):
        (self._remote / file.relative_to(local)).write_bytes(file.read_bytes())
    except Exception as error:  # each store has errors of its own
      raise OSError(f"cannot copy the metrics to {self._remote}: {type(error).__name__} {str(error).strip()[:200]}; "
                    "check its permissions and run the same command again") from error

  def write(self, step: int, group: str, values: Mapping[str, float]) -> None:
    """Writes `values` of a finished step under the names group/name.

    Raises:
      OSError: the disk is full; the message has one line.
    """
    if self._lines is None:
      return
    values = {f"{group}/{k}": v for k, v in values.items()}
    with _writing(self._path):
      self._lines.write(json.dumps({"step": step, **values}) + "\n")
      self._lines.flush()
      scalars = [summary_pb2.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
      self._put_event(step=step, summary=summary_pb2.Summary(value=scalars))
      self._events.flush()
    if group == "eval":
      self.copy()

  def _put_event(self, **fields: Any) -> None:
    self._events.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())


def read(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Returns the lines of the metrics.jsonl of a run, without a last line that was cut short.

  Raises:
    ValueError: another line is damaged.
  """
  path = paths.directory(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  rows = []
  *whole, last = path.read_bytes().split(b"\n")
  for number, line in enumerate([*whole, last], 1):
    row = _parse(line)
    if row is not None:
      rows.append(row)
    elif number <= len(whole) and line.strip():  # the last line may lack its end: the process was killed
      raise ValueError(f"{path} line {number} is not a JSON object with a step and figures: {line[:60]!r}; delete "
                       "that line")
  return rows


def _parse(line: bytes) -> dict[str, float] | None:
  """Returns the object of a line; None if it is not what `Writer.write` writes."""
  try:
    row = json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError):
    return None
  if not isinstance(row, dict) or type(row.get("step")) is not int:
    return None
  return row if all(isinstance(value, int | float) for value in row.values()) else None


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
  """Turns any error of the disk into an OSError of one line with the path and the remedy."""
  try:
    yield
  except OSError as error:
    full = error.errno in paths.FULL
    remedy = "free some space" if full else "make its directory writable, or give another --workdir"
    raise OSError(f"cannot write {path}: {error.strerror or error}; {remedy} and run the same command again") from error


def _keep_until(step: int, workdir: str | os.PathLike, path: pathlib.Path) -> None:
  """Writes the lines of steps up to `step` to `path`, all or nothing if the process is killed."""
  paths.write_whole(path, "".join(json.dumps(row) + "\n" for row in read(workdir) if row["step"] <= step))


class Progress:
  """A live progress bar on a terminal, plain lines anywhere else, both on stderr. Use as a context manager."""

  def __init__(self, start_step: int, num_steps: int, enabled: bool = True):
    self._num_steps, self._enabled = num_steps, enabled
    self._first = None  # the first step and its time; compilation must not count
    self._bar = None
    console = rich.console.Console(file=sys.stderr)
    if enabled and console.is_terminal:
      self._bar = rich.progress.Progress(
          rich.progress.TextColumn("step"), rich.progress.MofNCompleteColumn(), rich.progress.BarColumn(),
          rich.progress.TextColumn("{task.fields[values]}"), rich.progress.TimeRemainingColumn(),
          console=console, refresh_per_second=4)
      self._task = self._bar.add_task("train", total=num_steps, completed=start_step, values="compiling")

  def __enter__(self) -> "Progress":
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *unused) -> None:
    if self._bar:
      self._bar.stop()

  def step(self, step: int) -> None:
    """Moves the bar to `step`."""
    self._first = self._first or (step, time.perf_counter())
    if self._bar:
      self._bar.update(self._task, completed=step)

  def show(self, step: int, values: Mapping[str, float]) -> None:
    """Shows the values of a logged step."""
    text = "  ".join(f"{label} {values[name]:{form}}" for name, label, form in _SHOWN if name in values)
    if self._bar:
      self._bar.update(self._task, completed=step, values=text)
    elif self._enabled:
      print(f"step {step}/{self._num_steps}  {text}  left {self._left(step)}", file=sys.stderr, flush=True)

  def say(self, text: str) -> None:
    """Prints a line above the bar."""
    if self._bar:
      self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif self._enabled:
      print(text, file=sys.stderr, flush=True)

  def _left(self, step: int) -> str:
    """Returns the remaining time at the mean pace so far, as minutes:seconds."""
    start, started = self._first or (step, 0.0)
    if step <= start:
      return "?"
    seconds = int((time.perf_counter() - started) / (step - start) * (self._num_steps - step))
    return f"{seconds // 60}:{seconds % 60:02d}"
