"""The table of storages, and which one a device gets.

  paged    small pages, read in a loop that ends with the longest row: CPU
  packed   small pages, keys beside values, one attention kernel a layer: TPU and NVIDIA GPU (see `packed.py`)
  gather   small pages, whole rows gathered by XLA: what no kernel serves; time follows the context, not the rows
  dense    one page a row, as long as the context: the reference

A loop that ends with the data costs an accelerator a round trip to the host or many small operations a turn, and a CPU
has no use for a kernel of another device, so the choice is by platform.
"""

from typing import Any

from absl import logging
import jax.numpy as jnp

from mor.decode import packed
from mor.decode import storage as storage_lib
from mor.model import kernels

NAMES = ("paged", "packed", "gather", "dense")


def make(name: str | None, num_kv_heads: int, head_dim: int, kv_format: str, page_size: int, context: int) -> Any:
  """Returns a storage, for the platform that the program is lowered for.

  Args:
    name: one of `NAMES`, or None for what suits the platform.
    num_kv_heads: key heads.
    head_dim: size of a head.
    kv_format: "float32" or "bfloat16".
    page_size: entries in a page; a dense storage has pages of the context.
    context: positions of a sequence at most.

  Raises:
    ValueError: the kernel cannot serve such pages, and the storage was asked for by name.
  """
  shape = (num_kv_heads, head_dim, kv_format)
  if name == "dense":
    return storage_lib.Dense(context, *shape)
  if name == "gather":
    return storage_lib.Dense(page_size, *shape)
  if name == "paged" or (name is None and kernels.platform() == "cpu"):
    return storage_lib.Paged(page_size, *shape)
  storage = packed.PackedPages(page_size, *shape, kernel="gpu" if kernels.platform() == "gpu" else "tpu")
  reason = _explain_misfit(storage)
  if reason is None:
    return storage
  if name == "packed":
    raise ValueError(f"storage='packed': {reason}; or use storage='gather'")
  logging.warning("keys and values are gathered by XLA instead of read by a kernel, which is slower: %s", reason)
  return storage_lib.Dense(page_size, *shape)


def _explain_misfit(storage: packed.PackedPages) -> str | None:
  """Returns why the kernel of the platform cannot serve a storage, or None if it can."""
  if kernels.interprets():
    return None  # everything runs
  if kernels.platform() == "gpu" and "nvidia" not in kernels.device_kind().lower():
    return f"the kernel is for NVIDIA GPUs, and this is {kernels.device_kind()}"
  return storage.explain_misfit()
