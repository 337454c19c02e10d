"""One pre-norm decoder layer: x + attention(norm(x)), then x + swiglu(norm(x)).

  enter   norm, project, with `qk_norm` norm each head, rotate: queries, keys and values
  attend  softmax attention of the queries, as their view says
  leave   output projection and residual; norm, SwiGLU and residual

`enter` and `leave` take the projection as an argument, so every pass runs the same
layer with its own matrices: `run` (training, by stacked float32 parameters and a
step's low-rank deltas), `decode/decoder.py` (prefill and decoding, by merged matrices
in several formats) and `exits/` (keys and values alone, of tokens that left).

  project(x, "q", "k") -> the arrays of both projections of x, heads split

Source: transformers models/llama, models/qwen3 (the norm of queries and keys).
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import parameters
from mor import types
from mor.model import kernels
from mor.model import layers
from mor.model import lora as lora_lib
from mor.model.kv import view as kv_view

Project = Callable[..., tuple[jax.Array, ...]]  # see the module docstring


class Block(nn.Module):
  """Declares the parameters of a layer, in the order of their rows."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self) -> None:
    """Declares them; `init` returns them, and `run` uses them."""
    model, groups = self.config, {}
    for row in parameters.layer(model):
      *group, name = row.path.split("/")
      ins, outs = row.shape(model)
      init = nn.initializers.normal(model.init_std) if ins else nn.initializers.ones_init()
      if not group:
        self.param(name, init, ins + outs, jnp.float32)
      else:
        groups.setdefault(group[0], []).append((name, init, ins + outs))
    for group, members in groups.items():
      _Group(tuple(members), name=group)()


class _Group(nn.Module):
  """The parameters of attention or of the feed-forward part."""

  members: tuple[tuple[str, Callable, tuple[int, ...]], ...]

  @nn.compact
  def __call__(self) -> None:
    """Declares them."""
    for name, init, shape in self.members:
      self.param(name, init, shape, jnp.float32)


def run(config: config_lib.ModelConfig, params: Mapping[str, Any], x_BTD: types.Activations, view: kv_view.KVView,
        base: kv_view.KV | None = None, own: bool = True,
        lora: Mapping[str, Any] | None = None) -> tuple[types.Activations, kv_view.KV | None]:
  """Runs a layer whose queries attend to their own keys, to those of the base, or to both.

  Args:
    config: model of the layer.
    params: parameters of the layer.
    x_BTD: hidden states of the queries.
    view: keys that the queries see.
    base: keys that an earlier step wrote, if the layer reads any.
    own: True if the layer computes keys for its queries, static.
    lora: deltas of the projections at this step, see `lora.py`.

  Returns:
    The new hidden states and the fresh keys (None unless `own`).
  """
  project = _projector(config, params, lora or {})
  with jax.named_scope("attention"):
    q_BTNH, *fresh = enter(config, params, x_BTD, view.rotation, project, "qkv" if own else "q")
    fresh = kv_view.KV(*fresh) if own else None
    if base is None:
      kv = fresh
    else:
      kv = view.overlay(base, fresh) if own else base
    out_BTNH = attend(q_BTNH, kv, view)
  return leave(config, params, x_BTD, out_BTNH, project), fresh


def enter(config: config_lib.ModelConfig, norms: Mapping[str, Any], x_BTD: types.Activations,
          rotation_BT1H: tuple[jax.Array, jax.Array], project: Project, names: str = "qkv") -> tuple[jax.Array, ...]:
  """Returns the queries, the keys (both rotated) and the values of hidden states, or some of them.

  Args:
    config: model of the layer.
    norms: norms of the layer, in the tree of its parameters.
    x_BTD: hidden states.
    rotation_BT1H: cosine and sine of their positions.
    project: projection by the matrices of the layer.
    names: letters of the arrays wanted, in order: q, k, v.
  """
  heads = []
  for name, y_BTNH in zip(names, project(layers.rms_norm(x_BTD, norms["attention_norm"], config.norm_eps), *names)):
    if config.qk_norm and name != "v":
      y_BTNH = layers.rms_norm(y_BTNH, norms["attention"][f"{name}_norm"], config.norm_eps)
    heads.append(y_BTNH if name == "v" else layers.rotate(y_BTNH, rotation_BT1H))
  return tuple(heads)


def attend(q_BTNH: types.Queries, kv: kv_view.KV, view: kv_view.KVView) -> types.Queries:
  """Attends as the view says; the results of queries that see no key are finite, and the caller drops them."""
  with jax.named_scope("attend"):
    if view.kernel == "splash":
      return kernels.splash(q_BTNH, kv.k_BSKH, kv.v_BSKH, view.segment_BT)
    if view.kernel == "cudnn":
      return kernels.cudnn(q_BTNH, kv.k_BSKH, kv.v_BSKH, view.mask_BTS)
    return kernels.xla(q_BTNH, kv.k_BSKH, kv.v_BSKH, view.mask_BTS, view.bias_BTS)


def leave(config: config_lib.ModelConfig, norms: Mapping[str, Any], x_BTD: types.Activations, out_BTNH: types.Queries,
          project: Project) -> types.Activations:
  """Returns the hidden states after the layer, from those before it and what attention gave."""
  with jax.named_scope("attention"):
    (y_BTD,) = project(out_BTNH, "o")
    x_BTD = x_BTD + y_BTD
  with jax.named_scope("ffw"):
    gate_BTF, up_BTF = project(layers.rms_norm(x_BTD, norms["ffw_norm"], config.norm_eps), "gate", "up")
    (y_BTD,) = project(jax.nn.silu(gate_BTF) * up_BTF, "down")
    return x_BTD + y_BTD


def _projector(config: config_lib.ModelConfig, params: Mapping[str, Any], lora: Mapping[str, Any]) -> Project:
  """Returns the projection by a layer's parameters, in the type of the computation, with a step's deltas."""
  rows = {row.name: row for row in parameters.PROJECTIONS}
  dtype = jnp.dtype(config.compute_dtype)

  def one(x, name):
    row = rows[name]
    group, _ = row.path.split("/")
    y = jnp.einsum(f"BT{row.ins},{row.ins}{row.outs}->BT{row.outs}", x, params[group][name].astype(dtype))
    if name not in lora.get(group, {}):
      return y
    x_BTI = x.reshape(*x.shape[:2], -1)
    return y + lora_lib.delta(x_BTI, lora[group][name]).reshape(y.shape)

  def project(x, *names):
    return tuple(one(x, name) for name in names)

  return project
