"""Runs of several processes on this machine, with CPU devices and real collectives.

  run = processes.Run(directory / "run", config)
  ended = run.start(count=2).wait()
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from mor import checkpoint
from mor import config as config_lib
from mor import sharding
from mor.train import loop
from mor.train import metrics


class Started:
  """Processes of one run. Use as a context manager, which leaves none behind."""

  def __init__(self, commands: Sequence[Sequence[str]], workdir: pathlib.Path, devices: int):
    keep = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags = [*keep, f"--xla_force_host_platform_device_count={devices // len(commands)}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    self.logs = [workdir.with_name(f"{workdir.name}.{index}.log") for index in range(len(commands))]
    self.processes = []
    for command, path in zip(commands, self.logs):
      with path.open("a", encoding="utf-8") as log:
        self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))

  def __enter__(self) -> "Started":
    return self

  def __exit__(self, *unused) -> None:
    self.kill()

  def kill(self) -> None:
    """Kills what still runs."""
    for process in self.processes:
      with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGCONT)
        process.kill()
      process.wait()

  def running(self) -> bool:
    return all(process.poll() is None for process in self.processes)

  def wait(self, seconds: float = 600) -> list[int]:
    """Exit statuses of all, killed after so many seconds."""
    until = time.monotonic() + seconds
    try:
      return [process.wait(max(0.1, until - time.monotonic())) for process in self.processes]
    except subprocess.TimeoutExpired:
      self.kill()
      raise

  def text(self, index: int) -> str:
    """What a process has printed, and those of its number before it."""
    return self.logs[index].read_text(encoding="utf-8")


class Run:
  """A workdir and a config."""

  def __init__(self, workdir: pathlib.Path, config: config_lib.Config):
    self.workdir, self.config = workdir, config

  def start(self, count: int, *options: str) -> Started:
    """Starts training in `count` processes."""
    command = [sys.executable, "-m", "mor.main", "--config=base", f"--workdir={self.workdir}",
               *_overrides(config_lib.to_dict(self.config), config_lib.default().to_dict(), "config"), *options]
    together = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"] if count > 1 else []
    return Started([[*command, *together, *([f"--process_id={index}"] if together else [])] for index in range(count)],
                   self.workdir, math.prod(dataclasses.astuple(self.config.mesh)))

  def step(self) -> int:
    """Newest step that is written down."""
    return max((row["step"] for row in metrics.read(self.workdir)), default=0)

  def wait_for(self, step: int, started: Started) -> None:
    """Waits until the step is written down."""
    while self.step() < step:
      assert started.running(), "".join(map(started.text, range(len(started.logs))))
      time.sleep(0.005)

  def losses(self) -> dict[int, float]:
    """Every written loss, by step; each step once."""
    rows = [(row["step"], row["train/loss"]) for row in metrics.read(self.workdir) if "train/loss" in row]
    assert len(rows) == len(dict(rows)), "a step is written twice"
    return dict(rows)

  def state(self):
    """The newest checkpoint on this process's first device, and its step."""
    with checkpoint.Checkpoints(self.workdir, read_only=True) as checkpoints:
      mesh = sharding.make_mesh(config_lib.MeshConfig(data=1, fsdp=1, tensor=1, sequence=1))
      return loop.restore_or_init(self.config, mesh, checkpoints)

  def saved(self) -> list[int]:
    """Steps of whole checkpoints."""
    return sorted(int(path.name) for path in (self.workdir / "checkpoints").iterdir()
                  if re.fullmatch(r"\d+", path.name))


def free_port() -> int:
  """A port of this machine that nobody listens on."""
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


def _overrides(values: dict, defaults: dict, prefix: str) -> list[str]:
  """Command-line flags for what differs; lists are left as they are."""
  flags = []
  for name, value in values.items():
    if isinstance(value, dict):
      flags += _overrides(value, defaults[name], f"{prefix}.{name}")
    elif not isinstance(value, (list, tuple)) and value != defaults[name]:
      flags.append(f"--{prefix}.{name}={value}")
  return flags
