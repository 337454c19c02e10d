"""Parameters and key/value bytes, counted from the tables the model runs.

A cached key/value pair takes 2 * K * H numbers in every slot of its KV plan:

  recursion_wise  a slot a (step, layer), holding the tokens that step processes
  shared          a slot a layer of the stack, written for all tokens by its first use
  hybrid          the shared slots, and an own slot for the tokens of each later step

With balanced capacity (R-r)/R the recursion part of recursion_wise is therefore
(R+1)/2R of the same model without a router, and that of shared is 1/R.

Source: MoR paper Table 2.
"""

from mor import config as config_lib
from mor.model import schedule as schedule_lib
from mor.model.kv import plans as kv_plans
from mor.model.routers import scores
from mor.model.routers import table as router_table


def layer_parameters(model: config_lib.ModelConfig) -> dict[str, int]:
  """Matrix entries of one layer by use; the norms' 2 * D come on top."""
  return {
      "query_output": 2 * model.d_model * model.num_heads * model.head_dim,
      "key_value": 2 * model.d_model * model.num_kv_heads * model.head_dim,
      "ffw": 3 * model.d_model * model.d_ff,
  }


def router_parameters(model: config_lib.ModelConfig) -> int:
  """Matrix entries of all routers; each is applied to every token once.

  Expert-choice has one router of one output a step, token-choice one router of
  R outputs; an auxiliary router doubles them. The loss-free bias is not counted:
  no gradient reaches it.
  """
  if model.router.name == "fixed" or model.router.arch == "random":
    return 0
  expert = model.router.name == "expert_choice"
  count, outputs = (model.num_recursions, 1) if expert else (1, model.num_recursions)
  hidden = scores.WIDTHS.get(model.router.arch, 0) * model.d_model
  one = hidden * (model.d_model + outputs) if hidden else model.d_model * outputs
  return count * one * (2 if model.router.sampling == "aux_router" else 1)


def parameter_count(model: config_lib.ModelConfig) -> tuple[int, int]:
  """(embedding, everything else), each stored parameter once.

  A head of its own counts with the embedding. The rest includes norms and routers,
  which are under 0.1 % of the paper's models with linear routers.
  """
  schedule = schedule_lib.make(model)
  layer = sum(layer_parameters(model).values()) + 2 * model.d_model
  rest = schedule.num_unique * layer + model.d_model + router_parameters(model) + lora_parameters(model)
  return model.vocab_size * model.d_model * (1 if model.tie_embeddings else 2), rest


def lora_parameters(model: config_lib.ModelConfig) -> int:
  """Entries of all steps' low-rank deltas."""
  schedule = schedule_lib.make(model)
  return schedule.num_steps * schedule.depth * sum(lora_ranked(model).values())


def lora_ranked(model: config_lib.ModelConfig) -> dict[str, int]:
  """Entries of the delta of each projection of a layer, by projection."""
  widths = model.projections
  return {name: rank * sum(widths[name]) for name, rank in model.lora.ranks.items()}


def step_fractions(model: config_lib.ModelConfig, seq_len: int) -> tuple[float, ...]:
  """Fraction of the sequence each step processes: max(1, int(capacity * T)) / T.

  Token-choice has no capacity but a buffer; the balanced load (R-r)/R stands in
  for it, towards which its balancing pushes. Capacity warm-up is left out.
  """
  if model.router.name == "token_choice":
    r = model.num_recursions
    return tuple((r - step) / r for step in range(r))
  return gather_fractions(model, seq_len)


def gather_fractions(model: config_lib.ModelConfig, seq_len: int) -> tuple[float, ...]:
  """Fraction of the sequence each step gathers, which its router fixes in advance."""
  router = router_table.ROUTERS[model.router.name](model)
  return tuple(width / seq_len for width in router.widths(seq_len))


def kv_bytes_per_token(model: config_lib.ModelConfig, seq_len: int, dtype_bytes: int) -> float:
  """Bytes of cached keys and values, per token of a sequence of `seq_len` tokens."""
  schedule = schedule_lib.make(model)
  plan = kv_plans.PLANS[model.kv_plan](schedule)
  fractions = list(step_fractions(model, seq_len))
  if plan.shares:
    fractions[0] = 1.0  # the first step writes keys that later steps need
  slots = sum(fractions[l // schedule.depth] for l, own in enumerate(plan.own) if own >= 0)
  layers = schedule.prelude + slots + schedule.coda
  return layers * 2 * model.num_kv_heads * model.head_dim * dtype_bytes
