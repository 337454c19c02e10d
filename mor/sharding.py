"""Meshes, and the one table from parameter path to `PartitionSpec`.

Axes: `data` splits the rows of a batch, `model` the heads, the feed-forward
width and the vocabulary. A parameter that no row of the table matches raises.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from mor import config as config_lib

RULES = (  # path pattern -> spec of the trailing axes; a stacked layer axis is not split
    (r"(^|/)(embedding|head)$", ("model", None)),
    (r"(^|/)lora/.*/[ab]$", ()),
    (r"/attention/[qkv]$", (None, "model", None)),
    (r"/attention/o$", ("model", None, None)),
    (r"/ffw/(gate|up)$", (None, "model")),
    (r"/ffw/down$", ("model", None)),
    (r"(_norm|(^|/)(router|aux_router)/(hidden|out)|bias_R|step|count)$", ()),
)


def make_mesh(config: config_lib.MeshConfig, devices: list | None = None) -> Mesh:
  """A `data` x `model` mesh over the first devices.

  Raises:
    ValueError: the axes ask for more devices than there are, -1 does not divide, or a
      process would have no part.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {"data": config.data, "model": config.model}
  known = math.prod(n for n in sizes.values() if n != -1)
  if known > len(devices) or (-1 in sizes.values() and len(devices) % known):
    raise ValueError(f"mesh {sizes} does not fit {len(devices)} device(s); use axis sizes whose product divides it")
  sizes = {name: len(devices) // known if n == -1 else n for name, n in sizes.items()}
  count = math.prod(sizes.values())
  idle = {device.process_index for device in devices} - {device.process_index for device in devices[:count]}
  if idle:
    raise ValueError(f"mesh {sizes} leaves process {min(idle)} without a device; use axis sizes whose product is "
                     f"{len(devices)}, or fewer processes")
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2, devices=devices[:count])


def path_name(path: tuple) -> str:
  """"stack/attention/q" from a `jax.tree_util` key path."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec(path: str, ndim: int) -> P:
  """The `PartitionSpec` of the parameter (or optimizer moment) at `path`.

  Raises:
    ValueError: no rule matches.
  """
  for pattern, axes in RULES:
    if re.search(pattern, path):
      return P(*(None,) * (ndim - len(axes)), *axes) if axes else P()
  raise ValueError(f"no sharding rule for {path!r} of rank {ndim}; add one to RULES in mor/sharding.py")


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
  """`NamedSharding` of every leaf, by path; leaves need only a shape.

  Raises:
    ValueError: a split axis is not a multiple of its mesh axis.
  """
  def one(path, leaf):
    parts = spec(path_name(path), leaf.ndim)
    for size, axis in zip(leaf.shape, parts):
      if axis and size % mesh.shape[axis]:
        raise ValueError(f"{path_name(path)} of shape {leaf.shape} does not split {mesh.shape[axis]} ways over "
                         f"mesh.{axis}; use a mesh.{axis} that divides {size}")
    return NamedSharding(mesh, parts)
  return jax.tree_util.tree_map_with_path(one, tree)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's rows as global arrays split over `data`."""
  rows = NamedSharding(mesh, P("data"))
  return {name: jax.make_array_from_process_local_data(rows, value) for name, value in batch.items()}


def put_votes(mesh: Mesh, vote: bool) -> jax.Array:
  """A vote of each process, on all its devices."""
  sharding = NamedSharding(mesh, P(mesh.axis_names))
  return jax.make_array_from_process_local_data(sharding, np.full(len(sharding.addressable_devices), vote))
