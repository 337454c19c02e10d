"""Numbers of recursion steps: of an optimizer step, which draws one, and of a trained model, which may run another.

A model whose parameters belong to no step in particular can run any number R of them
(`at`). One that always trained at the same R breaks at others, so training may draw R
for each optimizer step (`model.recursions_train`):

  uniform  each of `values` with the same probability
  poisson  R = 1 + Poisson(exp(t)),  t ~ Normal(log(mean - 1) - sigma^2 / 2, sigma);
           draws above `most` are drawn again

The mean of the unbounded poisson is `mean`. R is a function of seed and step: every
process and every resumed run draws the same, and each R is one compiled program.

Source: Geiping et al. 2025, arXiv:2502.05171 §3.3 (log-normal Poisson, sigma 0.5, and
truncated backpropagation); Universal Transformers (Dehghani et al. 2019) at a fixed R.
"""

from collections.abc import Mapping
import functools
import itertools
import math

import numpy as np

from mor import config as config_lib
from mor import fields
from mor.model.routers import table as router_table

_STREAM = 0x5EED  # of this draw, beside whatever else is drawn from seed and step
_GRID = np.arange(-160, 161) / 20.0  # standard deviations at which the log-normal rate is summed


def at(model: config_lib.ModelConfig, num_recursions: int) -> config_lib.ModelConfig:
  """Returns the model of the same parameters that runs another number of recursion steps.

  Raises:
    ValueError: the model has parameters or capacities of its own for each step.
  """
  router = router_table.make(model)
  fields.require(
      num_recursions == model.num_recursions or router.any_depth,
      f"{num_recursions} recursion steps of a model with model.num_recursions={model.num_recursions} and "
      f"router.name={model.router.name!r}", "its router has scores or capacities for the trained steps alone; use "
      f"{model.num_recursions}")
  return model.at_recursions(num_recursions)


@functools.cache
def probabilities(model: config_lib.ModelConfig) -> Mapping[int, float]:
  """Returns the probability of each number of recursion steps in training."""
  train = model.recursions_train
  support = train.support(model.num_recursions)
  if train.distribution != "poisson":
    return {steps: 1.0 / len(support) for steps in support}
  rate = np.exp(math.log((train.mean or model.num_recursions) - 1.0) - train.sigma**2 / 2 + train.sigma * _GRID)
  weight = np.exp(-_GRID**2 / 2)
  mass = [float(np.sum(weight * np.exp((steps - 1) * np.log(rate) - rate - math.lgamma(steps)))) for steps in support]
  return {steps: one / sum(mass) for steps, one in zip(support, mass)}


def draw(model: config_lib.ModelConfig, seed: int, step: int) -> int:
  """Returns the number of recursion steps of an optimizer step.

  Args:
    model: config of the model.
    seed: seed of the run.
    step: number of finished optimizer steps.
  """
  chances = probabilities(model)
  if len(chances) == 1:
    return next(iter(chances))
  (bits,) = np.random.SeedSequence((seed % 2**64, step, _STREAM)).generate_state(1, np.uint64)
  passed = list(itertools.accumulate(chances.values()))
  return list(chances)[sum(int(bits) >= bound * 2.0**64 for bound in passed[:-1])]
