"""AdamW, its decay mask, and the learning-rate schedules.

Source: MoR paper App. C (trapezoid: linear warm-up, plateau, linear cooldown).
"""

import jax
import optax

from mor import config as config_lib
from mor import sharding


def learning_rate(config: config_lib.Config) -> optax.Schedule:
  """Returns the learning rate as a function of the 0-based step."""
  c, steps = config.optim, config.train.steps
  return SCHEDULES[c.schedule](c, steps)


def _wsd(c: config_lib.OptimConfig, steps: int) -> optax.Schedule:
  plateau_end = c.shared_steps(steps)
  return optax.join_schedules(
      [_constant(c, steps), optax.linear_schedule(c.learning_rate, c.end_ratio * c.learning_rate,
                                                  max(1, steps - plateau_end))],
      boundaries=[plateau_end])


def _cosine(c: config_lib.OptimConfig, steps: int) -> optax.Schedule:
  return optax.warmup_cosine_decay_schedule(
      0.0, c.learning_rate, c.warmup_steps, max(steps, c.warmup_steps + 1), c.end_ratio * c.learning_rate)


def _constant(c: config_lib.OptimConfig, steps: int) -> optax.Schedule:
  del steps
  if not c.warmup_steps:
    return optax.constant_schedule(c.learning_rate)
  return optax.linear_schedule(c.learning_rate / c.warmup_steps, c.learning_rate, c.warmup_steps - 1 or 1)


SCHEDULES = {"wsd": _wsd, "cosine": _cosine, "constant": _constant}


def make(config: config_lib.Config) -> optax.GradientTransformation:
  """Makes the optimizer: clipping, Adam, weight decay, learning rate.

  Norms do not decay. The auxiliary router has a multiple of the learning rate.
  """
  c = config.optim

  def named(test):
    """Makes a mask: True for the parameters whose path passes the test."""
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: test(sharding.path_name(path)), tree)

  multiplier = config.model.router.aux_router_lr_multiplier
  parts = [optax.clip_by_global_norm(c.clip_norm)] if c.clip_norm else []
  parts += [
      optax.scale_by_adam(c.b1, c.b2, c.eps),
      optax.add_decayed_weights(c.weight_decay, named(lambda path: not path.endswith("_norm"))),
      optax.scale_by_learning_rate(learning_rate(config)),
  ]
  if config.model.router.sampling == "aux_router":
    parts.append(optax.masked(optax.scale(multiplier), named(lambda path: path.startswith("aux_router/"))))
  return optax.chain(*parts)
