"""Parameters laid out for decoding.

Training stacks the layers and keeps every projection apart; a decoded token reads
each weight once, so here every layer has its own arrays (a scan over stacked
layers costs 1.2-4x), q, k, v are one matrix and gate, up another, and matrices are
`[out, in]`, the layout in which XLA:CPU multiplies fastest.

Formats:
  float32    exact
  bfloat16   matrices in bfloat16, products summed in float32, hidden states
             float32: halves the bytes a token reads
"""

from collections.abc import Mapping
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from mor import config as config_lib

FORMATS = ("float32", "bfloat16")


@struct.dataclass
class Layer:
  """One decoder layer; O is the output of a projection."""

  attention_norm_D: jax.Array
  qkv_OD: jax.Array
  o_DO: jax.Array
  ffw_norm_D: jax.Array
  gate_up_OD: jax.Array
  down_DF: jax.Array


@struct.dataclass
class Weights:
  """A model ready to decode.

  Attributes:
    embedding_VD: the head.
    lookup_VD: the same numbers for single rows; bfloat16 as its bits in uint16,
      because XLA:CPU gathers bfloat16 from a table widened to float32.
    prelude, stack, coda: layers.
    final_norm_D: before the head.
    router: the routers' own parameters, float32.
    bias_R: of loss-free balancing.
  """

  embedding_VD: jax.Array
  lookup_VD: jax.Array
  prelude: tuple[Layer, ...]
  stack: tuple[Layer, ...]
  coda: tuple[Layer, ...]
  final_norm_D: jax.Array
  router: Mapping[str, Any]
  bias_R: jax.Array | None


def prepare(model: config_lib.ModelConfig, variables: Mapping[str, Any], weight_format: str) -> Weights:
  """Lays out trained variables for decoding.

  Args:
    model: the variables' config.
    variables: {"params": …} and, where the model has one, {"balance": …}.
    weight_format: one of FORMATS.

  Raises:
    ValueError: the format is unknown.
  """
  if weight_format not in FORMATS:
    raise ValueError(f"weight_format={weight_format!r}; use one of {', '.join(FORMATS)}")
  params, dtype = variables["params"], jnp.dtype(weight_format)
  balance = variables.get("balance") or {}
  embedding_VD = jnp.asarray(params["embedding"], dtype)
  bits = dtype == jnp.bfloat16
  return Weights(
      embedding_VD=embedding_VD,
      lookup_VD=jax.lax.bitcast_convert_type(embedding_VD, jnp.uint16) if bits else embedding_VD,
      **{group: _layers(model, params.get(group), dtype) for group in ("prelude", "stack", "coda")},
      final_norm_D=jnp.asarray(params["final_norm"], jnp.float32),
      router={name: params[name] for name in ("router", "aux_router") if name in params},
      bias_R=balance.get("bias_R") if model.router.balancing == "loss_free" else None)


def project(x_MI: jax.Array, w_OI: jax.Array) -> jax.Array:
  """x w^T in float32; x is rounded to the weights' format.

  One bfloat16 row takes a slow path of XLA:CPU (5x), so it goes as two.
  """
  x_MI = x_MI.astype(w_OI.dtype)
  num = x_MI.shape[0]
  if num == 1 and w_OI.dtype == jnp.bfloat16:
    x_MI = jnp.concatenate([x_MI, jnp.zeros_like(x_MI)])
  contract = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(x_MI, w_OI, contract, preferred_element_type=jnp.float32)[:num]


def _layers(model: config_lib.ModelConfig, group: Mapping[str, Any] | None, dtype: jnp.dtype) -> tuple[Layer, ...]:
  if group is None:
    return ()
  attention, ffw = group["attention"], group["ffw"]
  width = model.num_heads * model.head_dim
  flat = lambda w_DNH: jnp.reshape(w_DNH, (model.d_model, -1)).T  # noqa: E731  [D, N, H] -> [N * H, D]
  return tuple(
      Layer(
          attention_norm_D=jnp.asarray(group["attention_norm"][i], jnp.float32),
          qkv_OD=jnp.concatenate([flat(attention[name][i]) for name in "qkv"]).astype(dtype),
          o_DO=jnp.reshape(attention["o"][i], (width, model.d_model)).T.astype(dtype),
          ffw_norm_D=jnp.asarray(group["ffw_norm"][i], jnp.float32),
          gate_up_OD=jnp.concatenate([ffw["gate"][i].T, ffw["up"][i].T]).astype(dtype),
          down_DF=jnp.asarray(ffw["down"][i].T, dtype))
      for i in range(group["attention_norm"].shape[0]))
