"""No routing: every token runs every step, and the stack's output is the state."""

import jax.numpy as jnp

from mor import config as config_lib
from mor.model.routers import base


class Fixed:
  """Plain recursion, and with R = 1 the vanilla decoder."""

  bounded = False

  def __init__(self, config: config_lib.ModelConfig):
    self.config = config
    self.num_steps = config.num_recursions

  def init(self, key):
    del key
    return {}

  def enter(self, params, h_BTD, valid_BT, *, bias_R=None, train_step=None, key=None, position_BT=None):
    """Nothing to decide."""
    del params, h_BTD, valid_BT, bias_R, train_step, key, position_BT
    return None

  def select(self, plan, h_BTD, alive_BT, step):
    """Keeps every live token."""
    del plan, h_BTD, step
    return base.Routing(keep_BT=alive_BT, score_BT=jnp.zeros(alive_BT.shape, jnp.float32), keeps_all=True)

  decide = select

  def widths(self, seq_len: int, bucket: int | None = None) -> tuple[int, ...]:
    """Every step processes the whole sequence."""
    del bucket
    return (seq_len,) * self.num_steps
