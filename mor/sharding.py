"""Meshes, which mesh axis splits which logical axis of a parameter, and batch rows by hand.

Axes of a mesh:

  data      splits the rows of a batch
  fsdp      splits the rows further, and the parameters with their moments
  tensor    splits heads, feed-forward width and vocabulary
  sequence  splits the positions of a row, outside attention

The step is written for one device's rows (`by_rows`): routing, gathering and
scattering never leave a device, and the collectives over `data` and `fsdp` are
those that stand here. The compiler adds those of `tensor` and `sequence`.

A parameter that has no row in `parameters.py`, nor in its router, raises.
"""

from collections.abc import Callable, Sequence
import functools
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from mor import config as config_lib
from mor import parameters

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")  # what splits the rows of a batch
Rows = Sequence[parameters.Parameter]

SPLIT_BY = {"vocab": "tensor", "heads": "tensor", "ffw": "tensor", "model": "fsdp"}  # logical axis -> axis of a mesh
_ROUTER = re.compile(r"(^|/)((router|aux_router)/(hidden|out)|bias_R)$")


def make_mesh(config: config_lib.MeshConfig, devices: list | None = None) -> Mesh:
  """A mesh of `AXES` over the first devices.

  Raises:
    ValueError: the axes ask for more devices than there are, -1 does not divide, or a
      process would have no part.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {name: getattr(config, name) for name in AXES}
  known = math.prod(n for n in sizes.values() if n != -1)
  if known > len(devices) or (-1 in sizes.values() and len(devices) % known):
    raise ValueError(f"mesh {sizes} does not fit {len(devices)} device(s); use axis sizes whose product divides it")
  sizes = {name: len(devices) // known if n == -1 else n for name, n in sizes.items()}
  count = math.prod(sizes.values())
  idle = {device.process_index for device in devices} - {device.process_index for device in devices[:count]}
  if idle:
    raise ValueError(f"mesh {sizes} leaves process {min(idle)} without a device; use axis sizes whose product is "
                     f"{len(devices)}, or fewer processes")
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:count])


def path_name(path: tuple) -> str:
  """"stack/attention/q" from a `jax.tree_util` key path."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec(path: str, ndim: int, rows: Rows = ()) -> P:
  """Returns the `PartitionSpec` of the parameter (or of its moment in the optimizer) at `path`.

  The trailing axes are split as its row says (`parameters.py`); stacked axes and scalars are whole.

  Args:
    path: see `path_name`.
    ndim: number of axes.
    rows: rows that the model's router declares.

  Raises:
    ValueError: no row is at the path.
  """
  if ndim == 0 or _ROUTER.search(path):
    return P()
  axes = [SPLIT_BY.get(axis) for axis in parameters.find(path, rows).axes]
  return P(*(None,) * (ndim - len(axes)), *axes) if any(axes) else P()


def tree_shardings(mesh: Mesh, tree: Any, rows: Rows = ()) -> Any:
  """`NamedSharding` of every leaf, by path; leaves need only a shape.

  Raises:
    ValueError: a split axis is not a multiple of its mesh axis.
  """
  def one(path, leaf):
    parts = spec(path_name(path), leaf.ndim, rows)
    for size, axis in zip(leaf.shape, parts):
      if axis and size % mesh.shape[axis]:
        raise ValueError(f"{path_name(path)} of shape {leaf.shape} does not split {mesh.shape[axis]} ways over "
                         f"mesh.{axis}; use a mesh.{axis} that divides {size}")
    return NamedSharding(mesh, parts)
  return jax.tree_util.tree_map_with_path(one, tree)


def num_row_shards(mesh: Mesh) -> int:
  """Into how many parts a mesh splits the rows of a batch."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's rows as global arrays split over `ROWS`."""
  rows = NamedSharding(mesh, P(ROWS))
  return {name: jax.make_array_from_process_local_data(rows, value) for name, value in batch.items()}


def local_rows(mesh: Mesh, num_rows: int) -> slice:
  """The rows of a global batch that this process's devices hold.

  Processes that share rows (they differ in `tensor` or `sequence` only) get the same.
  """
  held = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((num_rows,)).values()
  bounds = [rows.indices(num_rows) for (rows,) in held]
  return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def put_whole(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """A whole numpy batch as global arrays; each process gives its own rows."""
  rows = local_rows(mesh, len(batch["tokens_BT"]))
  return put_batch(mesh, {name: value[rows] for name, value in batch.items()})


def put_votes(mesh: Mesh, vote: bool) -> jax.Array:
  """A vote of each process, on all its devices."""
  sharding = NamedSharding(mesh, P(mesh.axis_names))
  return jax.make_array_from_process_local_data(sharding, np.full(len(sharding.addressable_devices), vote))


def by_rows(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """`function` of what a device has: its rows of `P(ROWS)`, its part of a parameter, all of the rest.

  Over `tensor` and `sequence` arrays stay whole, and the compiler splits them.
  """
  by_hand = set(ROWS) | {axis for axis in AXES if mesh.shape[axis] == 1}  # with all of them, kernels run as they are
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=by_hand, check_vma=False)


def row_specs(tree: Any, rows: Rows = ()) -> Any:
  """For `by_rows`: which axis of each parameter is split over `fsdp`."""
  def one(path, leaf):
    axes = [axis if axis in ROWS else None for axis in spec(path_name(path), leaf.ndim, rows)]
    return P(*axes)
  return jax.tree_util.tree_map_with_path(one, tree)


def _by_hand(axes: tuple[str, ...] = ROWS) -> tuple[str, ...]:
  """Those of `axes` that have several devices, where this is traced inside `by_rows`; else none.

  The partitioner of `tensor` refuses collectives over axes of one device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(axis for axis in axes if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def total(tree: Any) -> Any:
  """Inside `by_rows`, sums over the devices of each leaf; else the leaves."""
  axes = _by_hand()
  return jax.lax.psum(tree, axes) if axes else tree


def most(count: jax.Array) -> jax.Array:
  """Inside `by_rows`, the largest over the devices, which so take the same branch of a condition."""
  axes = _by_hand()
  return jax.lax.pmax(jax.lax.stop_gradient(count), axes) if axes else count


def total_gradients(grads: Any, rows: Rows = ()) -> Any:
  """Inside `by_rows`, each device's part of the gradients of the sum of all losses.

  `gathered` has already summed over `fsdp` what it splits.
  """
  def one(path, grad):
    axes = _by_hand(("data",) if "fsdp" in spec(path_name(path), grad.ndim, rows) else ROWS)
    return jax.lax.psum(grad, axes) if axes else grad
  return jax.tree_util.tree_map_with_path(one, grads)


def first_row(num_rows: int) -> jax.Array | int:
  """The number, in the whole batch, of the first of a device's rows."""
  axes = _by_hand()
  return num_rows * jax.lax.axis_index(axes) if axes else 0


def gathered(params: Any, dtype: str, group: str, rows: Rows = ()) -> Any:
  """Inside `by_rows`, the whole of parameters that are split over `fsdp`.

  They travel in `dtype`, that of the computation, and their gradients are summed in
  their own. Elsewhere: the parameters.

  Args:
    params: a group of them, or a layer's.
    dtype: of the computation.
    group: its path.
    rows: rows that the model's router declares.
  """
  if not _by_hand(("fsdp",)):
    return params
  def one(path, leaf):
    parts = tuple(spec("/".join(filter(None, (group, path_name(path)))), leaf.ndim, rows))
    return _gather(leaf, parts.index("fsdp"), dtype) if "fsdp" in parts else leaf
  return jax.tree_util.tree_map_with_path(one, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, axis: int, dtype: str) -> jax.Array:
  return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True).astype(part.dtype)


def _gather_forward(part, axis, dtype):
  return _gather(part, axis, dtype), None


def _gather_backward(axis, dtype, residuals, grad):
  del dtype, residuals
  return (jax.lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def along_sequence(x_BTD: jax.Array) -> jax.Array:
  """Splits positions over `sequence`, where there is such an axis and they divide."""
  size = jax.sharding.get_abstract_mesh().shape.get("sequence", 1)
  if size == 1 or x_BTD.shape[1] % size:
    return x_BTD
  return jax.lax.with_sharding_constraint(x_BTD, P(None, "sequence", None))
