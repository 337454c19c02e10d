"""The paper's models as one family: `--config=paper:MODEL-SIZE[-rR]`.

MODEL  vanilla, recursive, mor (expert-choice), mor_token (token-choice) or
       mor_share (expert-choice, recursive KV sharing)
SIZE   135m, 360m, 730m or 1.7b; R is 2, 3 (default) or 4, not given for vanilla

Hardware: 4 H100 in the paper. Time: not measured here. Expected: the paper's
validation NLL of mor-360m-r2 is 2.7511, r3 2.7925, r4 2.8204, of vanilla-360m
2.7824. Its data is not shipped: FineWeb-Edu as .jsonl.gz and the SmolLM
tokenizer (49152 entries) are yours to place at the two paths set below.

python -m mor.main --config=paper:mor-360m-r3 --workdir=WORKDIR \\
  --config.data.source='DIR/*.jsonl.gz' --config.data.tokenizer=DIR/tokenizer.json

Where the paper is silent: the learning rate and warm-up are those of 360M, and
the steps not in STEPS are what 16.5e18 FLOPs pay for by `mor/costs.py`.
"""

import re

import ml_collections

from mor import config as config_lib
from mor import costs

MODELS = ("vanilla", "recursive", "mor", "mor_token", "mor_share")
SIZES = {  # layers, d_model, num_heads, num_kv_heads, d_ff (paper Table 6)
    "135m": (30, 576, 9, 3, 1536),
    "360m": (32, 960, 15, 5, 2560),
    "730m": (26, 1536, 24, 8, 4096),
    "1.7b": (24, 2048, 32, 32, 8192),
}
STEPS = {  # published, at 16.5e18 FLOPs
    "vanilla-360m": 9438, "recursive-360m-r2": 9438, "recursive-360m-r3": 9438,
    "recursive-360m-r4": 8883, "mor-360m-r2": 12619, "mor-360m-r3": 14161, "mor-360m-r4": 14216,
    "mor_token-360m-r3": 14161, "mor_share-360m-r3": 14672, "mor-135m-r3": 36326,
}


def members() -> list[str]:
  """Full names of the family."""
  return [f"{m}-{s}" + r for m in MODELS for s in SIZES
          for r in ([""] if m == "vanilla" else ["-r2", "-r3", "-r4"])]


def get_config(name: str = "mor-360m-r3") -> ml_collections.ConfigDict:
  match = re.fullmatch(r"(\w+)-([\w.]+?)(?:-r(\d+))?", name)
  model, size, r = match.groups() if match else ("", "", None)
  full = name if model == "vanilla" or r else f"{name}-r3"
  if full not in members():
    raise ValueError(f"configs/paper.py:{name} is not in the family; use MODEL-SIZE[-rR] with "
                     f"MODEL in {', '.join(MODELS)}, SIZE in {', '.join(SIZES)}, R in 2, 3, 4 "
                     "(no R for vanilla)")
  config = config_lib.default()
  _set_model(config.model, model, size, 1 if model == "vanilla" else int(full[-1]))
  config.data.update(source="fineweb-edu-dedup/*.jsonl.gz", tokenizer="smollm-tokenizer.json",
                     seq_len=2048, batch_size=1024)
  config.train.update(accumulation=16, log_every=10, eval_every=1000, eval_rows=500,
                      checkpoint_every=1000)
  config.optim.warmup_steps = 57 if model in ("vanilla", "recursive") else 86
  config.train.steps = STEPS.get(full) or costs.steps_of_budget(
      config_lib.from_config_dict(config).model, costs.PAPER_BUDGET)
  return config


def _set_model(config: ml_collections.ConfigDict, model: str, size: str, r: int) -> None:
  layers, d_model, num_heads, num_kv_heads, d_ff = SIZES[size]
  config.update(vocab_size=49152, d_model=d_model, num_heads=num_heads, num_kv_heads=num_kv_heads,
                head_dim=64, d_ff=d_ff, num_recursions=r, cross_documents=True,
                compute_dtype="bfloat16", remat="full")
  # Every published count is the next one that leaves a multiple of R between
  # the unshared ends: 34 for 360m-r4, 32 for 135m-r3, 26 for 1.7b-r3.
  config.num_layers = layers if r == 1 else 2 + -(-(layers - 2) // r) * r
  config.sharing = "vanilla" if r == 1 else "middle_cycle"
  config.kv_plan = "shared" if model == "mor_share" else "recursion_wise"
  if model in ("vanilla", "recursive"):
    config.router.update(name="fixed", sampling="none")
  elif model == "mor_token":  # paper Table 4's chosen design, without z-loss
    config.router.update(name="token_choice", activation="softmax", alpha=1.0, sampling="none",
                         balancing="loss", balance_coef=0.1)
    config.router.capacity = tuple(min(1.0, 1.5 * (r - i) / r) for i in range(r))  # room to spare
