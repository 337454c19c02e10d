"""Every knob of the project, as frozen, validated dataclasses.

`configs/*.py` build an `ml_collections.ConfigDict` (so that every field can be
overridden on the command line); `from_config_dict` turns it once into these
dataclasses. Below this file nothing has a default and nothing is looked up by
string.
"""

import dataclasses
import typing
from typing import Any, Literal

import ml_collections

Sharing = Literal["vanilla", "cycle", "sequence", "middle_cycle", "middle_sequence"]


def _require(ok: bool, what: str, remedy: str) -> None:
  if not ok:
    raise ValueError(f"{what}; {remedy}")


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
  gating: Literal["weighted", "additive", "every_step"]
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
               "use 'weighted' or 'additive'")
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
  rope_theta: float
  norm_eps: float
  init_std: float
  cross_documents: bool  # True: packed documents attend to each other (paper)
  compute_dtype: Literal["float32", "bfloat16"]  # parameters stay float32
  remat: Literal["none", "dots", "full"]  # what the backward pass recomputes
  scan_layers: bool  # False unrolls the stack: slower compile, same numbers
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
    routed = self.router.name != "fixed"
    if routed and self.kv_plan != "recursion_wise":
      _require(self.sharing in ("vanilla", "cycle", "middle_cycle"),
               f"model.kv_plan={self.kv_plan!r} with sharing={self.sharing!r} and a router",
               "later steps must find every layer's keys in step 0; use 'cycle' or 'middle_cycle'")

  @property
  def capacity(self) -> tuple[float, ...]:
    """Fraction of the sequence each step may process (§2.2.1: (R-r)/R)."""
    r = self.num_recursions
    if self.router.name == "fixed":
      return (1.0,) * r
    return self.router.capacity or tuple((r - i) / r for i in range(r))


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes batches."""

  # "sotu" (shipped), "tfds:NAME", "hf:DIR" (datasets.save_to_disk), or a path
  # or glob of .txt, .jsonl, .jsonl.gz, .jsonl.xz or .array_record files.
  source: str
  validation_source: str  # "" holds out `validation_fraction` of the documents
  text_key: str  # field that holds the text in records
  validation_fraction: float
  max_bytes: int  # read no more than this much training text; 0 reads all
  tokenizer: str  # "bytes", "bpe:SIZE" (trained at first run) or a tokenizers .json
  seq_len: int  # tokens in a row (T)
  batch_size: int  # rows in a global batch (B)
  shuffle_seed: int
  cache_dir: str  # token arrays and trained tokenizers; "" is <user cache>/mor

  def __post_init__(self):
    _require(self.seq_len >= 2, f"data.seq_len={self.seq_len}", "use at least 2 tokens")
    _require(self.batch_size >= 1, f"data.batch_size={self.batch_size}", "use at least 1 row")
    _require(0 < self.validation_fraction < 1 or bool(self.validation_source),
             f"data.validation_fraction={self.validation_fraction}", "use a fraction in (0, 1)")
    _require(self.max_bytes >= 0, f"data.max_bytes={self.max_bytes}", "use 0 for all, or a positive count")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW with clipping and a learning-rate schedule."""

  learning_rate: float  # peak
  schedule: Literal["wsd", "cosine", "constant"]
  warmup_steps: int
  cooldown_fraction: float  # wsd: last part of training, linear to the end rate
  end_ratio: float  # final rate / peak rate
  b1: float
  b2: float
  eps: float
  weight_decay: float  # on matrices only, not on norms and embeddings' scale
  clip_norm: float  # global gradient norm; 0 is off

  def __post_init__(self):
    _require(self.learning_rate > 0, f"optim.learning_rate={self.learning_rate}", "use a value > 0")
    _require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps}", "use a value >= 0")
    _require(0 <= self.cooldown_fraction <= 1, f"optim.cooldown_fraction={self.cooldown_fraction}",
             "use a fraction in [0, 1]")
    _require(0 <= self.end_ratio <= 1, f"optim.end_ratio={self.end_ratio}", "use a fraction in [0, 1]")
    _require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, f"optim.b1={self.b1}, b2={self.b2}", "use decays in [0, 1)")
    _require(self.eps > 0, f"optim.eps={self.eps}", "use a value > 0")
    _require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}", "use a value >= 0")
    _require(self.clip_norm >= 0, f"optim.clip_norm={self.clip_norm}", "use 0 for off, or a positive norm")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop."""

  steps: int
  accumulation: int  # micro-batches a step
  loss_block: int  # tokens whose [block, V] float32 logits exist at once
  log_every: int  # steps
  eval_every: int  # steps; the last step always evaluates
  eval_rows: int  # held-out rows an evaluation reads at most; 0 reads all
  checkpoint_every: int  # steps; the last step always saves
  keep_checkpoints: int
  sample_prompt: str  # continued and coloured by depth at the end; "" is off
  sample_tokens: int

  def __post_init__(self):
    for field in ("steps", "accumulation", "loss_block", "log_every", "eval_every", "checkpoint_every",
                  "keep_checkpoints"):
      _require(getattr(self, field) >= 1, f"train.{field}={getattr(self, field)}", "use a value >= 1")
    for field in ("eval_rows", "sample_tokens"):
      _require(getattr(self, field) >= 0, f"train.{field}={getattr(self, field)}", "use a value >= 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 takes what is left (one axis only)."""

  data: int
  model: int

  def __post_init__(self):
    _require(sum(n == -1 for n in (self.data, self.model)) <= 1, f"mesh={self}", "use -1 on one axis only")
    _require(all(n == -1 or n >= 1 for n in (self.data, self.model)), f"mesh={self}", "use -1 or a count >= 1")


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment."""

  seed: int
  model: ModelConfig
  data: DataConfig
  optim: OptimConfig
  train: TrainConfig
  mesh: MeshConfig

  def __post_init__(self):
    n, a = self.data.batch_size, self.train.accumulation
    _require(n % a == 0, f"data.batch_size={n} is not a multiple of train.accumulation={a}",
             f"use {n - n % a or a} or {n - n % a + a} rows")
    _require(self.optim.warmup_steps <= self.train.steps,
             f"optim.warmup_steps={self.optim.warmup_steps} exceeds train.steps={self.train.steps}",
             "shorten the warm-up or train longer")


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
  """Turns a `ConfigDict` into a validated `Config`.

  Raises:
    ValueError: a field is unknown, missing, of another type or out of range.
  """
  return _build(Config, config.to_dict(), "config")


def to_dict(config: Any) -> dict[str, Any]:
  """Plain dictionary of a config dataclass, ready for JSON."""
  return dataclasses.asdict(config)


def from_dict(fields: dict[str, Any]) -> Config:
  """Inverse of `to_dict`, also after a round trip through JSON."""
  return _build(Config, fields, "config")


def _build(cls: type, values: Any, path: str) -> Any:
  _require(isinstance(values, dict), f"{path}={values!r} is not a group of fields", f"see {cls.__name__}")
  hints = typing.get_type_hints(cls)
  unknown, missing = sorted(set(values) - set(hints)), sorted(set(hints) - set(values))
  _require(not unknown, f"unknown field(s) {', '.join(f'{path}.{u}' for u in unknown)}",
           f"the fields are {', '.join(hints)}")
  _require(not missing, f"missing field(s) {', '.join(f'{path}.{m}' for m in missing)}", "start from configs/base.py")
  return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, path)
  if typing.get_origin(hint) is Literal:
    _require(value in typing.get_args(hint), f"{path}={value!r}", f"use one of {', '.join(typing.get_args(hint))}")
    return value
  if typing.get_origin(hint) is tuple:
    _require(isinstance(value, (tuple, list)), f"{path}={value!r} is not a list", "use e.g. (1.0, 0.5)")
    inner = typing.get_args(hint)[0]
    return tuple(_convert(inner, v, f"{path}[{i}]") for i, v in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  _require(type(value) is hint, f"{path}={value!r} is of type {type(value).__name__}", f"use a {hint.__name__}")
  return value
