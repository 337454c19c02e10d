"""Prepares the Python of a notebook: `prepare(root)` installs what `mor` needs there, and no more.

What is installed is compared with the metadata of `mor` itself. So on Colab, whose packages
are many but often older, only the missing and the old ones are installed, with the JAX of the
runtime's accelerator. A notebook executes this file from its clone before it can import `mor`.
"""

from collections.abc import Iterable
import importlib
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys

from packaging import requirements as requirements_lib  # pip and jax bring it; Colab has it


def find_extra() -> str:
  """Returns the extra of setup.py for the accelerator of this machine; "" is a CPU."""
  if any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio/0").exists():
    return "tpu"
  return "cuda12" if shutil.which("nvidia-smi") else ""


def find_missing(requires: Iterable[str] | None, extra: str) -> list[str]:
  """Returns the requirements that are not met here; all of `mor` itself if `requires` is None."""
  if requires is None:
    return ["mor"]
  missing = []
  for line in requires:
    wanted = requirements_lib.Requirement(line)
    if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
      try:
        version = importlib.metadata.version(wanted.name)
      except importlib.metadata.PackageNotFoundError:
        version = None
      if version is None or not wanted.specifier.contains(version, prereleases=True):
        missing.append(line.partition(";")[0].strip())
        continue
      for name in wanted.extras:  # jax is there, but perhaps not its part for the accelerator
        missing += find_missing(importlib.metadata.requires(wanted.name), name)
  return missing


def prepare(root: str) -> None:
  """Makes `mor` of the clone `root` importable, with everything it needs.

  Raises:
    SystemExit: a package that this kernel has already imported was replaced; restart the kernel.
    RuntimeError: pip failed; its last lines are the message.
  """
  if root not in sys.path:
    sys.path.insert(0, root)  # configs/ and benchmarks/ lie beside the package
  extra = find_extra()
  try:
    requires = importlib.metadata.requires("mor")
  except importlib.metadata.PackageNotFoundError:
    requires = None
  missing = find_missing(requires, extra)
  if not missing:
    return
  print(f"installing {', '.join(missing)}{f' for {extra}' if extra else ''} (a minute or two)", flush=True)
  before = _versions()
  target = f"{root}[{extra}]" if extra else root
  done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", target], capture_output=True, text=True, check=False)
  if done.returncode:
    raise RuntimeError("pip install failed: " + " ".join(done.stderr.strip().splitlines()[-3:]))
  importlib.invalidate_caches()
  changed = {name for name, version in _versions().items() if before.get(name, version) != version}
  old = sorted(changed & _imported())
  if old:
    raise SystemExit(f"{', '.join(old)} had been imported before the installation: restart the kernel (on Colab: "
                     "Runtime > Restart session), then run this cell again")


def _versions() -> dict[str, str]:
  return {_normal(d.metadata["Name"]): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}


def _imported() -> set[str]:
  """Returns the names of the distributions whose modules are imported."""
  owners = importlib.metadata.packages_distributions()
  return {_normal(owner) for module in list(sys.modules) if "." not in module for owner in owners.get(module, ())}


def _normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()
