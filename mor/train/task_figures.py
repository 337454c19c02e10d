"""How well, and how deeply, a model answers the held-out questions of a task, by difficulty.

  accuracy      share of answers whose most likely token is the right one
  solved        share of problems of which every answer is right; a problem has its greatest difficulty
  depth         mean recursion steps of the tokens that answer; of difficulty 0, of all other tokens
  correlation   rank correlation (Spearman) of depth and difficulty over the tokens that answer

Sums are made per batch on the device, and figures of the sums of all batches.
"""

from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor import types

_BY_DIFFICULTY = re.compile(r"(accuracy|solved|depth)_(causal|oracle)(?:_(\d+))?")


def count(num_levels: int, likeliest_BT: types.Tokens, keep_RBT: jax.Array,
          batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns what the rows of one device add to the sums of a routing.

  Args:
    num_levels: one more than the largest difficulty.
    likeliest_BT: most likely token at each position.
    keep_RBT: True where a step processes a token; False for padding.
    batch: rows with `difficulty_BT`.
  """
  difficulty_BT, valid_BT = batch["difficulty_BT"], batch["segment_BT"] != 0
  asked_BT = difficulty_BT > 0
  right_BT = asked_BT & (likeliest_BT == batch["target_BT"])
  depth_BT = jnp.sum(keep_RBT, axis=0, dtype=jnp.int32)
  num_rows, seq_len = difficulty_BT.shape
  problem_BT = jnp.arange(num_rows)[:, None] * (seq_len + 1) + batch["segment_BT"]  # one number for each problem
  size = num_rows * (seq_len + 1)
  wrong = jax.ops.segment_sum(jnp.ravel(asked_BT & ~right_BT).astype(jnp.int32), jnp.ravel(problem_BT), size)
  hardest = jax.ops.segment_max(jnp.ravel(difficulty_BT), jnp.ravel(problem_BT), size)
  hardest = jnp.maximum(hardest, 0)  # a problem that is not there
  level_BTD, problem_level = _one_hot(difficulty_BT, num_levels), _one_hot(hardest, num_levels)
  joint = jnp.einsum("BTD,BTR->DR", level_BTD * valid_BT[:, :, None], _one_hot(depth_BT, keep_RBT.shape[0] + 1))
  return {
      "joint": joint, "right": jnp.sum(level_BTD * right_BT[:, :, None], axis=(0, 1)),
      "problems": jnp.sum(problem_level, axis=0),
      "solved": jnp.sum(problem_level * (wrong == 0)[:, None], axis=0)}


def figures(model: config_lib.ModelConfig, name: str, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns the figures of a routing, by name and difficulty, e.g. `accuracy_causal_3`, and their means."""
  joint, num_steps = sums["joint"], model.num_recursions
  asked, found = joint.sum(axis=1), {}
  for kind, good, all_ in (("accuracy", sums["right"], asked), ("solved", sums["solved"], sums["problems"])):
    found[f"{kind}_{name}"] = good[1:].sum() / max(all_[1:].sum(), 1.0)
    found |= {f"{kind}_{name}_{level}": good[level] / all_[level] for level in range(1, len(all_)) if all_[level]}
  if num_steps > 1:
    mean = joint @ np.arange(num_steps + 1) / np.maximum(asked, 1.0)
    found |= {f"depth_{name}_{level}": mean[level] for level in range(len(asked)) if asked[level]}
    correlation = rank_correlation(joint[1:])
    if correlation is not None:
      found[f"correlation_{name}"] = correlation
  return found


def rank_correlation(joint: np.ndarray) -> float | None:
  """Returns Spearman's correlation of two ranks from the number of each pair; None if one never varies."""
  ranks = []
  for counts in (joint.sum(axis=1), joint.sum(axis=0)):
    ranks.append(np.cumsum(counts) - counts / 2)  # ties share their mean rank
  total = joint.sum() / 2  # the mean of either rank
  first, second = ranks[0][:, None] - total, ranks[1][None, :] - total
  spread = np.sqrt((joint * first**2).sum() * (joint * second**2).sum())
  return float((joint * first * second).sum() / spread) if spread > 0 else None


def nest(found: Mapping[str, float]) -> dict[str, Any]:
  """Returns figures with those of each difficulty, and of all, in an object: `accuracy`, and `accuracy_oracle`."""
  nested: dict[str, Any] = {}
  for key, value in found.items():
    parts = _BY_DIFFICULTY.fullmatch(key)
    if parts is None:
      nested[key] = value
    else:
      kind, routing, level = parts.groups()
      nested.setdefault(kind if routing == "causal" else f"{kind}_{routing}", {})[level or "all"] = value
  return nested


def describe(found: Mapping[str, float], name: str) -> str:
  """Returns the accuracy by difficulty as text, e.g. "accuracy 0.98 (1.00 0.99 0.97 0.96)"."""
  by_level = nest(found).get("accuracy" if name == "causal" else f"accuracy_{name}", {})
  shown = [f"{value:.2f}" for level, value in by_level.items() if level != "all"]
  return f"accuracy {found[f'accuracy_{name}']:.3f} ({' '.join(shown)})"


def _one_hot(index: jax.Array, size: int) -> jax.Array:
  return jax.nn.one_hot(index, size, dtype=jnp.float32)
