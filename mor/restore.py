"""A run's newest model without its optimizer: what sampling, teaching and conversion read."""

import json
import os
from typing import Any

import jax

from mor import checkpoint
from mor import config as config_lib
from mor import paths
from mor.model import transformer


def variables(workdir: str | os.PathLike, placed: Any = None) -> tuple[config_lib.Config, int, dict[str, Any]]:
  """Config, step and variables of the newest checkpoint.

  Args:
    workdir: of the run.
    placed: from (config, shapes of the variables) to their shardings; None puts all
      on the first device.

  Raises:
    ValueError: the directory holds no checkpoint.
    OSError: the checkpoint is damaged.
  """
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    step = checkpoints.latest_step()
    if step is None:
      raise ValueError(f"{checkpoints.directory} holds no checkpoint; train first, or give the directory of a run")
    config = checkpoints.config()
    shapes = dict(jax.eval_shape(transformer.Transformer(config.model).init, jax.random.key(0),
                                 jax.ShapeDtypeStruct((1, 1), "int32")))
    if placed is None:
      shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
      shardings = placed(config, shapes)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return config, step, checkpoints.restore(target, partial=True)


def pretrained(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """What the source of a converted run said of itself (`conversion/command.py`), None of another run."""
  path = paths.directory(workdir) / "pretrained.json"
  return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
