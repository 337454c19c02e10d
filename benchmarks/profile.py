"""Where the time of a compiled program goes on a GPU, by the part of the model.

`jax.profiler` records every kernel with the instruction that it is of; the program's
text says under which `jax.named_scope` that instruction was traced. Kernels are summed
by scope and by pass: forward, backward, or the forward that is computed again.
"""

from collections.abc import Callable
import pathlib
import re
import tempfile

import jax

SCOPES = ("cudnn", "splash", "attend", "attention", "ffw", "top_k", "gather", "scatter", "embed", "loss", "optimizer")
_NAMED = re.compile(r"%?([\w.\-]+) = .*op_name=\"([^\"]*)\"")
_AGAIN = ("rematted_computation", "checkpoint/remat")


def part(op_name: str) -> str:
  """Returns the innermost of `SCOPES` in an instruction's `op_name`, and the pass: "ffw backward"."""
  words = re.findall(r"\w+", op_name)
  scope = next((word for word in reversed(words) if word in SCOPES), "rest")
  if any(mark in op_name for mark in _AGAIN):
    return f"{scope} again"
  return f"{scope} backward" if "transpose(" in op_name else scope


def parts(text: str) -> dict[str, str]:
  """Returns the part of each instruction of a program, by name; `text` is what `Compiled.as_text` gives."""
  found = (match for line in text.splitlines() if (match := _NAMED.search(line)))
  return {match[1]: part(match[2]) for match in found}


def events(directory: str) -> list[tuple[str, str, float]]:
  """Returns kernel, instruction ("" if not known) and milliseconds of all that a device ran.

  Args:
    directory: given to `jax.profiler.trace`.

  Raises:
    OSError: no profile is there.
  """
  files = sorted(pathlib.Path(directory).rglob("*.xplane.pb"))
  if not files:
    raise OSError(f"no profile (*.xplane.pb) under {directory}")
  found = []
  for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
    if plane.name.startswith("/device:GPU"):
      for line in plane.lines:
        if line.name.startswith("Stream"):
          found += [(event.name, str(dict(event.stats).get("hlo_op", "")), event.duration_ns / 1e6)
                    for event in line.events]
  return found


def breakdown(run: Callable[[], None], text: str, times: int = 2) -> dict[str, list]:
  """Milliseconds of a run by part, greatest first, and of the kernels that take most.

  Args:
    run: runs the program once and waits for it.
    text: of the program.
    times: runs that are averaged.

  Returns:
    `parts`, rows of part and ms; `kernels`, rows of kernel, part and ms. Empty where the
    device is no GPU.
  """
  where = parts(text)
  with tempfile.TemporaryDirectory() as directory:
    with jax.profiler.trace(directory):
      for _ in range(times):
        run()
    recorded = events(directory)
  by_part, by_kernel = {}, {}
  for kernel, instruction, ms in recorded:
    name = where.get(instruction, "unknown")
    by_part[name] = by_part.get(name, 0.0) + ms / times
    by_kernel[kernel, name] = by_kernel.get((kernel, name), 0.0) + ms / times
  def order(table):
    return sorted(table.items(), key=lambda item: -item[1])

  return {"parts": [[name, ms] for name, ms in order(by_part)],
          "kernels": [[kernel[:80], name, ms] for (kernel, name), ms in order(by_kernel)[:25]]}
