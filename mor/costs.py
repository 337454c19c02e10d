"""What a model costs: parameters, key/value bytes and FLOPs, counted from the tables the model runs.

A cached key/value pair takes 2 * K * H numbers in every slot of its KV plan:

  recursion_wise  a slot a (step, layer), holding the tokens that step processes
  shared          a slot a layer of the stack, written for all tokens by its first use
  hybrid          the shared slots, and an own slot for the tokens of each later step

With balanced capacity (R-r)/R the recursion part of recursion_wise is therefore
(R+1)/2R of the same model without a router, and that of shared is 1/R.

A matrix of P entries costs 2 P FLOPs a token, causal attention 2 T N H a layer and
token (scores and values, each 2 T N H, of which the causal half is kept). Norms,
softmax, rotary embedding and element-wise work are left out. A layer of a step
that processes the fraction q of the sequence costs

  q * (2 P_query_output + 2 P_ffw)          queries, output and feed-forward
  q * 2 P_key_value                         where the KV plan gives it a slot
  q * s * 2 T N H                           s = q: own keys; s = 1: all earlier tokens'

`shared` projects no keys after the first step and its queries see every earlier
token; `hybrid` projects those of its own tokens and sees every earlier token.
Routers score all tokens at every step, as the model does. Masks of packed
documents save nothing here. `executed=True` counts what the compiled model runs
instead: the whole attention square, and the widths of gathered or masked execution.

The paper trains at equal forward FLOPs without the output head, but its absolute
count is not published: 16.5e18 lies between our count of its vanilla 360M run
without the head and with it. So a budget is read on the scale on which that run,
9438 steps of 1024 rows of 2048 tokens, is 16.5e18:

  steps = 9438 * (budget / 16.5e18) * FLOPs(vanilla 360M) / FLOPs(model)

This gives the published 12619, 14161 and 14216 steps of MoR-2, 3 and 4 to 0.4 %.

Source: Kaplan et al. 2020, §2.1; MoR paper Table 2 and App. D; official configs of
the 360M models.
"""

import dataclasses
from typing import Any

from mor import config as config_lib
from mor import parameters
from mor.model import depths
from mor.model import schedule as schedule_lib
from mor.model.kv import plans
from mor.model.routers import table as router_table

PAPER_SEQ_LEN = 2048  # tokens; a step is 1024 rows of it
PAPER_BUDGET = 16.5e18  # FLOPs
PAPER_VANILLA_360M_STEPS = 9438


_USES = {"query_output": ("q", "o"), "key_value": ("k", "v"), "ffw": ("gate", "up", "down")}  # use -> projections


def layer_parameters(model: config_lib.ModelConfig) -> dict[str, int]:
  """Returns the matrix entries of one layer by use; the norms come on top."""
  return {use: sum(row.size(model) for row in parameters.PROJECTIONS if row.name in names)
          for use, names in _USES.items()}


def router_parameters(model: config_lib.ModelConfig) -> int:
  """Returns the matrix entries of all routers; each is applied to every token once.

  State that no gradient reaches, such as a bias, is not counted.
  """
  return sum(row.size(model) for row in router_table.make(model).parameters if row.collection == "params")


def parameter_count(model: config_lib.ModelConfig) -> tuple[int, int]:
  """Returns (embedding, everything else), each stored parameter once.

  A head of its own counts with the embedding. The rest includes norms and routers,
  which are under 0.1 % of the paper's models with linear routers.
  """
  schedule = schedule_lib.make(model)
  layer = sum(row.size(model) for row in parameters.layer(model))
  tables = sum(row.size(model) for row in parameters.top(model) if "vocab" in row.axes)
  norm = sum(row.size(model) for row in parameters.top(model)) - tables
  return tables, schedule.num_unique * layer + norm + router_parameters(model) + lora_parameters(model)


def lora_parameters(model: config_lib.ModelConfig) -> int:
  """Returns the entries of all steps' low-rank deltas."""
  schedule = schedule_lib.make(model)
  return schedule.num_steps * schedule.depth * sum(lora_ranked(model).values())


def lora_ranked(model: config_lib.ModelConfig) -> dict[str, int]:
  """Returns the entries of the delta of each projection of a layer, by projection."""
  ranks = model.lora.ranks
  return {row.name: ranks[row.name] * sum(row.matrix(model)) for row in parameters.PROJECTIONS if row.name in ranks}


def step_fractions(model: config_lib.ModelConfig, seq_len: int) -> tuple[float, ...]:
  """Returns the fraction of the sequence that each step is expected to process, once trained."""
  return router_table.make(model).fractions(seq_len)


def gather_fractions(model: config_lib.ModelConfig, seq_len: int) -> tuple[float, ...]:
  """Returns the fraction of the sequence each step gathers, which its router fixes in advance."""
  return tuple(width / seq_len for width in router_table.make(model).widths(seq_len))


def kv_bytes_per_token(model: config_lib.ModelConfig, seq_len: int, dtype_bytes: int) -> float:
  """Returns the bytes of cached keys and values, per token of a sequence of `seq_len` tokens."""
  schedule = schedule_lib.make(model)
  plan = plans.PLANS[model.kv_plan](schedule)
  fractions = list(step_fractions(model, seq_len))
  if plan.shares:
    fractions[0] = 1.0  # the first step writes keys that later steps need
  slots = sum(fractions[l // schedule.depth] for l, own in enumerate(plan.own) if own >= 0)
  layers = schedule.prelude + slots + schedule.coda
  return layers * 2 * model.num_kv_heads * model.head_dim * dtype_bytes


def breakdown(model: config_lib.ModelConfig, seq_len: int, executed: bool = False, training: bool = False,
              differentiated: bool = False) -> dict[str, float]:
  """Returns the forward FLOPs per token by part; they add up to the whole.

  Args:
    model: config of the model.
    seq_len: tokens in a row.
    executed: True counts what is run rather than what is needed; see the module.
    training: True counts the steps as training weighs them; a soft router then runs every token.
    differentiated: True counts only the layers that the gradient passes.
  """
  matrices, deltas = layer_parameters(model), lora_ranked(model)
  schedule = schedule_lib.make(model)
  plan = plans.PLANS[model.kv_plan](schedule)
  fractions = _run_fractions(model, seq_len, plan.shares, executed, training)
  first = model.recursions_train.first_step(model.num_recursions) if differentiated else 0
  inner = []
  for l, (own, base) in enumerate(zip(plan.own, plan.base)):
    q = fractions[l // schedule.depth]
    inner.append((q, q if own >= 0 else 0.0, q if base < 0 else 1.0))
  inner = inner[first * schedule.depth:]
  layers = [(1.0, 1.0, 1.0)] * (schedule.coda if first else schedule.prelude + schedule.coda) + inner
  square = (4 if executed else 2) * seq_len * model.num_heads * model.head_dim
  queries, keys = sum(q for q, _, _ in layers), sum(k for _, k, _ in layers)
  lora = sum(entries * sum(k if name in "kv" else q for q, k, _ in inner) for name, entries in deltas.items())
  return {
      "attention_projections": 2 * (queries * matrices["query_output"] + keys * matrices["key_value"]),
      "attention": square * sum(q * s for q, _, s in layers),
      "ffw": 2 * queries * matrices["ffw"],
      "lora": 2 * lora,
      "router": 2.0 * router_parameters(model),
      "head": 2.0 * model.vocab_size * model.d_model,
  }


def forward_flops_per_token(model: config_lib.ModelConfig, seq_len: int, head: bool = True, executed: bool = False,
                            training: bool = False) -> float:
  """Returns the FLOPs of one forward pass over `seq_len` tokens, divided by `seq_len`.

  Args:
    model: config of the model.
    seq_len: tokens in a row.
    head: True counts the output matrix (the embedding look-up is free).
    executed: True counts what is run rather than what is needed; see the module.
    training: see `breakdown`.
  """
  parts = breakdown(model, seq_len, executed, training)
  return sum(v for k, v in parts.items() if head or k != "head")


def train_flops_per_token(model: config_lib.ModelConfig, seq_len: int, head: bool = True) -> float:
  """Returns the FLOPs of forward and backward pass; the backward pass costs twice the forward.

  With truncated backpropagation it passes the last steps and the coda alone. What remat
  recomputes is not counted, so utilisation figures do not reward it.
  """
  passed = breakdown(model, seq_len, training=True, differentiated=True)
  return forward_flops_per_token(model, seq_len, head, training=True) + 2 * sum(v for k, v in passed.items() if head or k != "head")


def mean_forward_flops_per_token(model: config_lib.ModelConfig, seq_len: int) -> float:
  """Returns the forward FLOPs of training, in the mean over the numbers of steps that it draws."""
  return sum(chance * forward_flops_per_token(depths.at(model, steps), seq_len, training=True)
             for steps, chance in depths.probabilities(model).items())


def _run_fractions(model: config_lib.ModelConfig, seq_len: int, shares: bool, executed: bool,
                   training: bool) -> tuple[float, ...]:
  """Returns the width of each step; a step whose keys others read runs all tokens."""
  router = router_table.make(model)
  fractions = router.train_fractions(seq_len) if training else router.fractions(seq_len)
  if executed and model.execution == "masked":
    return (1.0,) * len(fractions)
  if executed:
    fractions = gather_fractions(model, seq_len)
  return (1.0,) + fractions[1:] if shares else fractions


def report(config: config_lib.Config, budget: float | None = None) -> dict[str, Any]:
  """Returns parameters, FLOPs and KV bytes per token for `--mode=info`; with a budget, its steps.

  Non-embedding parameters include norms and routers. FLOPs and bytes are those
  of rows of `data.seq_len` tokens and of keys in the compute dtype.

  Raises:
    ValueError: the budget is not positive.
  """
  model, seq_len = config.model, config.data.seq_len
  embedding, rest = parameter_count(model)
  dtype_bytes = {"float32": 4, "bfloat16": 2}[model.compute_dtype]
  figures = {
      "params_embedding": embedding,
      "params_non_embedding": rest,
      "flops_per_token_forward": forward_flops_per_token(model, seq_len),
      "flops_per_token_forward_no_head": forward_flops_per_token(model, seq_len, head=False),
      "kv_bytes_per_token": kv_bytes_per_token(model, seq_len, dtype_bytes),
  }
  if model.recursions_train.draws or router_table.make(model).soft:
    figures["flops_per_token_forward_training"] = mean_forward_flops_per_token(model, seq_len)
  if budget is not None:
    figures["steps"] = steps_of_budget(model, budget)
  return figures


def steps_of_budget(model: config_lib.ModelConfig, budget: float) -> int:
  """Returns the steps of 1024 x 2048 tokens that a budget in the paper's FLOPs pays for."""
  if not budget > 0:
    raise ValueError(f"budget={budget:g} FLOPs; use a positive number such as 16.5e18")
  ours = forward_flops_per_token(model, PAPER_SEQ_LEN, head=False)
  vanilla = forward_flops_per_token(_vanilla_360m(model), PAPER_SEQ_LEN, head=False)
  return round(PAPER_VANILLA_360M_STEPS * budget / PAPER_BUDGET * vanilla / ours)


def _vanilla_360m(model: config_lib.ModelConfig) -> config_lib.ModelConfig:
  """Returns the paper's vanilla 360M; what does not enter its FLOPs is left as in `model`."""
  return dataclasses.replace(
      model, vocab_size=49152, d_model=960, num_heads=15, num_kv_heads=5, head_dim=64, d_ff=2560,
      num_layers=32, sharing="vanilla", num_recursions=1, kv_plan="recursion_wise",
      lora=dataclasses.replace(model.lora, **dict.fromkeys(model.lora.ranks, 0)),
      router=dataclasses.replace(model.router, name="fixed", capacity=()))
