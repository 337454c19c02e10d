"""The study of `study_cpu.py` at 135M scale on one GPU, on all of the books.

D=576, 32 unrolled layers (1 + 30 + 1, so that R = 2 and R = 3 both fit), bf16,
BPE of 32768 entries, batches of 64 x 1024 tokens, micro-batches of 16 rows.

Hardware: one GPU of 40 GB or more. Time (an estimate, not measured): the
reference costs 0.85 GFLOP a token in training, so 4000 steps (262M tokens, about
2.8 epochs) are 2.2e17 FLOPs: 15 to 20 minutes on an H100 or H200 at 20 % of
its peak. Eight members with cooldown branches and evaluations: about 3 hours.

python -m mor.main --mode=study --config=study_gpu --workdir=runs/study_gpu
"""

from typing import Any

import ml_collections

from mor import config as config_lib
from mor import experiments


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.model.update(vocab_size=32768, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, d_ff=1536,
                      num_layers=32, compute_dtype="bfloat16", remat="dots")
  experiments.use_books(config, max_bytes=0)
  config.data.update(tokenizer="bpe:32768", seq_len=1024, batch_size=64)
  config.optim.update(learning_rate=3e-3, schedule="wsd", warmup_steps=200, cooldown_fraction=0.2)
  config.train.update(steps=4000, accumulation=4, loss_block=8192, log_every=20, eval_every=400, eval_rows=128,
                      checkpoint_every=1000, sample_prompt="")
  return config


def get_study() -> dict[str, Any]:
  return dict(reference="vanilla", members=experiments.study_members(num_layers=32, unique_layers=12), seeds=(0,),
              final_rows=0, text_rows=0, blimp_pairs=1000, **experiments.held_out_sets())
