"""A first study on two cores: eight models of depth 8 on books, at equal FLOPs.

`train.steps` are those of the reference member; every other member trains as
many as the same forward FLOPs pay for. `get_study` lists the members as fields
that differ from `get_config`. Texts are looked for in $MOR_DATA (default
../shared/data); without the books the shipped addresses are used.

Hardware: 2 CPU cores. Time: about 35 minutes. Expected: see the committed table.

python -m mor.main --mode=study --config=configs/study_cpu.py --workdir=runs/study_cpu
"""

import os
from typing import Any

import ml_collections

from mor import config as config_lib

DATA = os.environ.get("MOR_DATA", "../shared/data")
FIXED = dict(name="fixed", sampling="none")


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.model.update(vocab_size=4096, d_model=192, num_heads=6, num_kv_heads=2, head_dim=32, d_ff=512, num_layers=8)
  use_books(config, max_bytes=20_000_000)
  config.data.update(tokenizer="bpe:4096", seq_len=256, batch_size=8)
  config.optim.update(learning_rate=3e-3, schedule="wsd", warmup_steps=20, cooldown_fraction=0.2)
  config.train.update(steps=208, log_every=10, eval_every=26, eval_rows=32, sample_prompt="")
  return config


def get_study() -> dict[str, Any]:
  return dict(reference="vanilla", members=members(num_layers=8, unique_layers=4), seeds=(0,), final_rows=256,
              text_rows=128, blimp_pairs=20, **held_out_sets())


def use_books(config: ml_collections.ConfigDict, max_bytes: int) -> None:
  """Trains on the books where they are, else on the shipped corpus."""
  if os.path.exists(f"{DATA}/books/val.jsonl.xz"):
    config.data.update(source=f"{DATA}/books/train-*.jsonl.xz", validation_source=f"{DATA}/books/val.jsonl.xz",
                       max_bytes=max_bytes)


def held_out_sets() -> dict[str, Any]:
  """Other texts and minimal pairs; a missing one is named in the result."""
  return dict(texts={"wikitext_2": f"{DATA}/wikitext-2/test.txt"}, blimp=f"{DATA}/blimp/blimp.jsonl.gz")


def members(num_layers: int, unique_layers: int) -> list[dict[str, Any]]:
  """The models compared; `unique_layers` are those that a model with R = 3 stores."""
  recursive = lambda r, **fields: dict(model=dict(sharing="middle_cycle", num_recursions=r, **fields))
  vanilla = lambda layers: dict(model=dict(sharing="vanilla", num_recursions=1, num_layers=layers, router=FIXED))
  expert = dict(name="expert_choice", sampling="aux_loss", sampling_coef=0.001, alpha=0.1)
  token = dict(name="token_choice", activation="softmax", alpha=1.0, sampling="none", balancing="loss",
               balance_coef=0.1, capacity=(1.0, 1.0, 0.5))  # the buffer is 1.5 times the balanced load
  rows = [
      ("vanilla", "vanilla, same depth", vanilla(num_layers)),
      ("vanilla_small", "vanilla, same parameters as R=3", vanilla(unique_layers)),
      ("recursive_r2", "recursive R=2", recursive(2, router=FIXED)),
      ("recursive_r3", "recursive R=3", recursive(3, router=FIXED)),
      ("mor_expert_r2", "MoR expert R=2", recursive(2, router=expert)),
      ("mor_expert_r3", "MoR expert R=3", recursive(3, router=expert)),
      ("mor_token_r3", "MoR token R=3", recursive(3, router=token)),
      ("mor_shared_r3", "MoR expert R=3, shared KV", recursive(3, router=expert, kv_plan="shared")),
  ]
  return [dict(name=name, label=label, overrides=overrides) for name, label, overrides in rows]
