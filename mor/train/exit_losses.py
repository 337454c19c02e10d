"""Losses of early exits. An exit is the head over the final norm of the states after a layer.

  depth     sum_i i L_i / sum_i i over the layers i of the exits and the last layer
  constant  L_last + coef * sum_i L_i
  L_i       (1 - kl) NLL + kl KL(distribution of the last layer, detached || of the exit)
  hidden    + hidden_coef * mean of (state - imitated state, detached)^2 over pairs of layers

With one exit and kl = 0, `depth` is the loss of FREE; with all layers it is that of CALM.
`constant` with coef 0.1 and kl is the post-training of Relaxed Recursive Transformers. A
curriculum trains some of the exits in a step: one exit in turn, or more and more of them
from the deepest on.

Source: FREE arXiv:2310.05424 (util/losses.py of its code, also for the pairs); CALM
arXiv:2207.07061 eq. 6; RRT arXiv:2410.20672 §3.4; LayerSkip arXiv:2404.16710 eq. 4-5.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import types
from mor.model import transformer
from mor.train import loss as loss_lib


def select_layers(config: config_lib.ExitConfig, model: config_lib.ModelConfig) -> tuple[int, ...]:
  """Returns the layers whose states the losses need, without the last layer."""
  layers = set(config.layers)
  if config.hidden in ("uniform", "dynamic"):
    layers |= set(range(1, config.layers[0] + 1)) | set(select_teachers(config.layers[0], model.num_layers))
  return tuple(sorted(layers - {model.num_layers}))


def select_teachers(exit_layer: int, num_layers: int) -> tuple[int, ...]:
  """Returns a teacher for each layer up to an exit: evenly spaced layers that end with the last one."""
  return tuple(round(i * num_layers / exit_layer) for i in range(1, exit_layer + 1))


def loss_factors(config: config_lib.ExitConfig, num_layers: int, step: jax.Array, num_steps: int) -> jax.Array:
  """Returns the factor of the loss of each exit, and then that of the last layer."""
  active = jnp.concatenate([_active_exits(config, step, num_steps), jnp.ones(1)])
  if config.weighting == "constant":
    return active * jnp.array([config.coef] * len(config.layers) + [1.0])
  depth = active * jnp.array([*config.layers, num_layers], jnp.float32)
  return depth / jnp.sum(depth)


def _active_exits(config, step, num_steps):
  """Returns 1 for each exit that a step trains, else 0."""
  num = len(config.layers)
  index = jnp.arange(num)
  if config.curriculum == "rotational":
    return (index == step % num).astype(jnp.float32)
  if config.curriculum == "gradual":  # all exits are trained after half of the run
    return (index >= num - 1 - step * 2 * num // num_steps).astype(jnp.float32)
  return jnp.ones(num)


def add_losses(config: config_lib.Config, out: transformer.Output, main: jax.Array, params: Mapping[str, Any],
           target_BT: types.Tokens, weight_BT: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Adds the losses of the exits to the loss `main`, and returns the NLL of each exit, too.

  Args:
    config: the experiment.
    out: output of the model, with the states of `select_layers`.
    main: loss of the last layer.
    params: parameters of the model.
    target_BT: next tokens.
    weight_BT: weight of each position in the loss.
    step: training step.
  """
  settings = config.exit
  if not settings.layers:
    return main, {}
  states = dict(zip(select_layers(settings, config.model), out.exits)) | {config.model.num_layers: out.hidden_BTD}
  head_VD = transformer.head(params)
  last = jax.lax.stop_gradient((out.hidden_BTD, head_VD))
  factors = loss_factors(settings, config.model.num_layers, step, config.train.steps)
  total, terms = factors[-1] * main, {}
  for factor, layer in zip(factors, settings.layers):
    loss, nll, _ = loss_lib.distill((states[layer], head_VD), last, target_BT, weight_BT, config.train.loss_block,
                                   settings.kl, 1.0)
    total += factor * loss
    terms[f"exit_{layer}_nll"] = nll
  if settings.hidden != "none":
    terms["exit_hidden"] = _imitation_loss(settings, config.model.num_layers, states, weight_BT)
    total += settings.hidden_coef * terms["exit_hidden"]
  return total, terms


def _imitation_loss(config, num_layers, states, weight_BT):
  """Returns the mean squared distance of the states up to an exit from those of their teachers."""
  exit_layer = config.layers[0]

  def distance_B(student, teacher):
    change_BTD = (states[student] - jax.lax.stop_gradient(states[teacher])).astype(jnp.float32)
    return jnp.sum(jnp.mean(change_BTD**2, axis=-1) * weight_BT, axis=1)
  if config.hidden == "last":
    return jnp.sum(distance_B(exit_layer, num_layers))
  teachers = select_teachers(exit_layer, num_layers)
  if config.hidden == "uniform":
    return sum(jnp.sum(distance_B(i, teacher)) for i, teacher in enumerate(teachers, start=1)) / exit_layer
  distance_TSB = jnp.stack(
      [jnp.stack([distance_B(i, teacher) for i in range(1, exit_layer + 1)]) for teacher in teachers])
  # Each row has its own map, so that its loss does not depend on the batch. FREE has one map per batch.
  chosen_TB = jax.vmap(assign_layers, in_axes=2, out_axes=1)(jax.lax.stop_gradient(distance_TSB))
  return jnp.sum(jnp.take_along_axis(distance_TSB, chosen_TB[:, None], axis=1)) / len(teachers)


def assign_layers(distance_TS: jax.Array) -> jax.Array:
  """Returns the layer that imitates each teacher.

  From the last teacher to the first, each takes the nearest layer below the layer of the teacher before.
  """
  index_S = jnp.arange(distance_TS.shape[1])

  def pick(bound, distance_S):
    nearest = jnp.argmin(jnp.where(index_S < bound, distance_S, jnp.inf)).astype(jnp.int32)
    chosen = jnp.where(bound > 0, nearest, bound)
    return chosen, chosen
  return jax.lax.scan(pick, jnp.int32(distance_TS.shape[1]), distance_TS, reverse=True)[1]
