"""What an engine may be made of: arguments of the right kind, and no more memory than there is."""

from collections.abc import Collection, Sequence
import operator
import os
from typing import Any

import jax
import numpy as np

from mor import fields
from mor.decode import decoder as decoder_lib
from mor.decode import storage as storage_lib
from mor.serve import scheduler

_MOST = 2**31 - 1  # a count on the device


def is_index(value: Any) -> bool:
  """Returns True for an integer of Python, NumPy or JAX, which True and False are not here."""
  if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == bool:
    return False
  try:
    operator.index(value)
  except TypeError:
    return False
  return True


def check_counts(**counts: Any) -> list[int | None]:
  """Returns counts as Python's integers, in their order; None stays.

  Raises:
    ValueError: a value is no count.
  """
  for name, value in counts.items():
    if value is not None and not (is_index(value) and operator.index(value) >= 1):
      raise ValueError(f"{name}={fields.show(value)}; use a count >= 1")
    if value is not None and operator.index(value) > _MOST:
      raise ValueError(f"{name} is a number of {operator.index(value).bit_length()} bits; use a count <= {_MOST}")
  return [None if value is None else operator.index(value) for value in counts.values()]


def check_devices(devices: Any, tensor: Any) -> list[list[jax.Device]] | None:
  """Returns the devices of each replica of an engine; None is the default device.

  Args:
    devices: None for as few as a replica has, a number of devices, or a sequence of them.
    tensor: devices of a replica.

  Raises:
    ValueError: the program has several processes, the devices are not here, or they make no whole replicas.
  """
  if jax.process_count() > 1:
    raise ValueError(f"an engine runs in one process, and this program has {jax.process_count()} (jax.distributed); start "
                     "a program without it on each host, with an engine for the devices of that host")
  tensor, = check_counts(tensor=tensor)
  if devices is None and tensor == 1:
    return None
  here = jax.local_devices()
  if devices is None or is_index(devices):
    num, = check_counts(devices=tensor if devices is None else devices)
    if num > len(here):
      asked = f"tensor={tensor}" if devices is None else f"devices={num}"
      raise ValueError(f"{asked}, and there are {len(here)} devices ({here[0].platform}); use at most {len(here)}")
    devices = here[:num]
  if not isinstance(devices, Sequence) or not devices or not all(isinstance(device, jax.Device) for device in devices):
    raise ValueError(f"devices={fields.show(devices)}; give a count, a list of jax.local_devices(), or None for the "
                     "default device")
  if len(set(devices)) < len(devices) or not set(devices) <= set(here):
    raise ValueError(f"devices={fields.show(devices)}; give each of jax.local_devices() once")
  if len(devices) % tensor:
    raise ValueError(f"{len(devices)} devices are no whole replicas of tensor={tensor} devices each; use a multiple of "
                     f"{tensor} devices")
  return [list(devices[i:i + tensor]) for i in range(0, len(devices), tensor)]


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
  """Refuses a value that is none of the choices.

  Raises:
    ValueError: names the choices.
  """
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f"{name}={fields.show(value)}; use one of {', '.join(choices)}")


def check_model(model: Any, router: Any) -> None:
  """Refuses what is no model, or no router.

  Raises:
    ValueError: says what to give.
  """
  if not all(hasattr(model, name) for name in ("config", "variables", "tokenizer", "context")):
    raise ValueError(f"model={fields.show(model)}; give what mor.load(workdir) returns")
  if router is not None and not all(hasattr(router, name) for name in ("enter", "decide", "follow")):
    raise ValueError(f"router={fields.show(router)}; give a router of the model's config, or None for the model's own")


def check_memory(decoder: decoder_lib.Decoder, num_slots: int, pool: scheduler.Pool, pages_per_row: int, ticks: int,
                 devices: Sequence[jax.Device]) -> None:
  """Refuses slots and pools that are larger than the free memory of any of the devices, each of which has its own.

  Raises:
    ValueError: says how much they need.
  """
  needed = count_bytes(decoder, num_slots, pool, pages_per_row, ticks)
  if devices[0].platform == "cpu":  # they share the memory of the machine
    needed *= len(devices)
  free = min((free for free in map(_free_bytes, devices) if free is not None), default=None)
  if free is not None and needed > free:
    raise ValueError(f"the engine needs {needed / 2**30:.1f} GiB for keys, values and slots, and {free / 2**30:.1f} GiB are "
                     f"free; use a smaller context ({pages_per_row * pool.page_size} positions), fewer slots "
                     f"({num_slots}), fewer pages ({pool.num_pages} + {pool.num_edge_pages} of {pool.page_size} tokens), or "
                     f"fewer ticks ({ticks})")


def count_bytes(decoder: decoder_lib.Decoder, num_slots: int, pool: scheduler.Pool, pages_per_row: int,
                ticks: int) -> int:
  """Returns the bytes of pools, page tables and what a dispatch tells; what grows with no argument is left out."""
  tables, model = decoder.tables, decoder.model
  page_bytes = storage_lib.count_page_bytes(tables.storage)
  pools = page_bytes * (pool.num_pages * tables.schedule.depth + pool.num_edge_pages * tables.num_edges)
  row = 4 * pages_per_row * (1 + tables.num_rows)
  if tables.overlays:
    row += tables.num_rows * pages_per_row * pool.page_size
  states = 2 * 4 * model.d_model * pool.entries
  told = 16 * ticks * (1 + pool.entries)
  return pools + 4 * (pool.num_pages + pool.num_edge_pages) + num_slots * (row + model.vocab_size + states + told)


def _free_bytes(device: jax.Device) -> int | None:
  """Returns the memory that a device has left, and of a CPU all that the machine has; None if it is unknown."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  if device.platform != "cpu" or "SC_PHYS_PAGES" not in os.sysconf_names:
    return None
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
