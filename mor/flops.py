"""FLOPs per token, counted from the tables the model runs.

A matrix of P entries costs 2 P a token, causal attention 2 T N H a layer and
token (scores and values, each 2 T N H, of which the causal half is kept). Norms,
softmax, rotary embedding and element-wise work are left out. A layer of a step
that processes the fraction q of the sequence costs

  q * (2 P_query_output + 2 P_ffw)          queries, output and feed-forward
  q * 2 P_key_value                         where the KV plan gives it a slot
  q * s * 2 T N H                           s = q: own keys; s = 1: all earlier tokens'

`shared` projects no keys after the first step and its queries see every earlier
token; `hybrid` projects those of its own tokens and sees every earlier token.
Routers score all tokens at every step, as the model does. Masks of packed
documents save nothing here.

`executed=True` counts what the compiled model runs instead: the whole attention
square, and the widths of gathered or masked execution.

Source: Kaplan et al. 2020, §2.1; MoR paper App. D and Table 2.
"""

from mor import config as config_lib
from mor import memory
from mor.model import schedule as schedule_lib
from mor.model.kv import plans


def breakdown(
    model: config_lib.ModelConfig, seq_len: int, executed: bool = False
) -> dict[str, float]:
  """Forward FLOPs per token by part; they add up to the whole."""
  matrices, deltas = memory.layer_parameters(model), memory.lora_ranked(model)
  schedule = schedule_lib.make(model)
  plan = plans.PLANS[model.kv_plan](schedule)
  fractions = _fractions(model, seq_len, plan.shares, executed)
  layers = [(1.0, 1.0, 1.0)] * (schedule.prelude + schedule.coda)
  for l, (own, base) in enumerate(zip(plan.own, plan.base)):
    q = fractions[l // schedule.depth]
    layers.append((q, q if own >= 0 else 0.0, q if base < 0 else 1.0))
  square = (4 if executed else 2) * seq_len * model.num_heads * model.head_dim
  queries, keys = sum(q for q, _, _ in layers), sum(k for _, k, _ in layers)
  inner = layers[schedule.prelude + schedule.coda:]
  lora = sum(entries * sum(k if name in "kv" else q for q, k, _ in inner) for name, entries in deltas.items())
  return {
      "attention_projections": 2 * (
          queries * matrices["query_output"] + keys * matrices["key_value"]),
      "attention": square * sum(q * s for q, _, s in layers),
      "ffw": 2 * queries * matrices["ffw"],
      "lora": 2 * lora,
      "router": 2.0 * memory.router_parameters(model),
      "head": 2.0 * model.vocab_size * model.d_model,
  }


def forward_flops_per_token(
    model: config_lib.ModelConfig, seq_len: int, head: bool = True, executed: bool = False
) -> float:
  """FLOPs of one forward pass over `seq_len` tokens, divided by `seq_len`.

  Args:
    model: the model.
    seq_len: tokens in a row.
    head: count the output matrix (the embedding look-up is free).
    executed: count what is run rather than what is needed; see the module.
  """
  parts = breakdown(model, seq_len, executed)
  return sum(v for k, v in parts.items() if head or k != "head")


def train_flops_per_token(
    model: config_lib.ModelConfig, seq_len: int, head: bool = True
) -> float:
  """Forward and backward; the backward pass costs twice the forward.

  What remat recomputes is not counted, so utilisation figures do not reward it.
  """
  return 3 * forward_flops_per_token(model, seq_len, head)


def _fractions(
    model: config_lib.ModelConfig, seq_len: int, shares: bool, executed: bool
) -> tuple[float, ...]:
  """Width of each step; a step whose keys others read runs all tokens."""
  fractions = memory.step_fractions(model, seq_len)
  if executed and model.execution == "masked":
    return (1.0,) * len(fractions)
  if executed:
    fractions = memory.gather_fractions(model, seq_len)
  return (1.0,) + fractions[1:] if shares else fractions
