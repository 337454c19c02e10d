"""The least that a tick or a prefill can move and compute: a roofline.

A tick of B slots at position p reads, in bfloat16,

  weights  every parameter but the embedding, once: the edges and one pass of the shared stack
  head     V D numbers
  entries  of the rows that its tokens see

Each slot is at step r with a probability in proportion to the fraction q_r of tokens
that reach it; its row of that step holds q_r p entries of its own, and p where the KV
plan gives it a base. One of sum(q) slots ends a token in a tick, and pays the edges'
entries. A prefill reads the edges once, the stack R times, and writes its entries.

The time is the larger one of bytes / bandwidth and FLOPs / peak.
"""

import dataclasses

from mor import config as config_lib
from mor import costs
from mor.aot import chips
from mor.model import schedule as schedule_lib
from mor.model.kv import plans

_BYTES = 2  # of a number in bfloat16


@dataclasses.dataclass(frozen=True)
class Ideal:
  """Bytes and FLOPs of a program that wastes nothing.

  Attributes:
    weights: bytes of the parameters that are read.
    head: bytes of the output matrix.
    entries: bytes of the keys and values that are read or written.
    flops: FLOPs of the products.
  """

  weights: float
  head: float
  entries: float
  flops: float

  @property
  def bytes(self) -> float:
    return self.weights + self.head + self.entries

  def seconds(self, chip: chips.Chip) -> float:
    """Returns the roofline's time on a chip."""
    return max(self.bytes / chip.bandwidth, self.flops / chip.flops)


def tick(model: config_lib.ModelConfig, num_slots: int, position: int) -> Ideal:
  """Returns the ideal tick of a full engine.

  Args:
    model: config of the model.
    num_slots: occupied slots.
    position: tokens that each sequence has stored.
  """
  schedule, plan = schedule_lib.make(model), plans.PLANS[model.kv_plan](schedule_lib.make(model))
  fractions = costs.step_fractions(model, position)
  mean_steps = sum(fractions)
  seen = 0.0  # entries of a slot
  for layer, (own, base) in enumerate(zip(plan.own, plan.base)):
    fraction = fractions[layer // schedule.depth]
    seen += fraction / mean_steps * position * (fraction * (own >= 0) + (base >= 0))
  edges = schedule.prelude + schedule.coda
  seen += edges * position / mean_steps
  layer, head = sum(costs.layer_parameters(model).values()), model.vocab_size * model.d_model
  stack = schedule.depth if schedule.cyclic else schedule.num_unique - edges
  products = stack * layer + (edges * layer + head) / mean_steps
  attention = 2 * model.num_heads * model.head_dim * seen
  return Ideal(_BYTES * costs.parameter_count(model)[1], _BYTES * head, num_slots * seen * _entry_bytes(model),
               2 * num_slots * (products + attention))


def prefill(model: config_lib.ModelConfig, num_prompts: int, num_tokens: int) -> Ideal:
  """Returns the ideal prefill of prompts of `num_tokens` tokens each."""
  schedule, tokens = schedule_lib.make(model), num_prompts * num_tokens
  layer = sum(costs.layer_parameters(model).values())
  layers = schedule.prelude + schedule.coda + schedule.num_steps * schedule.depth
  written = costs.kv_bytes_per_token(model, num_tokens, _BYTES) * tokens
  flops = costs.forward_flops_per_token(model, num_tokens, head=False) * tokens
  return Ideal(_BYTES * layer * layers, 0.0, written, flops)


def _entry_bytes(model: config_lib.ModelConfig) -> int:
  return 2 * model.num_kv_heads * model.head_dim * _BYTES
