"""Greedy decoding with exits whose deeper entries are copied, in float64 NumPy, one token and one layer at a time."""

from collections.abc import Sequence

import numpy as np

from mor.serve import model as model_lib
from tests.helpers import oracle

def own(row, weights, i, x_D):
  """A layer's own key and value of a state."""
  return row.key_value(weights["attention"], i, oracle._rms_norm(x_D, weights["attention_norm"], row.config.norm_eps))


def answer(model: model_lib.Model, after: Sequence[int], threshold: float, prompt: list[int], num: int) -> tuple[list[int], list[int], list[float]]:
  """New tokens, the number of exits and ends up to theirs, and their log-probabilities; no edges, no router."""
  config = model.config
  params = oracle._map(lambda a: np.asarray(a, np.float64), dict(model.variables["params"]))
  row = oracle._Row(config, params, np.ones(len(prompt) + num), "decide", None)
  layers = [oracle._layer(params["stack"], index) for step in oracle._stack_rows(config) for index in step]
  stores, tokens, depths, logprobs = [{} for _ in layers], list(prompt), [], []

  def read(x_D):
    chance_V = oracle._softmax(params["head"] @ oracle._rms_norm(x_D, params["final_norm"], config.norm_eps))
    second, first = np.sort(chance_V)[-2:]
    return int(np.argmax(chance_V)), first - second, float(np.log(first))

  for i in range(len(prompt) + num - 1):
    x_D, left = params["embedding"][tokens[i]], len(layers)
    for at, weights in enumerate(layers):
      if at in after and i >= len(prompt) - 1 and read(x_D)[1] > threshold:
        left = at
        break
      stores[at][i] = own(row, weights, i, x_D)
      normed_D = oracle._rms_norm(x_D, weights["attention_norm"], config.norm_eps)
      x_D = x_D + row.attend(weights["attention"], i, normed_D, stores[at])
      x_D = x_D + oracle._swiglu(weights["ffw"], oracle._rms_norm(x_D, weights["ffw_norm"], config.norm_eps))
    for deep in range(left, len(layers)):
      stores[deep][i] = own(row, layers[deep], i, x_D)
    if i >= len(prompt) - 1:
      token, _, logprob = read(x_D)
      tokens.append(token)
      depths.append([*after, len(layers)].index(left) + 1)
      logprobs.append(logprob)
  return tokens[len(prompt):], depths, logprobs
