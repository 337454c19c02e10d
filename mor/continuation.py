"""Whether a config may continue a checkpoint, and from which step.

Fields that change the computation must be equal. `train.steps` may differ where it does
not change the learning rates of the steps that are done: always with a constant rate, and
with wsd before the cooldown (`OptimConfig.shared_steps`).
"""

from collections.abc import Collection
import os
from typing import Any

from mor import config as config_lib

# Fields that may differ between a checkpoint and the run that continues it: they change
# logging, storage, placement and decoding, but not the result of training.
FREE_FIELDS = frozenset((
    "data.cache_dir", "model.attention", "model.router.halting_threshold", "train.loss_block", "train.log_every",
    "train.eval_every", "train.eval_rows", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every",
    "train.step_timeout", "train.sample_prompt", "train.sample_tokens", "mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.sequence"))


def check(directory: str | os.PathLike, old: dict[str, Any], step: int, saved: Collection[int],
          config: config_lib.Config, free: Collection[str] = ()) -> None:
  """Raises ValueError if a config cannot continue a run.

  Args:
    directory: directory of its checkpoints, for the message.
    old: config of the newest checkpoint, as a dictionary.
    step: step of that checkpoint.
    saved: steps of all checkpoints.
    config: the config that shall continue it.
    free: fields that may differ besides `FREE_FIELDS`.
  """
  before, after = _flatten(old), _flatten(config_lib.to_dict(config))
  start = find_start(old, step, saved, config)
  free = FREE_FIELDS.union(free, () if start is None else {"train.steps"})
  differing = sorted(k for k in before.keys() | after.keys() if k not in free and before.get(k) != after.get(k))
  if differing == ["train.steps"] and config.train.steps > step:
    shared = _shared_steps(old, config)
    raise ValueError(
        f"train.steps={config.train.steps} (there {old['train']['steps']}) changes the learning rate from step {shared} "
        f"on, and {directory} holds no checkpoint of step {shared} or before; give another --workdir, or the config it "
        "was made with. A run keeps such a checkpoint with optim.schedule=wsd, or at multiples of train.keep_every")
  if differing:
    what = ", ".join(f"{k}={after.get(k)!r} (there {before.get(k)!r})" for k in differing[:3])
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    raise ValueError(f"{directory} holds a checkpoint of another config: {what}{more}; "
                     "give another --workdir, or the config it was made with")
  if config.train.steps < step:
    raise ValueError(f"train.steps={config.train.steps} but {directory} is at step {step}; "
                     f"use at least {step} steps, or another --workdir")


def find_start(old: dict[str, Any], step: int, saved: Collection[int], config: config_lib.Config) -> int | None:
  """Returns the newest step that a config can go on from, as to its learning rates; None if there is none.

  Args:
    old: config of the newest checkpoint, as a dictionary.
    step: step of that checkpoint.
    saved: steps of all checkpoints.
    config: the config that shall continue it.
  """
  if old["train"]["steps"] == config.train.steps:
    return step
  shared = _shared_steps(old, config)
  if step <= shared:
    return step
  if config.train.steps < old["train"]["steps"]:
    return None
  return max((other for other in saved if other <= shared), default=None)


def _shared_steps(old: dict[str, Any], config: config_lib.Config) -> int:
  return min(map(config.optim.shared_steps, (old["train"]["steps"], config.train.steps)))


def _flatten(fields: Any, prefix: str = "") -> dict[str, Any]:
  """Turns {"a": {"b": 1}} into {"a.b": 1}, and tuples into lists as in JSON."""
  if not isinstance(fields, dict):
    return {prefix: list(fields) if isinstance(fields, tuple) else fields}
  return {k: v for name, value in fields.items()
          for k, v in _flatten(value, f"{prefix}.{name}" if prefix else name).items()}
