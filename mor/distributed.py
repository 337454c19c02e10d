"""Several processes as one run: how they start, agree and end.

Every process runs the same program, and jax joins their devices into one list. If one
process takes another path (it stops, or reads another checkpoint), the other processes
wait in a collective for ever. So all processes make such decisions together, here.
"""

import itertools
import os
import sys
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import multihost

# Time without a heartbeat after which a process counts as lost; and time that the other
# processes wait at the end for process 0, which writes the report.
_HEARTBEAT_SECONDS, _SHUTDOWN_SECONDS = 100, 3600
_COMPILE_SECONDS = 7200
_programs = itertools.count()  # programs that all processes have compiled


def initialize(mode: str = "off", coordinator: str | None = None, num_processes: int | None = None,
               process_id: int | None = None) -> None:
  """Joins the processes of a run; without arguments, the run has one process.

  Call it before anything asks jax for a device.

  Args:
    mode: "auto" asks the cluster (TPU pod, SLURM, Kubernetes, Open MPI) for the rest; "off".
    coordinator: HOST:PORT that process 0 opens and every other process reaches.
    num_processes: number of processes of the run.
    process_id: number of this process, 0 to num_processes - 1.

  Raises:
    ValueError: the arguments do not fit together, or the cluster is unknown.
    OSError: the other processes cannot be reached.
  """
  given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
  _check(mode, given)
  if mode == "off" and coordinator is None:
    return
  # The handler of this service would swallow a SIGTERM that comes before our handler (train/signals.py).
  jax.config.update("jax_enable_preemption_service", False)
  # Two programs at once would mix up their collectives, because CPU devices match them by order alone.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  try:
    jax.distributed.initialize(
        coordinator, num_processes, process_id, cluster_detection_method=None if mode == "auto" else "deactivate",
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, shutdown_timeout_seconds=_SHUTDOWN_SECONDS)
  except (ValueError, RuntimeError) as error:
    if jax.distributed.is_initialized():
      raise
    reason = first_line(error)
    if mode == "auto":
      raise ValueError(f"--distributed=auto finds no cluster here ({reason}); give --coordinator=HOST:PORT, "
                       "--num_processes=N and --process_id=I, or nothing for one process") from error
    raise OSError(f"--coordinator={coordinator}: {reason}; start all {num_processes} processes, and check that they "
                  "reach the port of process 0") from error


def _check(mode: str, given: dict[str, Any]) -> None:
  missing = [name for name, value in given.items() if value is None]
  present = [f"--{name}={value}" for name, value in given.items() if value is not None]
  if mode == "auto" and present:
    raise ValueError(f"--distributed=auto with {present[0]}; give one or the other")
  if present and missing:
    raise ValueError(f"{' '.join(present)} without {' and '.join(f'--{name}' for name in missing)}; "
                     "give all three, or --distributed=auto")
  if not present:
    return
  host, _, port = given["coordinator"].rpartition(":")
  if not (host and port.isdigit() and 0 < int(port) < 2**16):
    raise ValueError(f"--coordinator={given['coordinator']}; use HOST:PORT of process 0, e.g. 10.0.0.1:8476")
  if given["num_processes"] < 1:
    raise ValueError(f"--num_processes={given['num_processes']}; use at least 1")
  if not 0 <= given["process_id"] < given["num_processes"]:
    raise ValueError(f"--process_id={given['process_id']} of --num_processes={given['num_processes']}; "
                     f"use 0 to {given['num_processes'] - 1}")


def is_main() -> bool:
  """Returns True in process 0, which alone prints and writes."""
  return jax.process_index() == 0


def first_line(error: BaseException) -> str:
  """Returns the first line of the message of an error; its type if it has none."""
  return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def process_name() -> str:
  """Returns e.g. " (process 3)" for messages if the run has several processes, else ""."""
  return f" (process {jax.process_index()})" if jax.distributed.is_initialized() else ""


def any_process(mine: bool) -> bool:
  """Returns True if any process passes True; waits for all processes."""
  return mine if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(mine))))


def from_main(mine: bool) -> bool:
  """Returns the value that process 0 passes."""
  return mine if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.asarray(mine)))


def barrier(name: str) -> None:
  """Waits until every process has called it."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def compile_together(jitted: jax.stages.Wrapped, *args: Any) -> None:
  """Compiles a function for its next call, and waits until every process has compiled it.

  Compilation times differ by minutes, but a collective of CPU devices waits only 30 seconds.
  """
  if jax.process_count() > 1:
    jitted.lower(*args).compile()
    multihost.get_barrier_sync_fn()(key=f"program {next(_programs)}", timeout_ms=1000 * _COMPILE_SECONDS)


def gather(tree: Any) -> Any:
  """Returns whole arrays that this process can read alone; all processes must call it."""
  return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def is_lost(error: BaseException | None) -> bool:
  """Returns True if an error, or its cause, means that another process is gone."""
  while error is not None:
    text = str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) or "Gloo " in text:  # a save raises it as ValueError
      return jax.distributed.is_initialized() and jax.process_count() > 1 and "RESOURCE_EXHAUSTED" not in text
    error = error.__cause__ or error.__context__
  return False


def shutdown() -> None:
  """Leaves a finished run; waits for the other processes."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()


def abandon(status: int) -> int:
  """Leaves the run after an error; in a run of one process, returns `status`.

  The other processes may wait for this process in a collective, so waiting for them would
  take for ever. Instead this process ends here, and the others notice and end as well.
  """
  if jax.distributed.is_initialized():
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
      time.sleep(2)  # process 0 is the coordinator: the others print their own error first
    os._exit(status)
  return status
