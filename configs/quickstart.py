"""A Mixture-of-Recursions on the shipped State of the Union addresses.

MoR with 3 recursions, expert-choice: D=192, 8 unrolled layers (1 + 3 * 2 + 1),
1.6M parameters besides the embedding's 0.8M, a BPE of 4096 entries trained
at first run, batches of 8 x 256 tokens.

Hardware: 2 CPU cores. Time: a few minutes, within `launch/quickstart.sh`'s ten.
Expected: held-out causal bits per byte <= 2.0 (gzip -9: 2.65, xz -9: 1.84).

python -m mor.main --config=configs/quickstart.py --workdir=WORKDIR
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  config = base.get_config()
  config.model.update(vocab_size=4096, d_model=192, num_heads=6, num_kv_heads=2, head_dim=32,
                      d_ff=512, num_layers=8, sharing="middle_cycle", num_recursions=3)
  config.model.router.update(name="expert_choice", sampling="aux_loss", sampling_coef=0.001)
  config.data.update(source="sotu", tokenizer="bpe:4096", seq_len=256, batch_size=8)
  config.optim.update(learning_rate=3e-3, warmup_steps=20)
  config.train.update(steps=400, eval_every=200, checkpoint_every=200, eval_rows=64)
  return config
