"""No routing: every token runs every step, and the stack's output is the state.

  state' = stack(state)       R times, for all tokens

With several recursion steps this is plain recursion, which equals the unrolled stack
with tied layers, and with R = 1 the vanilla decoder. Every token takes all steps, so
there is nothing to report, and training and generation route alike. Steps have equal
shapes, so one scan runs them.

All other fields of `RouterConfig` are without effect: there is no score network, no
capacity and no loss. `dataclasses.replace(config.router, name="fixed")` is therefore
the plain model of any experiment.

Source: MoR paper §2.1; Universal Transformers (Dehghani et al. 2019) without halting.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mor import types
from mor.model.routers import base


class Fixed(base.Router):
  """Plain recursion, and with R = 1 the vanilla decoder."""

  routes = False
  any_depth = True
  test_config: Mapping[str, Any] = dict(sampling="none")

  def select(self, plan: Any, h_BTD: types.Activations, alive_BT: types.Mask, step: jax.Array | int) -> base.Routing:
    """Keeps every live token."""
    del plan, h_BTD, step
    return base.Routing(keep_BT=alive_BT, score_BT=jnp.zeros(alive_BT.shape, jnp.float32), keeps_all=True)

  def official_modules(self, edge: int) -> tuple[list[str], list[str]]:
    """Returns no module: the official code then has the layers of a plain model."""
    del edge
    return [], []
