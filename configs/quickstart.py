"""A Mixture-of-Recursions on the shipped State of the Union addresses.

MoR with 3 recursions, expert-choice: D=192, 5 unrolled layers (1 + 3 * 1 + 1),
1.2M parameters besides the embedding's 0.8M, a BPE of 4096 entries trained at
first run, 800 batches of 4 x 256 tokens.

Hardware: 2 CPU cores. Time: about 5 minutes, within the ten that
`launch/quickstart.sh` may take with everything it installs.
Expected: held-out causal bits per byte <= 1.75, equal to oracle routing's to
0.001 (gzip -9 of the same text: 2.69, xz -9: 2.20).

python -m mor.main --config=quickstart --workdir=WORKDIR
"""

import ml_collections

from mor import config as config_lib


def get_config() -> ml_collections.ConfigDict:
  config = config_lib.default()
  config.model.update(vocab_size=4096, d_model=192, num_heads=6, num_kv_heads=2, head_dim=32,
                      d_ff=512, num_layers=5, sharing="middle_cycle", num_recursions=3,
                      scan_layers=False)
  config.model.router.update(name="expert_choice", sampling="aux_loss", sampling_coef=0.001)
  config.data.update(source="sotu", tokenizer="bpe:4096", seq_len=256, batch_size=4)
  config.optim.update(learning_rate=3e-3, warmup_steps=20)
  config.train.update(steps=800, eval_every=200, checkpoint_every=200, eval_rows=64)
  return config
