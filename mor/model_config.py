"""Fields of a model: router, low-rank deltas, and the decoder itself; `config.py` explains rows."""

import dataclasses
from typing import Literal

from mor import fields

Sharing = Literal["vanilla", "cycle", "sequence", "middle_cycle", "middle_sequence"]

_field = fields.field
_require = fields.require


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """How a token's recursion depth is chosen (MoR paper §2.2)."""

  name: str = _field(
      "expert_choice", "who chooses a token's depth: fixed, expert_choice, token_choice, halting, or an own entry of "
      "mor/model/routers/table.py")
  arch: Literal["linear", "mlp", "wide_mlp", "random"] = _field(
      "linear", "score network: linear D->1 (or R), mlp D->2D->1, wide_mlp D->4D->1, or random scores without "
      "parameters (the paper's ablation)")
  activation: Literal["sigmoid", "tanh", "none", "softmax"] = _field("sigmoid", "activation of the scores")
  alpha: float = _field(0.1, "factor on the activated score")
  temperature: float = _field(1.0, "divisor of the hidden states that the router reads")
  capacity: tuple[float, ...] = _field(
      (), "fraction of the sequence that each step processes; () is (R-r)/R; token_choice: size of the gather "
      "buffer, beyond which a step runs masked")
  capacity_warmup_steps: int = _field(0, "optimizer steps of a cosine from 1 to capacity; 0 is off")
  gating: Literal["weighted", "additive", "every_step", "residual"] = _field(
      "weighted", "how a step's output y joins its input x with gate g; weighted: x + g*y (token_choice: at the exit "
      "only, as the official code); every_step: x + g*y at each step (token_choice, paper eq. 2.2); additive: x + y; "
      "residual: x + g*(y - x) (token_choice: at the exit, from the entrance's x), which with g near 1 keeps a "
      "pretrained model as it is")
  sampling: Literal["aux_loss", "aux_router", "none"] = _field(
      "aux_loss", "what makes expert_choice causal at inference: a BCE on the router's own logits, a second router on "
      "detached states, or nothing")
  sampling_coef: float = _field(0.001, "weight of that loss")
  aux_router_lr_multiplier: float = _field(10.0, "learning rate of the second router / learning rate")
  z_loss_coef: float = _field(0.0, "weight of the router's z-loss")
  balancing: Literal["none", "loss", "loss_free"] = _field("none", "token_choice: how the depths' load is balanced")
  balance_coef: float = _field(0.1, "weight of the balancing loss")
  bias_update_rate: float = _field(0.001, "step of loss-free balancing's bias, per optimizer step (u)")
  balance_warmup_steps: int = _field(0, "optimizer steps during which every token goes to depth R")

  halting_coef: float = _field(
      0.05, "halting: weight of the divergence of the numbers of steps from the uniform distribution", added=True)
  halting_threshold: float = _field(
      0.5, "halting: probability to have left at which a token leaves in decoding; 1 never leaves early", added=True)

  def __post_init__(self):
    _require(0 < self.halting_threshold <= 1, f"router.halting_threshold={self.halting_threshold}",
             "use a probability in (0, 1]")
    if self.arch == "random":
      _require(self.sampling == "none", f"router.sampling={self.sampling!r} with arch 'random'",
               "random scores cannot be predicted; use 'none'")
    _require(self.temperature > 0, f"router.temperature={self.temperature}", "use a value > 0")
    _require(all(0 < c <= 1 for c in self.capacity), f"router.capacity={self.capacity}", "use fractions in (0, 1]")
    _require(all(a >= b for a, b in zip(self.capacity, self.capacity[1:])), f"router.capacity={self.capacity}",
             "a step can only keep tokens of the step before: use a non-increasing list")
    for field in ("sampling_coef", "z_loss_coef", "balance_coef", "bias_update_rate", "aux_router_lr_multiplier",
                  "capacity_warmup_steps", "balance_warmup_steps", "halting_coef"):
      _require(getattr(self, field) >= 0, f"router.{field}={getattr(self, field)}", "use a value >= 0")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Rank of each projection's low-rank delta, one a step; 0 has none (RRT §3.1)."""

  q: int = _field(0, "rank of the delta of queries; 0 is off")
  k: int = _field(0, "rank of the delta of keys; 0 is off")
  v: int = _field(0, "rank of the delta of values; 0 is off")
  o: int = _field(0, "rank of the delta of attention's output; 0 is off")
  gate: int = _field(0, "rank of the delta of the feed-forward gate; 0 is off")
  up: int = _field(0, "rank of the delta of the feed-forward input; 0 is off")
  down: int = _field(0, "rank of the delta of the feed-forward output; 0 is off")

  def __post_init__(self):
    for name, rank in dataclasses.asdict(self).items():
      _require(rank >= 0, f"model.lora.{name}={rank}", "use a rank >= 0")

  @property
  def ranks(self) -> dict[str, int]:
    """Ranks above 0, by projection."""
    return {name: rank for name, rank in dataclasses.asdict(self).items() if rank}


@dataclasses.dataclass(frozen=True)
class RecursionsTrainConfig:
  """How many recursion steps an optimizer step runs: a number that is drawn for each; see `model/depths.py`."""

  distribution: Literal["fixed", "uniform", "poisson"] = _field(
      "fixed", "fixed: always num_recursions; uniform: each of values alike; poisson: 1 + Poisson(log-normal rate)")
  values: tuple[int, ...] = _field((), "uniform: numbers of steps, ascending")
  mean: float = _field(0.0, "poisson: mean number of steps, before most bounds it; 0 is num_recursions")
  sigma: float = _field(0.5, "poisson: standard deviation of the logarithm of the rate")
  most: int = _field(0, "poisson: largest number of steps; every number up to it is a compiled program")
  backprop: int = _field(0, "last steps that the gradient passes; 0 is all. What runs before them is not trained then")

  def __post_init__(self):
    where = "model.recursions_train"
    uniform, poisson = self.distribution == "uniform", self.distribution == "poisson"
    _require(bool(self.values) == uniform, f"{where}.values={self.values} with distribution {self.distribution!r}",
             "give one or more numbers of steps" if uniform else "use () or distribution 'uniform'")
    _require(list(self.values) == sorted(set(self.values)) and min(self.values, default=1) >= 1,
             f"{where}.values={self.values}", "use ascending numbers of steps, from 1")
    _require(self.most >= 1 if poisson else self.most == 0,
             f"{where}.most={self.most} with distribution {self.distribution!r}",
             "use a number of steps" if poisson else "use 0 or distribution 'poisson'")
    _require(self.mean == 0 or poisson, f"{where}.mean={self.mean} with distribution {self.distribution!r}",
             "use 0 or distribution 'poisson'")
    _require(self.sigma > 0, f"{where}.sigma={self.sigma}", "use a value > 0")
    _require(self.backprop >= 0, f"{where}.backprop={self.backprop}", "use 0 for all steps, or a number of them")

  @property
  def draws(self) -> bool:
    """Whether optimizer steps differ in their number of recursion steps."""
    return self.distribution in ("uniform", "poisson")

  def support(self, num_recursions: int) -> tuple[int, ...]:
    """Returns the numbers of steps that may be drawn, ascending."""
    if self.distribution == "poisson":
      return tuple(range(1, self.most + 1))
    return self.values or (num_recursions,)

  def first_step(self, num_recursions: int) -> int:
    """Returns the first of `num_recursions` steps that the gradient passes; what runs before it is a constant."""
    return max(0, num_recursions - self.backprop) if self.backprop else 0


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
  """Llama 3's scaling of the rotary frequencies, for contexts longer than it was trained on.

  A frequency that turns fewer than `low_freq_factor` times in `original_context` is
  divided by `factor`, one of more than `high_freq_factor` turns stays, and those
  between go from one to the other.
  """

  factor: float = _field(1.0, "divisor of low frequencies; 1 is no scaling")
  low_freq_factor: float = _field(1.0, "turns in original_context below which a frequency is divided")
  high_freq_factor: float = _field(4.0, "turns in original_context above which a frequency stays")
  original_context: int = _field(8192, "positions that the model was trained on before")

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

  vocab_size: int = _field(4096, "rows of the embedding (V)")
  d_model: int = _field(192, "width of hidden states (D)")
  num_heads: int = _field(6, "query heads (N)")
  num_kv_heads: int = _field(2, "key and value heads (K), a divisor of num_heads")
  head_dim: int = _field(32, "width of a head (H), even")
  d_ff: int = _field(512, "width of the feed-forward layer (F)")
  num_layers: int = _field(8, "unrolled layers, prelude and coda included")
  sharing: Sharing = _field(
      "middle_cycle", "which layers share parameters; middle: the first and the last layer have their own")
  num_recursions: int = _field(3, "recursion steps of the shared stack (R)")
  recursions_train: RecursionsTrainConfig = _field(RecursionsTrainConfig(), added=True)
  kv_plan: Literal["recursion_wise", "shared", "hybrid"] = _field(
      "recursion_wise", "keys that a step attends to: its own, step 0's, or step 0's with its own in their places")
  execution: Literal["gathered", "masked"] = _field("gathered", "gathered saves FLOPs; masked is the reference")
  attention: Literal["auto", "xla", "splash", "cudnn"] = _field(
      "auto", "where scores are computed: xla, splash (TPU; on a CPU interpreted, for tests), cudnn (GPU, bfloat16); "
      "auto is the device's, where it fits: model/kernels.py", added=True)
  rope_theta: float = _field(10000.0, "base of the rotary frequencies")
  rope_scaling: RopeScalingConfig = _field(RopeScalingConfig(), added=True)
  norm_eps: float = _field(1e-5, "term added to the mean square in RMSNorm")
  init_std: float = _field(0.02, "standard deviation of initial weights")
  qk_norm: bool = _field(
      False, "whether each head of queries and keys is normalised before it rotates (Qwen3)", added=True)
  tie_embeddings: bool = _field(True, "whether the output head is the embedding", added=True)
  cross_documents: bool = _field(False, "whether packed documents attend to each other (paper)")
  compute_dtype: Literal["float32", "bfloat16"] = _field("float32", "dtype of matmuls; parameters stay float32")
  remat: Literal["none", "dots", "full"] = _field("none", "what the backward pass recomputes: all but matmuls, or all")
  scan_layers: bool = _field(True, "False unrolls the stack: slower to compile, same numbers")
  lora: LoraConfig = _field(LoraConfig(), added=True)
  router: RouterConfig = RouterConfig()

  def __post_init__(self):
    for field in ("vocab_size", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "num_layers",
                  "num_recursions"):
      _require(getattr(self, field) >= 1, f"model.{field}={getattr(self, field)}", "use a value >= 1")
    _require(self.num_heads % self.num_kv_heads == 0,
             f"model.num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
             f"use num_kv_heads in {[k for k in range(1, min(self.num_heads, 1024) + 1) if self.num_heads % k == 0]}")
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
    train = self.recursions_train
    _require(train.distribution != "poisson" or 1 < (train.mean or r) <= train.most,
             f"model.recursions_train.mean={train.mean} with num_recursions={r}, most={train.most}",
             "use a mean above 1 and up to most; 0 is num_recursions")
    for steps in train.support(r)[:1] + train.support(r)[-1:]:
      self._check_recursions(steps)

  def _check_recursions(self, num_recursions: int) -> None:
    """Raises ValueError if the parameters are not those of a model that runs another number of steps."""
    other = num_recursions != self.num_recursions
    what = f"{num_recursions} recursion steps of a model with model.num_recursions={self.num_recursions}"
    _require(not other or self.sharing != "vanilla", f"{what} and sharing 'vanilla'", "use a sharing scheme that repeats layers")
    _require(not other or not self.lora.ranks, f"{what} and model.lora={self.lora.ranks}",
             "use ranks of 0: each trained step has deltas of its own, and another step has none")

  def at_recursions(self, num_recursions: int) -> "ModelConfig":
    """Returns the model of the same parameters that always runs this number of recursion steps.

    Raises:
      ValueError: the model has parameters of its own for each step, or repeats no layers.
    """
    _require(num_recursions >= 1, f"{num_recursions} recursion steps", "use a number >= 1")
    self._check_recursions(num_recursions)
    edge = 2 if self.sharing.startswith("middle") else 0
    layers = (self.num_layers - edge) // self.num_recursions
    router = self.router if num_recursions == self.num_recursions else dataclasses.replace(self.router, capacity=())
    train = RecursionsTrainConfig(backprop=self.recursions_train.backprop)
    return dataclasses.replace(
        self, num_recursions=num_recursions, num_layers=edge + layers * num_recursions, router=router,
        recursions_train=train)

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
    return self.router.capacity or tuple((r - i) / r for i in range(r))
