"""Every test runs on 8 virtual CPU devices, with shapes and types checked.

The environment is set before jax is first imported, so subprocesses of a test
inherit it. The import hook checks the annotations of `mor` at every call; rank
promotion is an error; compiled programs are kept between runs.
"""

import os
import pathlib
import random

_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
# Tiny programs cost more to compile than to run: no LLVM optimisation, the simpler emitters, one module a program.
_FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0",
          "--xla_llvm_disable_expensive_passes=true", "--xla_cpu_use_fusion_emitters=false",
          "--xla_cpu_parallel_codegen_split_count=1")

_MAPS = pathlib.Path("/proc/self/maps")

os.environ["JAX_PLATFORMS"] = "cpu"
for _flag in _FLAGS:
  if _flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "mor" / "jax"))
if "PYTEST_XDIST_WORKER" in os.environ:
  # A directory for each: jax writes an entry in place, and one that is read half written crashes the reader.
  os.environ["JAX_COMPILATION_CACHE_DIR"] += f"-{os.environ['PYTEST_XDIST_WORKER']}"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from absl import flags
import jax
import jaxtyping
import numpy as np
import pytest

from tests.helpers import typecheck  # the hook looks it up by name

typecheck.skip_unannotated()
jaxtyping.install_import_hook("mor", "tests.helpers.typecheck.check")
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """Marks the tests of slow.txt; a line that names no test is an error."""
  lines = (pathlib.Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines()
  wanted = {line for line in lines if line and not line.startswith("#")}
  for item in items:
    if " at 0x" in item.nodeid:
      raise pytest.UsageError(f"the id {item.nodeid} differs between processes, so -n 2 fails; give ids")
    if item.nodeid in wanted:
      item.add_marker(pytest.mark.slow)
  if not any("::" in arg for arg in config.args):  # whole files are collected
    files = {item.nodeid.partition("::")[0] for item in items}
    unknown = sorted(name for name in wanted - {item.nodeid for item in items} if name.partition("::")[0] in files)
    if unknown:
      raise pytest.UsageError(f"tests/slow.txt names {unknown[0]}, which does not exist; rename or delete the line")


@pytest.fixture(autouse=True)
def seeded():
  """Starts each test from the same state of the global generators."""
  random.seed(0)
  np.random.seed(0)


@pytest.fixture(autouse=True, scope="module")
def forgetful():
  """Drops a file's compiled programs."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def frugal():
  """Drops compiled programs before their memory maps are too many: XLA crashes at the 65,530 that Linux gives."""
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > 25_000:
    jax.clear_caches()
