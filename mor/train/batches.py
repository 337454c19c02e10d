"""Which rows of a global batch a process gives, and giving them."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from mor import sharding


def local_rows(mesh: Mesh, num_rows: int) -> slice:
  """The rows of a global batch that this process's devices hold.

  Processes that share rows (they differ in `tensor` or `sequence` only) get the same.
  """
  held = NamedSharding(mesh, P(sharding.ROWS)).addressable_devices_indices_map((num_rows,)).values()
  bounds = [rows.indices(num_rows) for (rows,) in held]
  return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def put(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """A whole numpy batch as global arrays; each process gives its own rows."""
  rows = local_rows(mesh, len(batch["tokens_BT"]))
  return sharding.put_batch(mesh, {name: value[rows] for name, value in batch.items()})
