"""Meshes, the mesh axis that splits each logical axis of a parameter, and collectives over batch rows.

Axes of a mesh:

  data      splits the rows of a batch
  fsdp      splits the rows further, and the parameters with their moments
  tensor    splits heads, feed-forward width and vocabulary
  sequence  splits the positions of a row, outside attention

The step is written for the rows of one device (`by_rows`): routing, gathering and
scattering never leave a device, and this file holds all collectives over `data` and
`fsdp`. The compiler adds the collectives over `tensor` and `sequence`.

A parameter that has no row in `parameters.py`, nor in its router, raises.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from mor import config as config_lib
from mor import parameters

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")  # axes that split the rows of a batch
Rows = Sequence[parameters.Parameter]

SPLIT_BY = {"vocab": "tensor", "heads": "tensor", "ffw": "tensor", "model": "fsdp"}  # logical axis -> axis of a mesh


def make_mesh(config: config_lib.MeshConfig, devices: list | None = None) -> Mesh:
  """Makes a mesh of `AXES` over the first devices.

  Raises:
    ValueError: the axes need more devices than there are, the size -1 has no integer
      value, or a process would have no device in the mesh.
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
  """Returns a key path of `jax.tree_util` as text, e.g. "stack/attention/q"."""
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
  if ndim == 0:
    return P()
  axes = [SPLIT_BY.get(axis) for axis in parameters.find(path, rows).axes]
  return P(*(None,) * (ndim - len(axes)), *axes) if any(axes) else P()


def tree_shardings(mesh: Mesh, tree: Any, rows: Rows = ()) -> Any:
  """Returns the `NamedSharding` of every leaf, by path; leaves need only a shape.

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
  """Returns the number of parts into which a mesh splits the rows of a batch."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Makes global arrays, split over `ROWS`, from the rows of this process."""
  rows = NamedSharding(mesh, P(ROWS))
  return {name: jax.make_array_from_process_local_data(rows, value) for name, value in batch.items()}


def local_rows(mesh: Mesh, num_rows: int) -> slice:
  """Returns the rows of a global batch that the devices of this process hold.

  Processes that differ in `tensor` or `sequence` only hold the same rows.
  """
  held = NamedSharding(mesh, P(ROWS)).addressable_devices_indices_map((num_rows,)).values()
  bounds = [rows.indices(num_rows) for (rows,) in held]
  return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def put_whole(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Makes global arrays from a whole batch, of which each process puts its own rows."""
  rows = local_rows(mesh, len(batch["tokens_BT"]))
  return put_batch(mesh, {name: value[rows] for name, value in batch.items()})


def put_votes(mesh: Mesh, vote: bool) -> jax.Array:
  """Makes an array with the vote of each process, once per device."""
  sharding = NamedSharding(mesh, P(mesh.axis_names))
  return jax.make_array_from_process_local_data(sharding, np.full(len(sharding.addressable_devices), vote))


def by_rows(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """Maps `function` over devices: it sees the rows of one device and its shards of parameters.

  The arrays stay whole over `tensor` and `sequence`, and the compiler splits them.
  """
  by_hand = set(ROWS) | {axis for axis in AXES if mesh.shape[axis] == 1}  # with all axes manual, kernels run unchanged
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=by_hand, check_vma=False)


def row_specs(tree: Any, rows: Rows = ()) -> Any:
  """Returns specs for `by_rows`: the axis of each parameter that `fsdp` splits."""
  def one(path, leaf):
    axes = [axis if axis in ROWS else None for axis in spec(path_name(path), leaf.ndim, rows)]
    return P(*axes)
  return jax.tree_util.tree_map_with_path(one, tree)


def _manual_axes(axes: tuple[str, ...] = ROWS) -> tuple[str, ...]:
  """Selects the axes that have several devices; none if this is traced outside `by_rows`.

  The partitioner of `tensor` refuses collectives over axes of one device.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(axis for axis in axes if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def sum_over_devices(tree: Any) -> Any:
  """Sums each leaf over the devices inside `by_rows`; outside, returns the leaves."""
  axes = _manual_axes()
  return jax.lax.psum(tree, axes) if axes else tree


def max_over_devices(count: jax.Array) -> jax.Array:
  """Returns the maximum over the devices inside `by_rows`, so that all take the same branch of a condition."""
  axes = _manual_axes()
  return jax.lax.pmax(jax.lax.stop_gradient(count), axes) if axes else count


def is_split_by_parts(*axes: str | None) -> bool:
  """Returns True if each part of a model has a part of one of the logical axes; see `sum_over_parts`."""
  return any(SPLIT_BY.get(axis) == "tensor" for axis in axes)


def sum_over_parts(x: jax.Array) -> jax.Array:
  """Sums over the parts of a model that is split by hand over `tensor`; elsewhere, returns the array."""
  return jax.lax.psum(x, axes) if (axes := _manual_axes(("tensor",))) else x


def max_over_parts(x: jax.Array) -> jax.Array:
  """Returns the maximum over the parts of a model; see `sum_over_parts`."""
  return jax.lax.pmax(x, axes) if (axes := _manual_axes(("tensor",))) else x


def join_parts(x: jax.Array, axis: int) -> jax.Array:
  """Joins what the parts of a model have of an axis; see `sum_over_parts`."""
  return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if (axes := _manual_axes(("tensor",))) else x


def first_of_part(size: int) -> jax.Array | int:
  """Returns the index, in the whole axis, of the first of the `size` entries of this part; see `sum_over_parts`."""
  return size * jax.lax.axis_index(axes) if (axes := _manual_axes(("tensor",))) else 0


def sum_gradients(grads: Any, rows: Rows = ()) -> Any:
  """Sums the gradients over the devices inside `by_rows`; each device keeps its shard.

  `gather_parameters` has already summed the gradients of parameters that `fsdp` splits.
  """
  def one(path, grad):
    axes = _manual_axes(("data",) if "fsdp" in spec(path_name(path), grad.ndim, rows) else ROWS)
    return jax.lax.psum(grad, axes) if axes else grad
  return jax.tree_util.tree_map_with_path(one, grads)


def first_row(num_rows: int) -> jax.Array | int:
  """Returns the index, in the whole batch, of the first row of this device."""
  axes = _manual_axes()
  return num_rows * jax.lax.axis_index(axes) if axes else 0


def gather_parameters(params: Any, dtype: str, group: str, rows: Rows = ()) -> Any:
  """Gathers the parameters that `fsdp` splits, inside `by_rows`; outside, returns them unchanged.

  They are sent in `dtype`. Their gradients are summed in the dtype of the parameters.

  Args:
    params: a group of parameters, or those of a layer.
    dtype: dtype of the computation.
    group: path of the group.
    rows: rows that the model's router declares.
  """
  if not _manual_axes(("fsdp",)):
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
  """Splits positions over the mesh axis `sequence`, if there is one and it divides their number."""
  size = jax.sharding.get_abstract_mesh().shape.get("sequence", 1)
  if size == 1 or x_BTD.shape[1] % size:
    return x_BTD
  return jax.lax.with_sharding_constraint(x_BTD, P(None, "sequence", None))
