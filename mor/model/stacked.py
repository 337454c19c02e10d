"""A scan over stacked layers, rematerialised as configured."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import sharding
from mor import types
from mor.model import block as block_lib
from mor.model import kernels
from mor.model.kv import view as kv_view

_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _dots_and_kernels(primitive, *avals, **params) -> bool:
  """Keeps what projections and fused attention give, whose forward takes the time; the rest is cheap."""
  return _DOTS(primitive, *avals, **params) or primitive.name in kernels.PRIMITIVES


_REMAT = {"none": None, "dots": _dots_and_kernels, "full": jax.checkpoint_policies.nothing_saveable}


def run_layers(config: config_lib.ModelConfig, params: dict, x_BTD: types.Activations, view: kv_view.KVView,
               base: kv_view.KV | None = None, own: bool = True, keep: bool = False,
               lora: Mapping[str, Any] | None = None,
               drop_LB: jax.Array | None = None) -> tuple[types.Activations, kv_view.KV | None]:
  """Scans layers stacked on the leading axis of `params`, and of `base` and `lora`.

  A layer leaves a batch row as it is if `drop_LB` says so.

  Returns:
    Hidden states, and with `keep` the layers' fresh keys, stacked.
  """
  apply = layer_fn(config, own)

  def body(x_BTD, layer):
    params, base, lora, drop_B = layer
    y_BTD, fresh = apply(params, x_BTD, view, base, lora)
    if drop_B is not None:
      y_BTD = jnp.where(drop_B[:, None, None], x_BTD, y_BTD)
    return y_BTD, fresh if keep else None

  if config.scan_layers:
    return jax.lax.scan(body, x_BTD, (params, base, lora, drop_LB))
  kept = []
  for i in range(jax.tree.leaves(params)[0].shape[0]):
    x_BTD, fresh = body(x_BTD, jax.tree.map(lambda a: a[i], (params, base, lora, drop_LB)))
    kept.append(fresh)
  return x_BTD, jax.tree.map(lambda *a: jnp.stack(a), *kept) if keep else None


def layer_fn(config: config_lib.ModelConfig, own: bool):
  """Returns one layer as a function of its parameters, rematerialised as configured."""
  def apply(params, x_BTD, view, base, lora):
    if params["attention"]["q"].shape[0] != config.d_model:  # a device's part
      params = sharding.gather_parameters(params, config.compute_dtype, "layer")
    y_BTD, fresh = block_lib.run(config, params, sharding.along_sequence(x_BTD), view, base, own, lora)
    return sharding.along_sequence(y_BTD), fresh
  if config.remat == "none":
    return apply
  return jax.checkpoint(apply, policy=_REMAT[config.remat], prevent_cse=not config.scan_layers)
