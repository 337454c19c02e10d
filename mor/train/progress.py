"""A live progress bar on a terminal, plain lines anywhere else."""

from collections.abc import Mapping
import sys
import time

import rich.console
import rich.progress


class Progress:
  """Shows a run on stderr. Use as a context manager."""

  def __init__(self, start_step: int, num_steps: int, enabled: bool = True):
    self._num_steps, self._enabled = num_steps, enabled
    self._first = None  # the first step seen, and when: compilation is no pace
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
    """Time to go at the mean pace so far, as minutes:seconds."""
    start, started = self._first or (step, 0.0)
    if step <= start:
      return "?"
    seconds = int((time.perf_counter() - started) / (step - start) * (self._num_steps - step))
    return f"{seconds // 60}:{seconds % 60:02d}"


_SHOWN = (  # metric, label, format
    ("loss", "loss", ".4f"),
    ("learning_rate", "lr", ".2e"),
    ("grad_norm", "grad", ".2f"),
    ("tokens_per_second", "tok/s", ",.0f"),
    ("mfu", "mfu", ".1%"),
)
