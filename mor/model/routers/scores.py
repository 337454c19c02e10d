"""Score networks of the routers: hidden state -> logits, in float32.

linear D -> O, mlp D -> 2D -> O, wide_mlp D -> 4D -> O (GELU), no biases; or
random scores without parameters. The parameters of all routers of a model are
stacked on a leading axis.

Source: MoR paper Table 4 and App. G.1; raymin0223/mixture_of_recursions
model/mor_model/util.py, where wide_mlp has the width of mlp.
"""

import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import parameters
from mor import sharding

WIDTHS = {"mlp": 2, "wide_mlp": 4}  # hidden width / model width


def init(key: jax.Array, config: config_lib.ModelConfig, num_routers: int, num_outputs: int) -> dict:
  """Returns the parameters of `num_routers` score networks; normal, the model's `init_std`."""
  arch = config.router.arch
  if arch == "random":
    return {}
  hidden_key, out_key = jax.random.split(key)
  d_model = config.d_model
  width = WIDTHS.get(arch, 1) * d_model

  def normal(key, shape):
    return config.init_std * jax.random.normal(key, shape, jnp.float32)

  params = {"out": normal(out_key, (num_routers, width, num_outputs))}
  if arch in WIDTHS:
    params["hidden"] = normal(hidden_key, (num_routers, d_model, width))
  return params


def rows(config: config_lib.ModelConfig, group: str, official: str, num_routers: int,
         num_outputs: int) -> tuple[parameters.Parameter, ...]:
  """Returns the rows of the parameters that `init` makes.

  Args:
    config: config of the model.
    group: name of the parameters' group, e.g. "router".
    official: name of the network in the official code.
    num_routers: number of score networks.
    num_outputs: logits of each.
  """
  if config.router.arch == "random":
    return ()
  hidden = config.router.arch in WIDTHS
  widths = (("I", WIDTHS.get(config.router.arch, 1) * config.d_model), ("O", num_outputs))
  out = parameters.Parameter(
      f"{group}/out", "I", "O", (None, None), f"model.{group}.{{i}}.out", count=num_routers, widths=widths,
      official=f"{official}.router.2" if hidden else f"{official}.router")
  if not hidden:
    return (out,)
  return out, parameters.Parameter(
      f"{group}/hidden", "D", "I", (None, None), f"model.{group}.{{i}}.hidden", count=num_routers, widths=widths,
      official=f"{official}.router.0")


def logits(params: dict, index: jax.Array | int, h_BTD: jax.Array) -> jax.Array:
  """Returns the logits `[B, T, O]` of the network number `index`."""
  with jax.named_scope("router"):
    x_BTD = h_BTD.astype(jnp.float32)
    if "hidden" in params:
      x_BTD = jax.nn.gelu(jnp.einsum("BTD,DW->BTW", x_BTD, params["hidden"][index]), approximate=False)
    return jnp.einsum("BTW,WO->BTO", x_BTD, params["out"][index])


def uniform(key: jax.Array, shape_BT: tuple[int, int], position_BT: jax.Array | None = None) -> jax.Array:
  """Returns random scores that depend on row and position only, not on the shape.

  With positions, as in decoding, each row is scored as the first of a batch is.
  """
  batch, seq_len = shape_BT
  if position_BT is None:
    row_B, position_BT = sharding.first_row(batch) + jnp.arange(batch), jnp.broadcast_to(jnp.arange(seq_len)[None, :], shape_BT)
  else:
    row_B = jnp.zeros(batch, jnp.int32)
  row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)
  keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(row_keys, position_BT)
  return jax.vmap(jax.vmap(jax.random.uniform))(keys)


def activate(config: config_lib.RouterConfig, logits_BTO: jax.Array) -> jax.Array:
  """Returns alpha * activation(logits)."""
  functions = {
      "sigmoid": jax.nn.sigmoid,
      "tanh": jnp.tanh,
      "none": lambda x: x,
      "softmax": lambda x: jax.nn.softmax(x, axis=-1),
  }
  return config.alpha * functions[config.activation](logits_BTO)
