"""A study as a list of training runs: their lengths, and the steps at which runs fork.

At equal forward FLOPs (without the embedding, with the head) a member trains

  steps = steps of the reference * FLOPs per token of the reference / of the member

so members see different numbers of tokens. To compare at equal tokens too, every member
that trains longer than the shortest one forks: its short run and its full run share all
steps with the same learning rate (with WSD, the warm-up and the plateau), and only the
cooldown of the short run is trained anew. The result is exactly a run of the shorter length.

Source: trapezoid schedules as in Hägele et al. 2024; MoR paper App. C.
"""

from collections.abc import Mapping
import copy
import dataclasses
import runpy
from typing import Any

import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor import costs
from mor.train import optim

_KEEP_ALL = 1000  # the checkpoint at the fork must outlive later ones


@dataclasses.dataclass(frozen=True)
class Member:
  """One model of a study: the fields that differ from the config of the study."""

  name: str
  label: str
  overrides: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
  """The result of `get_study` in a study file."""

  reference: str  # name of the member that trains train.steps of the config
  members: tuple[Member, ...]
  seeds: tuple[int, ...]  # seeds of the parameters; all runs see the same data
  final_rows: int  # held-out rows for the final figures; 0 reads all
  texts: Mapping[str, str]  # name and file of other held-out texts
  text_rows: int  # rows of each text; 0 reads all
  blimp: str  # file of minimal pairs; '' scores none
  blimp_pairs: int  # pairs per paradigm

  def __post_init__(self):
    names = [member.name for member in self.members]
    if len(set(names)) != len(names):
      raise ValueError(f"two members of the study have one name ({', '.join(names)}); rename one")
    if self.reference not in names:
      raise ValueError(f"reference={self.reference!r} is no member of the study; use one of {', '.join(names)}")
    if not self.seeds or len(set(self.seeds)) != len(self.seeds):
      raise ValueError(f"seeds={self.seeds}; use one or more different seeds")
    if min(self.final_rows, self.text_rows) < 0 or self.blimp_pairs < 1:
      raise ValueError(f"final_rows={self.final_rows}, text_rows={self.text_rows}, blimp_pairs={self.blimp_pairs}; "
                       "use rows >= 0 and pairs >= 1")


@dataclasses.dataclass(frozen=True)
class Run:
  """One member with one seed.

  Attributes:
    member: member of the study.
    full: config of the run to the budget.
    short: config of the run to the tokens of the shortest member; None if that is `full`.
    fork: number of first steps that `short` and `full` share.
  """

  member: Member
  full: config_lib.Config
  short: config_lib.Config | None
  fork: int

  @property
  def name(self) -> str:
    return f"{self.member.name}-seed{self.full.seed}"


def read(path: str) -> Study:
  """Returns the study that a config file describes.

  Raises:
    ValueError: the file has no `get_study`, or its result is no study.
  """
  made = runpy.run_path(path)
  if "get_study" not in made:
    raise ValueError(f"{path} describes no study; add get_study(), or use --config=study_cpu")
  return from_dict(made["get_study"]())


def from_dict(fields: Mapping[str, Any]) -> Study:
  """Builds a `Study` from exactly its fields."""
  known = {field.name for field in dataclasses.fields(Study)}
  if set(fields) != known:
    raise ValueError(f"get_study() returns {', '.join(fields)}; return {', '.join(sorted(known))}")
  return Study(**{**fields, "members": tuple(Member(**member) for member in fields["members"]),
                  "seeds": tuple(fields["seeds"])})


def make(base: config_lib.Config, study: Study) -> list[Run]:
  """Makes the runs of all members, seed by seed.

  Raises:
    ValueError: an override is invalid, or changes the data or the steps.
  """
  configs = {member.name: override(base, member) for member in study.members}
  reference = forward_flops(configs[study.reference])
  steps = {name: max(1, round(base.train.steps * reference / forward_flops(c))) for name, c in configs.items()}
  shortest = min(steps.values())
  return [_run(member, with_seed(configs[member.name], seed), steps[member.name], shortest)
          for seed in study.seeds for member in study.members]


def override(base: config_lib.Config, member: Member) -> config_lib.Config:
  """Returns the config of a member, without its number of steps."""
  fields = config_lib.to_dict(base)
  config = config_lib.from_dict(_merged(fields, member.overrides))
  if config.data != base.data or config.train.steps != base.train.steps:
    raise ValueError(f"study member {member.name!r} overrides data or train.steps; members see the same rows, and "
                     "their steps follow from the budget")
  return config


def forward_flops(config: config_lib.Config) -> float:
  """Returns the forward FLOPs per token of training, with the head."""
  return costs.mean_forward_flops_per_token(config.model, config.data.seq_len)


def with_seed(config: config_lib.Config, seed: int) -> config_lib.Config:
  """Returns the config with another seed of the parameters."""
  return dataclasses.replace(config, seed=seed)


def shared_steps(a: config_lib.Config, b: config_lib.Config) -> int:
  """Counts the first steps at which two runs have the same learning rate."""
  step = jnp.arange(min(a.train.steps, b.train.steps))
  differ = np.asarray(optim.learning_rate(a)(step)) != np.asarray(optim.learning_rate(b)(step))
  return int(np.argmax(differ)) if differ.any() else len(step)


def _run(member: Member, config: config_lib.Config, steps: int, shortest: int) -> Run:
  full = _train(config, steps=steps)
  if steps == shortest:
    return Run(member, full, None, steps)
  short = _train(config, steps=shortest)
  fork = shared_steps(full, short)
  if fork:
    full = _train(full, checkpoint_every=fork, keep_checkpoints=_KEEP_ALL)
  return Run(member, full, short, fork)


def _train(config: config_lib.Config, **fields: int) -> config_lib.Config:
  return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields))


def _merged(fields: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
  merged = copy.deepcopy(fields)
  for name, value in changes.items():
    nested = isinstance(value, Mapping) and isinstance(merged.get(name), dict)
    merged[name] = _merged(merged[name], value) if nested else value
  return merged
