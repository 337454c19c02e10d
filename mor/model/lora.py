"""What each recursion step adds to the shared projections: y = x W + (x a) b.

A relaxed recursive Transformer gives every projection of every unrolled layer
between prelude and coda a low-rank delta of its own, `a_IA b_AO`, and shares W.
There is no factor alpha / rank: W, a and b are all trained.

Parameters, of the projections with a rank above 0 (R steps, L layers a step), by
the path of the projection, heads flattened:

  attention/{q,k,v,o}/{a,b}, ffw/{gate,up,down}/{a,b}     a [R, L, I, A]  b [R, L, A, O]

Source: RRT paper §3.1 (eq. of h = W'x + BAx); a is Gaussian and b zero where
nothing else is known (its App. C), so a fresh model starts as the plain one.
"""

import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import parameters
from mor.model import schedule as schedule_lib


def init(key: jax.Array, config: config_lib.ModelConfig) -> dict:
  """Returns fresh parameters; {} if every rank is 0."""
  schedule, params = schedule_lib.make(config), {}
  lead = (schedule.num_steps, schedule.depth)
  for row in parameters.PROJECTIONS:
    if row.name in config.lora.ranks:
      (ins, outs), rank = row.matrix(config), config.lora.ranks[row.name]
      key, draw = jax.random.split(key)
      a_RLIA = config.init_std * jax.random.normal(draw, (*lead, ins, rank), jnp.float32)
      parameters.put(params, row.path, {"a": a_RLIA, "b": jnp.zeros((*lead, rank, outs), jnp.float32)})
  return params


def at_step(params: dict, step: jax.Array | int) -> dict:
  """Returns the deltas of one step, stacked over its layers."""
  return jax.tree.map(lambda p: p[step], params)


def delta(x_BTI: jax.Array, pair: dict) -> jax.Array:
  """Returns (x a) b, in the type of x, for the `a` and `b` of one projection."""
  a_IA, b_AO = (pair[part].astype(x_BTI.dtype) for part in "ab")
  with jax.named_scope("lora"):
    return jnp.einsum("BTA,AO->BTO", jnp.einsum("BTI,IA->BTA", x_BTI, a_IA), b_AO)
