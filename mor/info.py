"""What a configuration costs, as one JSON object (`--mode=info`).

The paper trains at equal forward FLOPs without the output head, but its absolute
count is not published: 16.5e18 lies between our count of its vanilla 360M run
without the head and with it. So a budget is read on the scale on which that run,
9438 steps of 1024 rows of 2048 tokens, is 16.5e18:

  steps = 9438 * (budget / 16.5e18) * FLOPs(vanilla 360M) / FLOPs(model)

This gives the published 12619, 14161 and 14216 steps of MoR-2, 3 and 4 to 0.4 %.

Source: MoR paper App. D; official configs of the 360M models.
"""

import dataclasses
from typing import Any

from mor import config as config_lib
from mor import flops
from mor import memory

PAPER_SEQ_LEN = 2048  # tokens; a step is 1024 rows of it
PAPER_BUDGET = 16.5e18  # FLOPs
PAPER_VANILLA_360M_STEPS = 9438


def info(config: config_lib.Config, budget: float | None = None) -> dict[str, Any]:
  """Parameters, FLOPs and KV bytes per token; with a budget, its steps.

  Non-embedding parameters include norms and routers. FLOPs and bytes are those
  of rows of `data.seq_len` tokens and of keys in the compute dtype.

  Raises:
    ValueError: the budget is not positive.
  """
  model, seq_len = config.model, config.data.seq_len
  embedding, rest = memory.parameter_count(model)
  dtype_bytes = {"float32": 4, "bfloat16": 2}[model.compute_dtype]
  report = {
      "params_embedding": embedding,
      "params_non_embedding": rest,
      "flops_per_token_forward": flops.forward_flops_per_token(model, seq_len),
      "flops_per_token_forward_no_head": flops.forward_flops_per_token(model, seq_len, head=False),
      "kv_bytes_per_token": memory.kv_bytes_per_token(model, seq_len, dtype_bytes),
  }
  if budget is not None:
    report["steps"] = steps_of_budget(model, budget)
  return report


def steps_of_budget(model: config_lib.ModelConfig, budget: float) -> int:
  """Steps of 1024 x 2048 tokens that a budget in the paper's FLOPs pays for."""
  if not budget > 0:
    raise ValueError(f"budget={budget:g} FLOPs; use a positive number such as 16.5e18")
  ours = flops.forward_flops_per_token(model, PAPER_SEQ_LEN, head=False)
  vanilla = flops.forward_flops_per_token(_vanilla_360m(model), PAPER_SEQ_LEN, head=False)
  return round(PAPER_VANILLA_360M_STEPS * budget / PAPER_BUDGET * vanilla / ours)


def _vanilla_360m(model: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """The paper's vanilla 360M; what does not enter its FLOPs is left as in `model`."""
  return dataclasses.replace(
      model, vocab_size=49152, d_model=960, num_heads=15, num_kv_heads=5, head_dim=64, d_ff=2560,
      num_layers=32, sharing="vanilla", num_recursions=1, kv_plan="recursion_wise",
      lora=dataclasses.replace(model.lora, **dict.fromkeys(model.lora.ranks, 0)),
      router=dataclasses.replace(model.router, name="fixed", capacity=()))
