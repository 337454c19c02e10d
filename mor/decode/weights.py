"""Parameters laid out for decoding.

Training stacks the layers and keeps every projection apart; a decoded token reads
each weight once, so here every layer has its own arrays (a scan over stacked
layers costs 1.2-4x), q, k, v are one matrix and gate, up another, and matrices are
`[out, in]`, the layout in which XLA:CPU multiplies fastest.

Formats:
  float32    exact
  bfloat16   matrices in bfloat16, products summed in float32, hidden states
             float32: halves the bytes a token reads
  int8       matrices in int8 with a scale for each output, inputs of a product
             rounded to int8 with a scale for each token, sums exact: a quarter.
             The embedding of a token stays bfloat16, routers and norms float32.

XLA:CPU gathers rows of bfloat16 from a table that it has widened to float32, so there
the embedding is a table of its own, of bits. An accelerator reads the rows of the output
matrix where they are the embedding, and stores them once. A TPU would store a matrix by
columns if its inputs do not fill whole lanes, and copy it in each dispatch to read rows,
so there the output matrix has zeros beyond the model's width.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import parameters
from mor import sharding
from mor.decode import control
from mor.model import block
from mor.model import kernels
from mor.model import schedule as schedule_lib
from mor.model import transformer
from mor.model.routers import table as router_table

FORMATS = ("float32", "bfloat16", "int8")
MERGED = {name: tuple(row for row in parameters.PROJECTIONS if row.merged == name)  # matrix -> the rows it is made of
          for name in dict.fromkeys(row.merged for row in parameters.PROJECTIONS)}
_SPLIT_INPUTS = {name for name, rows in MERGED.items()  # matrices of which a part of a model has some inputs
                 if sharding.is_split_by_parts(*rows[0].axes[:len(rows[0].ins)])}
_LEAST_ROWS = {"bfloat16": 4, "int8": 16}  # XLA:CPU multiplies fewer rows more slowly (5x for one)
_LANES = 128  # numbers of a row that a TPU stores together


@struct.dataclass
class Matrix:
  """A projection `[out, in]`; `scale_O` belongs to int8 and is None elsewhere."""

  w_OI: jax.Array
  scale_O: jax.Array | None


@struct.dataclass
class Layer:
  """One decoder layer.

  Attributes:
    norms: scales in the tree of the layer's parameters, which has nothing else here.
    matrices: projections by the name under which their rows are merged, e.g. "qkv".
  """

  norms: Mapping[str, Any]
  matrices: Mapping[str, Matrix]


@struct.dataclass
class Delta:
  """All steps' low-rank deltas of one merged projection; see `model/lora.py`.

  Tokens at different steps share one product with `a`, of which each keeps its own
  step's part: every delta is read once, however many tokens are at a step.

  Attributes:
    a: `[R * A, in]`, A the ranks of all parts: step by step, within it part by part.
    b: `[out, R * A_part]` of each part; None for a part without a delta.
    outs: width of each part.
    num_steps: R.
  """

  a: Matrix
  b: tuple[Matrix | None, ...]
  outs: tuple[int, ...] = struct.field(pytree_node=False)
  num_steps: int = struct.field(pytree_node=False)


@struct.dataclass
class Weights:
  """A model ready to decode.

  Attributes:
    head: the output matrix; on a TPU perhaps with more inputs than the model's width.
    lookup_VD: the embedding for single rows, on a CPU bfloat16 as its bits in uint16;
      None if `head` has these rows. See `table_VD`.
    draft_head: its first rows, those that exits read; None is all.
    prelude, stack, coda: layers.
    deltas: of each layer of a step, by the name of the matrix in `Layer`.
    final_norm_D: before the head.
    router: the routers' own parameters, float32.
    balance: state of the router that no gradient reaches, e.g. a bias.
  """

  head: Matrix
  lookup_VD: jax.Array | None
  draft_head: Matrix | None
  prelude: tuple[Layer, ...]
  stack: tuple[Layer, ...]
  coda: tuple[Layer, ...]
  deltas: tuple[Mapping[str, Delta], ...]
  final_norm_D: jax.Array
  router: Mapping[str, Any]
  balance: Mapping[str, jax.Array]

  @property
  def table_VD(self) -> jax.Array:
    """The embedding for single rows, to be read by `storage.decode`."""
    return self.head.w_OI if self.lookup_VD is None else self.lookup_VD

  def devices(self) -> set[jax.Device]:
    """Returns the devices that hold the weights."""
    return self.head.w_OI.devices()


def prepare(model: config_lib.ModelConfig, variables: Mapping[str, Any], weight_format: str, first: int = 0) -> Weights:
  """Lays out trained variables for decoding.

  Args:
    model: the variables' config.
    variables: {"params": …} and, where the model has one, {"balance": …}.
    weight_format: one of FORMATS.
    first: rows of the output matrix that exits read; 0 is all.

  Raises:
    ValueError: the format is unknown.
  """
  if weight_format not in FORMATS:
    raise ValueError(f"weight_format={weight_format!r}; use one of {', '.join(FORMATS)}")
  params, balance = variables["params"], variables.get("balance") or {}
  rows = router_table.make(model).parameters
  embedding_VD = jnp.asarray(params["embedding"], jnp.float32)
  head_VD = jnp.asarray(transformer.head(params), jnp.float32)
  apart = control.adapts() or "head" in params or weight_format == "int8"
  spare = -head_VD.shape[1] % _LANES if kernels.platform() == "tpu" else 0
  return Weights(
      head=_matrix(jnp.pad(head_VD, ((0, 0), (0, spare))), weight_format),
      lookup_VD=_lookup(embedding_VD, weight_format) if apart else None,
      draft_head=_matrix(head_VD[:first], weight_format) if first else None,
      **{group: _layers(model, params.get(group), weight_format) for group in ("prelude", "stack", "coda")},
      deltas=_deltas(model, params.get("lora"), weight_format),
      final_norm_D=jnp.asarray(params["final_norm"], jnp.float32),
      router={name: params[name] for name in dict.fromkeys(row.group for row in rows if row.collection == "params")},
      balance={row.path: balance[row.path] for row in rows if row.path in balance})


def project(x_MI: jax.Array, matrix: Matrix, split_inputs: bool = False) -> jax.Array:
  """Returns x w^T in float32; x is rounded to the format of the matrix.

  Args:
    x_MI: inputs.
    matrix: one of `Weights`.
    split_inputs: True if each part of a model has some of the inputs, which are summed over all parts; static.
  """
  num, dtype = x_MI.shape[0], matrix.w_OI.dtype
  least = _LEAST_ROWS.get(dtype.name, 1) if control.adapts() else 1
  x_MI = jnp.pad(x_MI, ((0, max(0, least - num)), (0, matrix.w_OI.shape[1] - x_MI.shape[1])))
  contract = (((1,), (1,)), ((), ()))
  add = sharding.sum_over_parts if split_inputs else _keep
  if matrix.scale_O is None:
    return add(jax.lax.dot_general(x_MI.astype(dtype), matrix.w_OI, contract, preferred_element_type=jnp.float32)[:num])
  x_MI, scale_M1 = _round(x_MI, sharding.max_over_parts if split_inputs else _keep)
  y_MO = add(jax.lax.dot_general(x_MI, matrix.w_OI, contract, preferred_element_type=jnp.int32)[:num])
  return y_MO.astype(jnp.float32) * scale_M1[:num] * matrix.scale_O[None, :]


def projector(model: config_lib.ModelConfig, layer: Layer, deltas: Mapping[str, Delta] | None = None,
              step: jax.Array | int = 0) -> block.Project:
  """Returns the projection of `block.enter` and `block.leave` by a layer's merged matrices.

  Args:
    model: config of the layer.
    layer: norms and matrices.
    deltas: low-rank deltas of the layer in every step, by matrix.
    step: step whose deltas count: one static step, or the step `[M]` of each token.
  """
  def project_parts(x_1MI, *names):
    (merged,) = {row.merged for row in parameters.PROJECTIONS if row.name in names}
    x_MI = x_1MI.reshape(x_1MI.shape[1], -1)
    y_MO = project(x_MI, layer.matrices[merged], merged in _SPLIT_INPUTS)
    if deltas and merged in deltas:
      delta_MO = project_delta(x_MI, deltas[merged], step)
      y_MO = y_MO + (sharding.sum_over_parts(delta_MO) if merged in _SPLIT_INPUTS else delta_MO)
    found, start = {}, 0
    for row in MERGED[merged]:
      width = row.matrix(model)[1]
      found[row.name] = y_MO[:, start:start + width].reshape(1, -1, *row.shape(model)[1])
      start += width
    return tuple(found[name] for name in names)

  return project_parts


def project_delta(x_MI: jax.Array, delta: Delta, step: jax.Array | int) -> jax.Array:
  """Returns x a^T b^T, with the deltas of `step`: one static step, or the step `[M]` of each token."""
  rank = delta.a.w_OI.shape[0] // delta.num_steps
  if isinstance(step, int):
    a = jax.tree.map(lambda w: w[step * rank:(step + 1) * rank], delta.a)
    low_MRA = project(x_MI, a)[:, None]
  else:
    mine_MR1 = (step[:, None] == jnp.arange(delta.num_steps)[None, :])[:, :, None]
    low_MRA = jnp.where(mine_MR1, project(x_MI, delta.a).reshape(-1, delta.num_steps, rank), 0.0)
  parts, start = [], 0
  for b, width in zip(delta.b, delta.outs):
    if b is None:
      parts.append(jnp.zeros((x_MI.shape[0], width)))
      continue
    size = b.w_OI.shape[1] // delta.num_steps
    low_MA = low_MRA[:, :, start:start + size].reshape(x_MI.shape[0], -1)
    if isinstance(step, int):
      b = b.replace(w_OI=b.w_OI[:, step * size:(step + 1) * size])
    parts.append(project(low_MA, b))
    start += size
  return jnp.concatenate(parts, axis=1)


def _keep(x: jax.Array) -> jax.Array:
  return x


def _round(x_MI: jax.Array, widen: Callable[[jax.Array], jax.Array] = _keep) -> tuple[jax.Array, jax.Array]:
  """Returns the rows in int8, and the scale of each; `widen` makes the largest number of a row's part that of the row."""
  scale_M1 = jnp.maximum(widen(jnp.max(jnp.abs(x_MI), axis=1, keepdims=True)), 1e-30) / 127.0
  return jnp.round(x_MI / scale_M1).astype(jnp.int8), scale_M1


def _lookup(embedding_VD: jax.Array, weight_format: str) -> jax.Array:
  """Returns the embedding as it is read row by row; int8 weights have it in bfloat16."""
  if weight_format == "float32":
    return embedding_VD
  rounded_VD = embedding_VD.astype(jnp.bfloat16)
  return jax.lax.bitcast_convert_type(rounded_VD, jnp.uint16) if control.adapts() else rounded_VD


def _matrix(w_OI: jax.Array, weight_format: str) -> Matrix:
  if weight_format == "int8":
    w_OI, scale_O1 = _round(w_OI)
    return Matrix(w_OI, scale_O1[:, 0])
  return Matrix(w_OI.astype(weight_format), None)


def _deltas(model: config_lib.ModelConfig, lora: Mapping[str, Any] | None,
            weight_format: str) -> tuple[Mapping[str, Delta], ...]:
  """Returns the deltas of each layer of a step; int8 weights have bfloat16 deltas."""
  depth = schedule_lib.make(model).depth
  if lora is None:
    return ({},) * depth
  low_format = "bfloat16" if weight_format == "int8" else weight_format

  def matrix(w_OI: jax.Array) -> Matrix:
    return _matrix(jnp.asarray(w_OI, jnp.float32), low_format)

  def merged_b(b_RAO: jax.Array) -> Matrix:
    return matrix(jnp.reshape(b_RAO, (-1, b_RAO.shape[2])).T)

  def one(rows: tuple[parameters.Parameter, ...], i: int) -> Delta:
    pairs = [parameters.get(lora, row.path) if row.name in model.lora.ranks else None for row in rows]
    a_RIA = jnp.concatenate([jnp.asarray(pair["a"])[:, i] for pair in pairs if pair], axis=2)
    a_RAI = a_RIA.transpose(0, 2, 1)
    return Delta(
        a=matrix(a_RAI.reshape(-1, a_RAI.shape[2])),
        b=tuple(merged_b(jnp.asarray(pair["b"])[:, i]) if pair else None for pair in pairs),
        outs=tuple(row.matrix(model)[1] for row in rows), num_steps=model.num_recursions)

  return tuple({merged: one(rows, i) for merged, rows in MERGED.items()
                if any(row.name in model.lora.ranks for row in rows)} for i in range(depth))


def _layers(model: config_lib.ModelConfig, group: Mapping[str, Any] | None, weight_format: str) -> tuple[Layer, ...]:
  """Returns the layers of a group, each with arrays of its own."""
  if group is None:
    return ()

  def one(i: int) -> Layer:
    norms: dict[str, Any] = {}
    for row in parameters.layer(model):
      if not row.ins:
        parameters.put(norms, row.path, jnp.asarray(parameters.get(group, row.path)[i], jnp.float32))
    matrices = {
        merged: _matrix(jnp.asarray(jnp.concatenate(
            [jnp.reshape(parameters.get(group, row.path)[i], row.matrix(model)).T for row in rows]), jnp.float32), weight_format)
        for merged, rows in MERGED.items()}
    return Layer(norms, matrices)

  return tuple(one(i) for i in range(group["attention_norm"].shape[0]))
