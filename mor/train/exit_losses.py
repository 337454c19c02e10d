"""Losses of early exits: each is the head over final norm and the states at a boundary of layers.

  depth     sum_i i L_i / sum_i i over the exits' layers i and the end
  constant  L_end + coef * sum_i L_i
  L_i       (1 - kl) NLL + kl KL(end's distribution, detached || exit's)
  hidden    + hidden_coef * mean of (state - imitated state, detached)^2 over pairs of layers

With one exit and kl = 0, `depth` is FREE's loss, with all layers CALM's; `constant` with
coef 0.1 and kl is the post-training of Relaxed Recursive Transformers. A curriculum trains
some of the exits in a step: one in turn, or from the deepest on ever more of them.

Source: FREE arXiv:2310.05424 (util/losses.py of its code; the pairs, too); CALM
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


def wanted(config: config_lib.ExitConfig, model: config_lib.ModelConfig) -> tuple[int, ...]:
  """The layers whose states the losses need, the end left out."""
  layers = set(config.layers)
  if config.hidden in ("uniform", "dynamic"):
    layers |= set(range(1, config.layers[0] + 1)) | set(teachers(config.layers[0], model.num_layers))
  return tuple(sorted(layers - {model.num_layers}))


def teachers(exit_layer: int, num_layers: int) -> tuple[int, ...]:
  """The layers that those up to an exit imitate: as many, evenly spaced, the last one the end."""
  return tuple(round(i * num_layers / exit_layer) for i in range(1, exit_layer + 1))


def weights(config: config_lib.ExitConfig, num_layers: int, step: jax.Array, num_steps: int) -> jax.Array:
  """Factors of the exits' losses and, last, of the end's."""
  on = jnp.concatenate([_active(config, step, num_steps), jnp.ones(1)])
  if config.weighting == "constant":
    return on * jnp.array([config.coef] * len(config.layers) + [1.0])
  depth = on * jnp.array([*config.layers, num_layers], jnp.float32)
  return depth / jnp.sum(depth)


def _active(config, step, num_steps):
  """1 for the exits that a step trains, else 0."""
  num = len(config.layers)
  index = jnp.arange(num)
  if config.curriculum == "rotational":
    return (index == step % num).astype(jnp.float32)
  if config.curriculum == "gradual":  # all are on by half of the run
    return (index >= num - 1 - step * 2 * num // num_steps).astype(jnp.float32)
  return jnp.ones(num)


def losses(config: config_lib.Config, out: transformer.Output, main: jax.Array, params: Mapping[str, Any],
           target_BT: types.Tokens, weight_BT: jax.Array, step: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The end's loss `main` together with the exits', and each exit's NLL.

  Args:
    config: the experiment.
    out: of the model, with the states of `wanted`.
    main: loss of the end.
    params: of the model.
    target_BT: next tokens.
    weight_BT: of each in a mean.
    step: of training.
  """
  settings = config.exit
  if not settings.layers:
    return main, {}
  states = dict(zip(wanted(settings, config.model), out.exits)) | {config.model.num_layers: out.hidden_BTD}
  head_VD = transformer.head(params)
  end = jax.lax.stop_gradient((out.hidden_BTD, head_VD))
  factors = weights(settings, config.model.num_layers, step, config.train.steps)
  total, terms = factors[-1] * main, {}
  for factor, layer in zip(factors, settings.layers):
    one, nll, _ = loss_lib.distilled((states[layer], head_VD), end, target_BT, weight_BT, config.train.loss_block,
                                     settings.kl, 1.0)
    total += factor * one
    terms[f"exit_{layer}_nll"] = nll
  if settings.hidden != "none":
    terms["exit_hidden"] = _imitation(settings, config.model.num_layers, states, weight_BT)
    total += settings.hidden_coef * terms["exit_hidden"]
  return total, terms


def _imitation(config, num_layers, states, weight_BT):
  exit_layer = config.layers[0]

  def distance_B(student, teacher):
    change_BTD = (states[student] - jax.lax.stop_gradient(states[teacher])).astype(jnp.float32)
    return jnp.sum(jnp.mean(change_BTD**2, axis=-1) * weight_BT, axis=1)
  if config.hidden == "last":
    return jnp.sum(distance_B(exit_layer, num_layers))
  taught = teachers(exit_layer, num_layers)
  if config.hidden == "uniform":
    return sum(jnp.sum(distance_B(i, teacher)) for i, teacher in enumerate(taught, start=1)) / exit_layer
  distance_TSB = jnp.stack(
      [jnp.stack([distance_B(i, teacher) for i in range(1, exit_layer + 1)]) for teacher in taught])
  # A map for each row, so that a row's loss does not depend on the batch it is cut into; FREE's is the batch's.
  chosen_TB = jax.vmap(dynamic, in_axes=2, out_axes=1)(jax.lax.stop_gradient(distance_TSB))
  return jnp.sum(jnp.take_along_axis(distance_TSB, chosen_TB[:, None], axis=1)) / len(taught)


def dynamic(distance_TS: jax.Array) -> jax.Array:
  """Which layer imitates each teacher: from the last teacher on the nearest one below the one before, if any is."""
  index_S = jnp.arange(distance_TS.shape[1])

  def pick(bound, distance_S):
    nearest = jnp.argmin(jnp.where(index_S < bound, distance_S, jnp.inf)).astype(jnp.int32)
    chosen = jnp.where(bound > 0, nearest, bound)
    return chosen, chosen
  return jax.lax.scan(pick, jnp.int32(distance_TS.shape[1]), distance_TS, reverse=True)[1]
