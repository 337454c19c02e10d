"""What each recursion step adds to the shared projections: y = x W + (x a) b.

A relaxed recursive Transformer gives every projection of every unrolled layer
between prelude and coda a low-rank delta of its own, `a_IA b_AO`, and shares W.
There is no factor alpha / rank: W, a and b are all trained.

Parameters, of the projections with a rank above 0 (R steps, L layers a step):

  attention/{q,k,v,o}/{a,b}, ffw/{gate,up,down}/{a,b}     a [R, L, I, A]  b [R, L, A, O]

with heads flattened, in our order of inputs and outputs.

Source: RRT paper §3.1 (eq. of h = W'x + BAx); a is Gaussian and b zero where
nothing else is known (its App. C), so a fresh model starts as the plain one.
"""

import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor.model import schedule as schedule_lib

PARTS = {"attention": ("q", "k", "v", "o"), "ffw": ("gate", "up", "down")}


def init(key: jax.Array, config: config_lib.ModelConfig) -> dict:
  """Parameters; {} where every rank is 0."""
  schedule, ranks, wide = schedule_lib.make(config), config.lora.ranks, config.projections
  lead = (schedule.num_steps, schedule.depth)
  params = {}
  for part, names in PARTS.items():
    for name in names:
      if name in ranks:
        (ins, outs), rank = wide[name], ranks[name]
        key, draw = jax.random.split(key)
        a = config.init_std * jax.random.normal(draw, (*lead, ins, rank), jnp.float32)
        params.setdefault(part, {})[name] = {"a": a, "b": jnp.zeros((*lead, rank, outs), jnp.float32)}
  return params


def at_step(params: dict, step: jax.Array | int) -> dict:
  """The deltas of one step, stacked over its layers."""
  return jax.tree.map(lambda p: p[step], params)


def delta(x_BTI: jax.Array, lora: dict, name: str) -> jax.Array | float:
  """(x a) b of a layer's projection, in x's type; 0 where it has none."""
  if name not in lora:
    return 0.0
  a_IA, b_AO = (lora[name][part].astype(x_BTI.dtype) for part in "ab")
  with jax.named_scope("lora"):
    return jnp.einsum("BTA,AO->BTO", jnp.einsum("BTI,IA->BTA", x_BTI, a_IA), b_AO)
