"""A tiny experiment for tests: every size distinct, so a swapped axis fails.

  config = tiny.config(model=dict(kv_plan="shared", router=tiny.TOKEN_CHOICE))
  batch = tiny.batch(config, step=3)
"""

from collections.abc import Iterable
import copy
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest

from mor import config as config_lib
from mor.model.routers import table as router_table

def router(name: str, **fields: Any) -> dict[str, Any]:
  """Returns the fields of a router of the table as the router says, and `fields`."""
  return {"name": name, **router_table.ROUTERS[name].test_config, **fields}


TOKEN_CHOICE, FIXED = router("token_choice"), router("fixed")
VANILLA = dict(sharing="vanilla", num_recursions=1, router=FIXED)

# Bytes plus special tokens fit in this vocabulary; model.vocab_size=61 does not
# hold them, so runs on real text merge this in.
BYTES = dict(model=dict(vocab_size=263), data=dict(tokenizer="bytes"))

_TINY = dict(
    model=dict(vocab_size=61, d_model=20, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=28, num_layers=8,
               sharing="middle_cycle", num_recursions=3),
    data=dict(seq_len=12, batch_size=4, validation_fraction=0.2),
    optim=dict(learning_rate=1e-2, warmup_steps=2),
    train=dict(steps=5, loss_block=16, log_every=1, eval_every=3, eval_rows=7, checkpoint_every=2, sample_prompt="An",
               sample_tokens=5),
    mesh=dict(data=1, fsdp=1, tensor=1, sequence=1),
)


def config(*groups: dict[str, Any], **overrides: Any) -> config_lib.Config:
  """The tiny config, with nested dictionaries of fields merged over it."""
  fields = copy.deepcopy(config_lib.default().to_dict())
  for group in (_TINY, *groups, overrides):
    _merge(fields, group)
  made = config_lib.from_dict(fields)
  router_table.make(made.model)  # refuses what the router refuses, as each entrance does
  return made


def batch(config: config_lib.Config, step: int = 0) -> dict[str, np.ndarray]:
  """A random batch; row 0 is one document, the others two and some padding."""
  b, t, v = config.data.batch_size, config.data.seq_len, config.model.vocab_size
  rng = np.random.default_rng(step)
  tokens_BT = rng.integers(0, v, (b, t), dtype=np.int32)
  target_BT = rng.integers(0, v, (b, t), dtype=np.int32)
  segment_BT = np.ones((b, t), np.int32)
  for row in range(1, b):
    segment_BT[row, t // 3 + row % 3:] = 2
    segment_BT[row, t - row % 4:] = 0 if row % 4 else 2
  return dict(tokens_BT=tokens_BT, target_BT=target_BT, segment_BT=segment_BT, loss_mask_BT=segment_BT > 0)


def crossed(*tables: Iterable[str]) -> list[Any]:
  """Every combination of the tables' entries; all but a Latin square of them are slow.

  The square has the side of the second longest table, so every entry of every table is in it.
  """
  combinations = list(itertools.product(*(enumerate(table) for table in tables)))
  side = sorted(len(set(column)) for column in zip(*combinations))[-2]
  quick = lambda combination: sum(index for index, _ in combination) % side == 0
  return [pytest.param(*(entry for _, entry in combination), marks=() if quick(combination) else pytest.mark.slow)
          for combination in combinations]


def write_text(directory: pathlib.Path, documents: int = 40) -> str:
  """Writes a .jsonl of short documents; returns its path for data.source."""
  words = "the state of a union is what we make and what they keep of it in plain old words".split()
  rng = np.random.default_rng(0)
  path = pathlib.Path(directory) / "tiny.jsonl"
  lines = [f'{{"text": "{i} {" ".join(rng.choice(words, 6 + i % 11))}."}}' for i in range(documents)]
  path.write_text("\n".join(lines) + "\n")
  return str(path)


def _merge(fields: dict[str, Any], changes: dict[str, Any]) -> None:
  for key, value in changes.items():
    if isinstance(value, dict):
      _merge(fields[key], value)
    else:
      fields[key] = value
