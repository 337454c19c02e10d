"""The knobs of a model: router, low-rank deltas, and the decoder itself; see `config.py`."""

import dataclasses
from typing import Literal

from mor import fields

Sharing = Literal["vanilla", "cycle", "sequence", "middle_cycle", "middle_sequence"]

_require = fields.require


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """How a token's recursion depth is chosen (MoR paper §2.2)."""

  name: Literal["fixed", "expert_choice", "token_choice"]
  # Score network: linear D->1 (or R), mlp D->2D->1, wide_mlp D->4D->1, or
  # random scores (no parameters; the paper's ablation baseline).
  arch: Literal["linear", "mlp", "wide_mlp", "random"]
  activation: Literal["sigmoid", "tanh", "none", "softmax"]
  alpha: float  # factor on the activated score
  temperature: float  # the router reads h / temperature
  # Fraction of the sequence processed by each step; () means (R-r)/R. With
  # token-choice it is the gather buffer, not a limit: overflow runs masked.
  capacity: tuple[float, ...]
  capacity_warmup_steps: int  # cosine from 1 to `capacity`; 0 is off
  # expert-choice: x + g*y ("weighted") or x + y ("additive").
  # token-choice: only the exit is gated ("weighted", official code), every
  # step is gated ("every_step", paper eq. 2.2), or no gate ("additive").
  # Both: x + g*(y - x) ("residual"), at token-choice's exit from the entrance's
  # x; with g near 1 it leaves a pretrained model as it is.
  gating: Literal["weighted", "additive", "every_step", "residual"]
  # What makes expert-choice causal at inference: a BCE on the router's own
  # logits, a second router on detached states, or nothing.
  sampling: Literal["aux_loss", "aux_router", "none"]
  sampling_coef: float
  aux_router_lr_multiplier: float
  z_loss_coef: float
  balancing: Literal["none", "loss", "loss_free"]  # token-choice
  balance_coef: float
  bias_update_rate: float  # u of loss-free balancing, per optimizer step
  balance_warmup_steps: int  # every token goes to depth R until then

  def __post_init__(self):
    expert = self.name == "expert_choice"
    token = self.name == "token_choice"
    if expert:
      _require(self.activation != "softmax", f"router.activation={self.activation!r} with expert_choice",
               "use 'sigmoid', 'tanh' or 'none'")
      _require(self.gating != "every_step", f"router.gating={self.gating!r} with expert_choice",
               "use 'weighted', 'additive' or 'residual'")
      _require(self.balancing == "none", f"router.balancing={self.balancing!r} with expert_choice",
               "its load is fixed by capacity; use 'none'")
    if token:
      _require(self.activation in ("softmax", "sigmoid"), f"router.activation={self.activation!r} with token_choice",
               "use 'softmax' or 'sigmoid'")
      _require(self.sampling == "none", f"router.sampling={self.sampling!r} with token_choice",
               "it is causal already; use 'none'")
      _require(self.capacity_warmup_steps == 0,
               f"router.capacity_warmup_steps={self.capacity_warmup_steps} with token_choice",
               "its capacity is only a buffer; use 0")
    if self.arch == "random":
      _require(self.sampling == "none", f"router.sampling={self.sampling!r} with arch 'random'",
               "random scores cannot be predicted; use 'none'")
      _require(self.balancing == "none", f"router.balancing={self.balancing!r} with arch 'random'", "use 'none'")
    _require(self.temperature > 0, f"router.temperature={self.temperature}", "use a value > 0")
    _require(all(0 < c <= 1 for c in self.capacity), f"router.capacity={self.capacity}", "use fractions in (0, 1]")
    _require(all(a >= b for a, b in zip(self.capacity, self.capacity[1:])), f"router.capacity={self.capacity}",
             "a step can only keep tokens of the step before: use a non-increasing list")
    for field in ("sampling_coef", "z_loss_coef", "balance_coef", "bias_update_rate", "aux_router_lr_multiplier",
                  "capacity_warmup_steps", "balance_warmup_steps"):
      _require(getattr(self, field) >= 0, f"router.{field}={getattr(self, field)}", "use a value >= 0")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Rank of each projection's low-rank delta, one a step; 0 has none (RRT §3.1)."""

  q: int
  k: int
  v: int
  o: int
  gate: int
  up: int
  down: int

  def __post_init__(self):
    for name, rank in dataclasses.asdict(self).items():
      _require(rank >= 0, f"model.lora.{name}={rank}", "use a rank >= 0")

  @property
  def ranks(self) -> dict[str, int]:
    """Those above 0, by projection."""
    return {name: rank for name, rank in dataclasses.asdict(self).items() if rank}


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
  """Llama 3's scaling of the rotary frequencies, for contexts longer than it was trained on.

  A frequency that turns fewer than `low_freq_factor` times in `original_context` is
  divided by `factor`, one of more than `high_freq_factor` turns stays, and those
  between go from one to the other.
  """

  factor: float  # 1 is no scaling
  low_freq_factor: float  # turns
  high_freq_factor: float  # turns
  original_context: int  # positions

  def __post_init__(self):
    _require(self.factor >= 1, f"model.rope_scaling.factor={self.factor}", "use a factor >= 1")
    _require(0 < self.low_freq_factor < self.high_freq_factor,
             f"model.rope_scaling.low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}",
             "use 0 < low < high")
    _require(self.original_context >= 1, f"model.rope_scaling.original_context={self.original_context}",
             "use a number of positions")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Llama-style decoder whose middle is a shared stack run R times."""

  vocab_size: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  d_ff: int
  num_layers: int  # unrolled layers, prelude and coda included
  sharing: Sharing
  num_recursions: int  # R
  kv_plan: Literal["recursion_wise", "shared", "hybrid"]
  execution: Literal["gathered", "masked"]
  # Where scores are computed: splash (TPU; on a CPU interpreted, for tests), cudnn
  # (GPU, bfloat16), or xla. "auto" is the device's, where it fits: `model/kernels.py`.
  attention: Literal["auto", "xla", "splash", "cudnn"]
  rope_theta: float
  rope_scaling: RopeScalingConfig
  norm_eps: float
  init_std: float
  tie_embeddings: bool  # the output head is the embedding
  cross_documents: bool  # True: packed documents attend to each other (paper)
  compute_dtype: Literal["float32", "bfloat16"]  # parameters stay float32
  remat: Literal["none", "dots", "full"]  # what the backward pass recomputes
  scan_layers: bool  # False unrolls the stack: slower compile, same numbers
  lora: LoraConfig  # what each step adds to the shared projections
  router: RouterConfig

  def __post_init__(self):
    for field in ("vocab_size", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "num_layers",
                  "num_recursions"):
      _require(getattr(self, field) >= 1, f"model.{field}={getattr(self, field)}", "use a value >= 1")
    _require(self.num_heads % self.num_kv_heads == 0,
             f"model.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
             f"use num_kv_heads in {[k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]}")
    _require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim} is odd", "rotary embedding needs an even width")
    edge = 2 if self.sharing.startswith("middle") else 0
    inner, r = self.num_layers - edge, self.num_recursions
    if self.sharing == "vanilla":
      _require(r == 1, f"model.num_recursions={r} with sharing 'vanilla'", "use 1, or a sharing scheme")
    else:
      low = max(1, inner // r) * r + edge
      _require(inner >= r and inner % r == 0,
               f"model.num_layers={self.num_layers} does not fit {self.sharing} with {r} recursions",
               f"use {low} or {low + r} layers ({edge} unshared + a multiple of {r})")
    if self.router.capacity:
      _require(len(self.router.capacity) == r,
               f"router.capacity={self.router.capacity} has {len(self.router.capacity)} entries for "
               f"{r} recursions", f"give {r} fractions, or () for (R-r)/R")
    for field in ("rope_theta", "norm_eps", "init_std"):
      _require(getattr(self, field) > 0, f"model.{field}={getattr(self, field)}", "use a value > 0")
    for name, rank in self.lora.ranks.items():
      full = min(self.projections[name])
      _require(rank <= full, f"model.lora.{name}={rank} exceeds the projection's rank", f"use at most {full}")
    _require(not (self.lora.ranks and self.sharing == "vanilla"),
             f"model.lora={self.lora.ranks} with sharing 'vanilla'", "nothing is shared there; use ranks of 0")
    routed = self.router.name != "fixed"
    if routed and self.kv_plan != "recursion_wise":
      _require(self.sharing in ("vanilla", "cycle", "middle_cycle"),
               f"model.kv_plan={self.kv_plan!r} with sharing={self.sharing!r} and a router",
               "later steps must find every layer's keys in step 0; use 'cycle' or 'middle_cycle'")

  @property
  def projections(self) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each projection of a layer, heads flattened."""
    d, f = self.d_model, self.d_ff
    queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
    return dict(q=(d, queries), k=(d, keys), v=(d, keys), o=(queries, d), gate=(d, f), up=(d, f), down=(f, d))

  @property
  def boundaries(self) -> tuple[int, ...]:
    """Unrolled layers after each recursion step but the last."""
    edge = 1 if self.sharing.startswith("middle") else 0
    depth = (self.num_layers - 2 * edge) // self.num_recursions
    return tuple(edge + r * depth for r in range(1, self.num_recursions))

  @property
  def capacity(self) -> tuple[float, ...]:
    """Fraction of the sequence each step may process (§2.2.1: (R-r)/R)."""
    r = self.num_recursions
    if self.router.name == "fixed":
      return (1.0,) * r
    return self.router.capacity or tuple((r - i) / r for i in range(r))
