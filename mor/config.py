"""Every knob of the project, as frozen, validated dataclasses.

`configs/*.py` build an `ml_collections.ConfigDict` (so that every field can be
overridden on the command line); `from_config_dict` turns it once into these
dataclasses. Below this file nothing has a default and nothing is looked up by
string.
"""

import copy
import dataclasses
from typing import Any, Literal

import ml_collections

from mor import fields
from mor import model_config

ModelConfig = model_config.ModelConfig
RouterConfig = model_config.RouterConfig
LoraConfig = model_config.LoraConfig
RopeScalingConfig = model_config.RopeScalingConfig

_require = fields.require

# Fields that runs were made without, and what those runs did.
_ADDED = {
    "init": dict(method="stepwise", lora="svd"),
    "distill": dict(teacher="", weight=0.5, temperature=1.0),
    "exit": dict(layers=[], weighting="constant", coef=0.1, kl=1.0, hidden="none", hidden_coef=0.5, layer_dropout=0.0,
                 curriculum="none"),
    "model.tie_embeddings": True,
    "model.rope_scaling": dict(factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192),
    "model.attention": "auto",  # the same but for rounding
    "model.lora": dict(q=0, k=0, v=0, o=0, gate=0, up=0, down=0),
    "mesh.fsdp": 1,
    "mesh.sequence": 1,
    "train.keep_every": 0,
    "train.step_timeout": 0.0,
}


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
  keep_checkpoints: int  # newest ones; with 2 or more, a damaged one loses no more than `checkpoint_every` steps
  keep_every: int  # steps; checkpoints of their multiples are kept for ever; 0 keeps none
  step_timeout: float  # seconds; a step that takes longer ends the process (train/watchdog.py); 0 is off
  sample_prompt: str  # continued and coloured by depth at the end; "" is off
  sample_tokens: int

  def __post_init__(self):
    for field in ("steps", "accumulation", "loss_block", "log_every", "eval_every", "checkpoint_every",
                  "keep_checkpoints"):
      _require(getattr(self, field) >= 1, f"train.{field}={getattr(self, field)}", "use a value >= 1")
    for field in ("eval_rows", "sample_tokens", "keep_every", "step_timeout"):
      _require(getattr(self, field) >= 0, f"train.{field}={getattr(self, field)}", "use a value >= 0")


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """How `--mode=convert` makes this model of a pretrained one (RRT §3.1)."""

  # Which source layers a shared layer is made of; see conversion/recursive_init.py.
  method: Literal["stepwise", "average", "lower", "upper", "random"]
  lora: Literal["svd", "zero"]  # truncated SVD of what sharing lost, or none of it


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """Loss (1 - weight) * NLL + weight * temperature^2 * KL(teacher || student)."""

  teacher: str  # workdir of a run whose newest checkpoint teaches; "" is off
  weight: float
  temperature: float  # divides both models' logits

  def __post_init__(self):
    _require(0 < self.weight <= 1, f"distill.weight={self.weight}", "use a weight in (0, 1], or distill.teacher=''")
    _require(self.temperature > 0, f"distill.temperature={self.temperature}", "use a value > 0")


@dataclasses.dataclass(frozen=True)
class ExitConfig:
  """Training of early exits; see `train/exits.py`."""

  layers: tuple[int, ...]  # unrolled layers after which there is one, ascending; () is off
  weighting: Literal["depth", "constant"]  # layers / their sum; 1 for the end and `coef` for an exit
  coef: float
  kl: float  # share of an exit's loss that is the divergence from the end's logits, detached
  hidden: Literal["none", "last", "uniform", "dynamic"]  # which states imitate which, by mean squares
  hidden_coef: float
  layer_dropout: float  # of the last layer, for a row; earlier ones have less
  curriculum: Literal["none", "rotational", "gradual"]  # which exits a step trains

  def __post_init__(self):
    _require(list(self.layers) == sorted(set(self.layers)), f"exit.layers={self.layers}", "use ascending layers")
    _require(self.coef > 0, f"exit.coef={self.coef}", "use a value > 0, or exit.layers=() for no exits")
    _require(0 <= self.kl <= 1, f"exit.kl={self.kl}", "use a share in [0, 1]")
    _require(self.hidden_coef > 0, f"exit.hidden_coef={self.hidden_coef}", "use a value > 0, or exit.hidden='none'")
    _require(0 <= self.layer_dropout < 1, f"exit.layer_dropout={self.layer_dropout}", "use a probability in [0, 1)")
    _require(self.hidden == "none" or len(self.layers) == 1, f"exit.hidden={self.hidden!r} with exit.layers={self.layers}",
             "use one exit, or exit.hidden='none'")
    _require(self.curriculum == "none" or len(self.layers) > 1,
             f"exit.curriculum={self.curriculum!r} with exit.layers={self.layers}", "use several exits, or 'none'")

  def check(self, model: ModelConfig) -> None:
    """Refuses exits that a model does not have."""
    if not self.layers:
      return
    plain = model.num_recursions == 1
    valid = tuple(range(1, model.num_layers)) if plain else model.boundaries
    _require(set(self.layers) <= set(valid), f"exit.layers={self.layers}",
             f"choose from the model's layers {', '.join(map(str, valid))}")
    _require(plain or self.hidden in ("none", "last"), f"exit.hidden={self.hidden!r} with model.num_recursions="
             f"{model.num_recursions}", "use 'none' or 'last': between the loops' ends a recursive model has no states")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 takes what is left (one axis only)."""

  data: int  # rows
  fsdp: int  # rows, and parameters with their moments
  tensor: int  # heads, feed-forward width and vocabulary
  sequence: int  # positions, outside attention

  def __post_init__(self):
    sizes = (self.data, self.fsdp, self.tensor, self.sequence)
    _require(sum(n == -1 for n in sizes) <= 1, f"mesh={self}", "use -1 on one axis only")
    _require(all(n == -1 or n >= 1 for n in sizes), f"mesh={self}", "use -1 or a count >= 1")


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment."""

  seed: int
  model: ModelConfig
  data: DataConfig
  optim: OptimConfig
  train: TrainConfig
  init: InitConfig
  distill: DistillConfig
  exit: ExitConfig
  mesh: MeshConfig

  def __post_init__(self):
    n, a = self.data.batch_size, self.train.accumulation
    _require(n % a == 0, f"data.batch_size={n} is not a multiple of train.accumulation={a}",
             f"use {n - n % a or a} or {n - n % a + a} rows")
    _require(self.optim.warmup_steps <= self.train.steps,
             f"optim.warmup_steps={self.optim.warmup_steps} exceeds train.steps={self.train.steps}",
             "shorten the warm-up or train longer")
    self.exit.check(self.model)


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
  """Turns a `ConfigDict` into a validated `Config`.

  Raises:
    ValueError: a field is unknown, missing, of another type or out of range.
  """
  return fields.build(Config, config.to_dict(), "config")


def to_dict(config: Any) -> dict[str, Any]:
  """Plain dictionary of a config dataclass, ready for JSON."""
  return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
  """Inverse of `to_dict`, also after a round trip through JSON."""
  return fields.build(Config, values, "config")


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
  """What `to_dict` gave when there were fewer fields, as it would be today."""
  values = copy.deepcopy(values)
  for path, default in _ADDED.items():
    *groups, name = path.split(".")
    group = values
    for part in groups:
      group = group[part]
    group.setdefault(name, copy.deepcopy(default))
  if "model" in values["mesh"]:  # the name of `tensor`, before there were four axes
    values["mesh"]["tensor"] = values["mesh"].pop("model")
  return values


