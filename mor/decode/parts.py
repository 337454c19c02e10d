"""A model in parts, one on each of several devices: tensor-parallel decoding.

Each part has some of the heads with their keys and values, of the feed-forward width and of the vocabulary, as a
`Decoder` of a smaller config, so storages and attention kernels run unchanged. Norms, routers, page tables and
everything else of a slot are on all devices alike, and so is every decision. Products whose inputs are split
(attention's output, the feed-forward output) are summed over the devices, an embedding is summed, and logits are
joined: two sums a layer (`weights.project`), two more collectives a tick (`decoder.embed`, `decoder.head`).

Programs run under `shard_map`, not under the compiler's partitioner: that one does not split a Pallas kernel, and
replicates a loop over pages.

Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from mor import config as config_lib
from mor import parameters
from mor import sharding
from mor.decode import decoder as decoder_lib
from mor.decode import slots as slots_lib
from mor.decode import weights as weights_lib

_AXIS = "tensor"
_SIZES = {"N": "num_heads", "K": "num_kv_heads", "F": "d_ff", "V": "vocab_size"}  # by letter, of axes that may be split


def cut(model: config_lib.ModelConfig, num_parts: int) -> config_lib.ModelConfig:
  """Returns the config of a part: fewer heads and a narrower feed-forward layer. Its vocabulary stays whole.

  Raises:
    ValueError: a size of the model is not a multiple of the number of parts.
  """
  split = [letter for row in parameters.LAYER + parameters.TOP for letter, axis in zip(row.ins + row.outs, row.axes)
           if sharding.is_split_by_parts(axis)]
  sizes = {_SIZES[letter]: getattr(model, _SIZES[letter]) for letter in dict.fromkeys(split)}
  wrong = {name: size for name, size in sizes.items() if size % num_parts}
  if wrong:
    most = math.gcd(*sizes.values())
    fits = [num for num in range(1, most + 1) if most % num == 0]
    said = ", ".join(f"model.{name}={size}" for name, size in wrong.items())
    raise ValueError(f"tensor={num_parts} does not divide {said}; use {' or '.join(map(str, fits))}")
  smaller = {name: size // num_parts for name, size in sizes.items() if name != "vocab_size"}
  return dataclasses.replace(model, **smaller)


class Parts:
  """The parts of a model on their devices.

  Args:
    devices: one for each part.
    decoder: of a part.
    model: config of the whole model.
    weights: what `prepare` returns.

  Attributes:
    model: config of the whole model.
    weights: the same weights on the devices, each matrix in parts.
  """

  def __init__(self, devices: Sequence[jax.Device], decoder: decoder_lib.Decoder, model: config_lib.ModelConfig,
               weights: weights_lib.Weights):
    self.model, self._decoder = model, decoder
    self._mesh = Mesh(np.array(devices), (_AXIS,))
    self._weights_specs = list_specs(weights)
    leaves, self._weights_tree = jax.tree.flatten(weights)
    self._leaves = [jax.device_put(leaf, NamedSharding(self._mesh, spec))
                    for leaf, spec in zip(leaves, self._weights_specs)]
    self.weights = jax.tree.unflatten(self._weights_tree, self._leaves)
    self._slots_specs: list[P] = []
    self._programs: dict[Any, Callable] = {}

  def make(self, make: Callable[[weights_lib.Weights], slots_lib.Slots]) -> slots_lib.Slots:
    """Returns empty slots, each device with the keys and values of its heads."""
    slots_tree = []

    def make_part(leaves):
      slots = make(jax.tree.unflatten(self._weights_tree, leaves))
      slots_tree[:] = [jax.tree.structure(slots)]
      self._slots_specs = list_slots_specs(slots)
      return jax.tree.leaves(slots)

    jax.eval_shape(make_part, self._leaves)
    mapped = jax.shard_map(make_part, mesh=self._mesh, in_specs=(self._weights_specs,), out_specs=self._slots_specs,
                           check_vma=False)
    made = jax.jit(mapped)(self._leaves)
    return jax.tree.unflatten(slots_tree[0], made)

  def run(self, program: Callable, slots: slots_lib.Slots, *args: Any,
          **options: Any) -> tuple[slots_lib.Slots, Any]:
    """Runs a program of (decoder, weights, slots, …) on all devices; returns the slots, and what it tells.

    Args:
      program: one that is jitted with some options static; here those without arrays are.
      slots: given away.
      *args, **options: arrays that all devices get whole, and static options.
    """
    given = {name: value for name, value in options.items() if _has_arrays(value)}
    static = tuple(sorted((name, value) for name, value in options.items() if name not in given))
    leaves, slots_tree = jax.tree.flatten(slots)
    key = program, static, slots_tree
    if key not in self._programs:
      run_part = functools.partial(program, self._decoder, **dict(static))
      self._programs[key] = compile_program(self._mesh, run_part, (self._weights_tree, slots_tree),
                                            (self._weights_specs, self._slots_specs))
    leaves, told = self._programs[key](self._leaves, leaves, args, given)
    return jax.tree.unflatten(slots_tree, leaves), told


def compile_program(mesh: Mesh, run_part: Callable, trees: tuple[Any, Any],
                    specs: tuple[list[P], list[P]]) -> jax.stages.Wrapped:
  """Returns a jitted program of (leaves of weights, leaves of slots, other arguments, other keywords).

  Leaves, as their specs are lists too: a tree of specs would be `Weights` without arrays.

  Args:
    mesh: the devices.
    run_part: program of (weights, slots, …), run on each device with its part.
    trees: structures of weights and slots.
    specs: specs of the leaves of weights and of slots.
  """
  def run(weights_leaves, slots_leaves, args, given):
    weights, slots = map(jax.tree.unflatten, trees, (weights_leaves, slots_leaves))
    slots, told = run_part(weights, slots, *args, **given)
    return jax.tree.leaves(slots), told

  mapped = jax.shard_map(run, mesh=mesh, in_specs=(*specs, P(), P()), out_specs=(specs[1], P()), check_vma=False)
  return jax.jit(mapped, donate_argnums=1)


def prepare(model: config_lib.ModelConfig, variables: Mapping[str, Any], weight_format: str, first: int,
            num_parts: int) -> weights_lib.Weights:
  """Lays out trained variables for parts, in the memory of the host: no device need hold all of them.

  Args:
    model, variables, weight_format, first: as `weights.prepare` has them.
    num_parts: number of parts.

  Raises:
    ValueError: jax has no CPU device.
  """
  try:
    host = jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    raise ValueError(f"tensor={num_parts} lays weights out on the CPU, which JAX_PLATFORMS leaves out; add it, as in "
                     "JAX_PLATFORMS=tpu,cpu or cuda,cpu") from error
  with jax.default_device(host):
    return arrange(model, weights_lib.prepare(model, jax.device_get(variables), weight_format, first), num_parts)


def _has_arrays(value: Any) -> bool:
  return any(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(value))


def _splits_outputs(merged: str) -> bool:
  """Returns True if each part of a model has some of the outputs of a merged matrix."""
  row = weights_lib.MERGED[merged][0]
  return sharding.is_split_by_parts(*row.axes[len(row.ins):])


def arrange(model: config_lib.ModelConfig, weights: weights_lib.Weights, num_parts: int) -> weights_lib.Weights:
  """Returns weights of which each part of a model has neighbouring rows: of q, k and v, some heads of each."""
  def gather(merged: str, a: jax.Array) -> jax.Array:
    if not _splits_outputs(merged):
      return a
    widths = [row.matrix(model)[1] for row in weights_lib.MERGED[merged]]
    pieces = jnp.split(a, np.cumsum(widths)[:-1].tolist())
    return jnp.concatenate([x.reshape(num_parts, -1, *x.shape[1:]) for x in pieces], axis=1).reshape(a.shape)

  def arrange_layer(layer: weights_lib.Layer) -> weights_lib.Layer:
    return layer.replace(matrices={
        merged: jax.tree.map(functools.partial(gather, merged), matrix) for merged, matrix in layer.matrices.items()})

  def arrange_delta(merged: str, delta: weights_lib.Delta) -> weights_lib.Delta:
    if not _splits_outputs(merged):
      return delta
    return delta.replace(outs=tuple(width // num_parts for width in delta.outs))

  groups = {group: tuple(map(arrange_layer, getattr(weights, group))) for group in parameters.GROUPS}
  deltas = tuple({merged: arrange_delta(merged, delta) for merged, delta in layer.items()} for layer in weights.deltas)
  return weights.replace(**groups, deltas=deltas)


def list_specs(weights: weights_lib.Weights) -> list[P]:
  """Returns, for each array of arranged weights, which axis the parts of a model split."""
  def find(path: tuple) -> P:
    group, *names = sharding.path_name(path).split("/")
    if group in ("head", "lookup_VD"):
      return P(_AXIS)
    merged = next((name for name in names if name in weights_lib.MERGED), None)
    if merged is None or group not in (*parameters.GROUPS, "deltas"):
      return P()
    outs, name = _splits_outputs(merged), names[-1]
    if group == "deltas" and outs == (names[2] == "a"):  # the factor at the whole side
      return P()
    if outs:
      return P(_AXIS)
    return P(None, _AXIS) if name == "w_OI" else P()  # the scales belong to the outputs

  return [find(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]


def list_slots_specs(slots: slots_lib.Slots) -> list[P]:
  """Returns, for each array of slots, whether each part of a model has its own: keys and values of its heads."""
  return [P(_AXIS) if sharding.path_name(path).startswith(("cache/edge/", "cache/stack/")) else P()
          for path, _ in jax.tree_util.tree_leaves_with_path(slots)]
