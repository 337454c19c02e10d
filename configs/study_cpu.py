"""A first study on two cores: eight models of depth 8 on books, at equal FLOPs.

`train.steps` are those of the reference member; every other member trains as
many as the same forward FLOPs pay for. `get_study` lists the members as fields
that differ from `get_config`. Texts are looked for in $MOR_DATA (default
../shared/data); without the books the shipped addresses are used.

Hardware: 2 CPU cores. Time: about 35 minutes. Expected: see the committed table.

python -m mor.main --mode=study --config=study_cpu --workdir=runs/study_cpu
"""

from typing import Any

import ml_collections

from mor import config as config_lib
from mor import experiments


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.model.update(vocab_size=4096, d_model=192, num_heads=6, num_kv_heads=2, head_dim=32, d_ff=512, num_layers=8)
  experiments.use_books(config, max_bytes=20_000_000)
  config.data.update(tokenizer="bpe:4096", seq_len=256, batch_size=8)
  config.optim.update(learning_rate=3e-3, schedule="wsd", warmup_steps=20, cooldown_fraction=0.2)
  config.train.update(steps=208, log_every=10, eval_every=26, eval_rows=32, sample_prompt="")
  return config


def get_study() -> dict[str, Any]:
  return dict(reference="vanilla", members=experiments.study_members(num_layers=8, unique_layers=4), seeds=(0,),
              final_rows=256, text_rows=128, blimp_pairs=20, **experiments.held_out_sets())
