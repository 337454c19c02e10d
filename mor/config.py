"""Every knob of the project, once: frozen, validated dataclasses with defaults.

A field's row gives its type or allowed values, its default, and its help text with the
unit. `default` makes the `ml_collections.ConfigDict` that `configs/*.py` edit and the
command line overrides; `from_config_dict` turns that once into these dataclasses.
Below this file nothing has a default and nothing is looked up by string.
"""

import copy
import dataclasses
import sys
from typing import Any, Literal

import ml_collections

from mor import fields
from mor import model_config

ModelConfig = model_config.ModelConfig
RouterConfig = model_config.RouterConfig
LoraConfig = model_config.LoraConfig
RecursionsTrainConfig = model_config.RecursionsTrainConfig
RopeScalingConfig = model_config.RopeScalingConfig

_field = fields.field
_require = fields.require


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """A task whose problems are made, where data.source=task:NAME; 0 is the task's own default."""

  size: int = _field(0, "khop: entities of a map; mano: modulus; addition: digits of an operand; s5: elements")
  hardest: int = _field(0, "largest difficulty in training: hops, height of an expression, operands, permutations")
  questions: int = _field(0, "khop: questions about a map")
  packed: bool = _field(True, "khop: a fact, or a question, is one token")

  def __post_init__(self):
    for field in ("size", "hardest", "questions"):
      _require(getattr(self, field) >= 0, f"data.task.{field}={getattr(self, field)}", "use 0 for the default, or a count")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where text comes from and how it becomes batches."""

  source: str = _field(
      "sotu", "training text: sotu (shipped), tfds:NAME, hf:DIR (datasets.save_to_disk), or a path or glob of .txt, "
      ".jsonl, .jsonl.gz, .jsonl.xz or .array_record files; or problems that are made: task:khop, mano, addition or s5")
  validation_source: str = _field("", "held-out text, as source; '' holds out validation_fraction of the documents")
  text_key: str = _field("text", "key of the text in a record")
  validation_fraction: float = _field(0.05, "fraction of the documents that is held out")
  max_bytes: int = _field(0, "bytes of training text to read at most; 0 reads all")
  tokenizer: str = _field("bpe:4096", "bytes, bpe:SIZE (trained at the first run), or a tokenizers .json file; a task has its own")
  seq_len: int = _field(256, "tokens in a batch row (T)")
  batch_size: int = _field(8, "rows in a global batch (B)")
  shuffle_seed: int = _field(0, "seed of the order of documents")
  cache_dir: str = _field("", "directory of token arrays and trained tokenizers; '' is <user cache>/mor")
  task: TaskConfig = _field(TaskConfig(), added=True)

  def __post_init__(self):
    _require(self.seq_len >= 2, f"data.seq_len={self.seq_len}", "use at least 2 tokens")
    _require(self.batch_size >= 1, f"data.batch_size={self.batch_size}", "use at least 1 row")
    _require(0 < self.validation_fraction < 1 or bool(self.validation_source),
             f"data.validation_fraction={self.validation_fraction}", "use a fraction in (0, 1)")
    _require(self.max_bytes >= 0, f"data.max_bytes={self.max_bytes}", "use 0 for all, or a positive count")
    _require(self.task == TaskConfig() or self.source.startswith("task:"), f"data.task={self.task} with data.source="
             f"{self.source!r}", "set data.source=task:NAME, or leave data.task as it is")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW with clipping and a learning-rate schedule."""

  learning_rate: float = _field(3e-3, "peak learning rate")
  schedule: Literal["wsd", "cosine", "constant"] = _field("wsd", "shape of the learning rate after the warm-up")
  warmup_steps: int = _field(20, "steps from 0 to the peak")
  cooldown_fraction: float = _field(0.2, "wsd: last fraction of the steps, linear to the final rate")
  end_ratio: float = _field(0.0, "final rate / peak rate")
  b1: float = _field(0.9, "decay of the first moment")
  b2: float = _field(0.95, "decay of the second moment")
  eps: float = _field(1e-8, "term added to the root of the second moment")
  weight_decay: float = _field(0.1, "decay of all parameters but norms")
  clip_norm: float = _field(1.0, "largest global gradient norm; 0 is off")

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

  def shared_steps(self, steps: int) -> int:
    """Returns the number of first steps of a run whose learning rates are those of every longer run."""
    if self.schedule == "wsd":
      return max(self.warmup_steps, steps - int(self.cooldown_fraction * steps))
    return self.warmup_steps if self.schedule == "cosine" else sys.maxsize


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The loop."""

  steps: int = _field(500, "optimizer steps")
  accumulation: int = _field(1, "micro-batches in a step")
  loss_block: int = _field(2048, "tokens whose [block, V] float32 logits exist at once")
  log_every: int = _field(10, "steps between records of metrics")
  eval_every: int = _field(250, "steps between evaluations; the last step always evaluates")
  eval_rows: int = _field(64, "held-out rows that an evaluation reads at most; 0 reads all")
  checkpoint_every: int = _field(250, "steps between checkpoints; the last step always saves")
  keep_checkpoints: int = _field(
      2, "newest checkpoints to keep; with 2 or more, a damaged one loses at most checkpoint_every steps")
  keep_every: int = _field(0, "steps; checkpoints at multiples of it are kept for ever; 0 keeps none", added=True)
  step_timeout: float = _field(
      0.0, "seconds; a longer step ends the process with exit status 76; 0 is off", added=True)
  sample_prompt: str = _field("The state of the Union is", "text continued and coloured by depth at the end; '' is off")
  sample_tokens: int = _field(64, "new tokens of that continuation")

  def __post_init__(self):
    for field in ("steps", "accumulation", "loss_block", "log_every", "eval_every", "checkpoint_every",
                  "keep_checkpoints"):
      _require(getattr(self, field) >= 1, f"train.{field}={getattr(self, field)}", "use a value >= 1")
    for field in ("eval_rows", "sample_tokens", "keep_every", "step_timeout"):
      _require(getattr(self, field) >= 0, f"train.{field}={getattr(self, field)}", "use a value >= 0")


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """How `--mode=convert` makes this model of a pretrained one (RRT §3.1)."""

  method: Literal["stepwise", "average", "lower", "upper", "random"] = _field(
      "stepwise", "source layers that a shared layer is made of; see conversion/recursive_init.py")
  lora: Literal["svd", "zero"] = _field("svd", "low-rank deltas: truncated SVD of what sharing lost, or zero")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """Loss (1 - weight) * NLL + weight * temperature^2 * KL(teacher || student)."""

  teacher: str = _field("", "workdir of the run whose newest checkpoint teaches; '' is off")
  weight: float = _field(0.5, "share of the divergence in the loss")
  temperature: float = _field(1.0, "divisor of both models' logits")

  def __post_init__(self):
    _require(0 < self.weight <= 1, f"distill.weight={self.weight}", "use a weight in (0, 1], or distill.teacher=''")
    _require(self.temperature > 0, f"distill.temperature={self.temperature}", "use a value > 0")


@dataclasses.dataclass(frozen=True)
class ExitConfig:
  """Training of early exits; see `train/exits.py`."""

  layers: tuple[int, ...] = _field((), "unrolled layers that have an exit behind them, ascending; () is off")
  weighting: Literal["depth", "constant"] = _field(
      "constant", "depth: an exit weighs its layer / the sum of layers; constant: 1 at the end and coef at an exit")
  coef: float = _field(0.1, "weight of an exit's loss; the end has 1")
  kl: float = _field(1.0, "share of an exit's loss that is the divergence from the end's detached logits")
  hidden: Literal["none", "last", "uniform", "dynamic"] = _field(
      "none", "which layers' states imitate which, by mean squares")
  hidden_coef: float = _field(0.5, "weight of that imitation")
  layer_dropout: float = _field(0.0, "probability that a row skips the last layer; earlier layers have less")
  curriculum: Literal["none", "rotational", "gradual"] = _field("none", "which exits a step trains")

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

  data: int = _field(-1, "devices that split rows")
  fsdp: int = _field(1, "devices that split rows, and parameters with their moments", added=True)
  tensor: int = _field(1, "devices that split heads, feed-forward width and vocabulary")
  sequence: int = _field(1, "devices that split positions, outside attention", added=True)

  def __post_init__(self):
    sizes = (self.data, self.fsdp, self.tensor, self.sequence)
    _require(sum(n == -1 for n in sizes) <= 1, f"mesh={self}", "use -1 on one axis only")
    _require(all(n == -1 or n >= 1 for n in sizes), f"mesh={self}", "use -1 or a count >= 1")


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole experiment."""

  seed: int = _field(0, "seed of the parameters and of every random choice of the run")
  model: ModelConfig = ModelConfig()
  data: DataConfig = DataConfig()
  optim: OptimConfig = OptimConfig()
  train: TrainConfig = TrainConfig()
  init: InitConfig = _field(InitConfig(), added=True)
  distill: DistillConfig = _field(DistillConfig(), added=True)
  exit: ExitConfig = _field(ExitConfig(), added=True)
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    for row in fields.rows(self):
      fields.require_finite(row.value, row.path)
    n, a = self.data.batch_size, self.train.accumulation
    _require(n % a == 0, f"data.batch_size={n} is not a multiple of train.accumulation={a}",
             f"use {n - n % a or a} or {n - n % a + a} rows")
    _require(self.optim.warmup_steps <= self.train.steps,
             f"optim.warmup_steps={self.optim.warmup_steps} exceeds train.steps={self.train.steps}",
             "shorten the warm-up or train longer")
    for steps in self.model.recursions_train.support(self.model.num_recursions) if self.exit.layers else ():
      self.exit.check(self.model.at_recursions(steps))
    _require(not (self.exit.layers and self.model.recursions_train.backprop),
             f"model.recursions_train.backprop={self.model.recursions_train.backprop} with exit.layers="
             f"{self.exit.layers}", "use 0: an exit before the last steps would train its own steps no more")

  def cooldown_start(self) -> int | None:
    """Returns the number of steps before the learning rate of wsd falls; None where it never does."""
    start = self.optim.shared_steps(self.train.steps)
    return start if self.optim.schedule == "wsd" and start < self.train.steps else None


def default() -> ml_collections.ConfigDict:
  """Returns every field with its default, locked; an experiment edits it."""
  return ml_collections.ConfigDict(to_dict(Config())).lock()


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
  """Turns a `ConfigDict` into a validated `Config`.

  Raises:
    ValueError: a field is unknown, missing, of another type or out of range.
  """
  return fields.build(Config, config.to_dict(), "config")


def to_dict(config: Any) -> dict[str, Any]:
  """Returns the plain dictionary of a config dataclass, ready for JSON."""
  return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
  """Returns the config of a dictionary, the inverse of `to_dict`, also after a round trip through JSON."""
  return fields.build(Config, values, "config")


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
  """Returns what `to_dict` would give today for a run that was made when there were fewer fields."""
  values = copy.deepcopy(values)
  if "model" in values["mesh"]:  # the name of `tensor`, before there were four axes
    values["mesh"]["tensor"] = values["mesh"].pop("model")
  return fields.fill_added(Config, values)
