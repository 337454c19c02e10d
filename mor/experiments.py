"""Experiment files: where they lie, how one is read, and what several of them share.

An experiment file has `get_config`, which edits `config.default()`, with at most one
argument: text. It imports only `mor`, so it runs from any directory. A file that varies
another starts from `read("NAME:ARGUMENT")`.

In a checkout the files lie in configs/, beside the package. An installed package has them
as mor/configs.
"""

import importlib.util
import os
import pathlib
import types
from typing import Any

import ml_collections

_PACKAGE = pathlib.Path(__file__).parent

TEXTS = os.environ.get("MOR_DATA", "../shared/data")  # directory of texts that are not shipped
_FIXED = dict(name="fixed", sampling="none")
_EXPERT = dict(name="expert_choice", sampling="aux_loss", sampling_coef=0.001, alpha=0.1)
_TOKEN = dict(name="token_choice", activation="softmax", alpha=1.0, sampling="none", balancing="loss",
              balance_coef=0.1, capacity=(1.0, 1.0, 0.5))  # the buffer is 1.5 times the balanced load


def directory() -> pathlib.Path:
  """Returns the folder of the experiments that come with the package."""
  installed = _PACKAGE / "configs"
  return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
  """Returns the names of the experiments that come with the package."""
  return sorted(path.stem for path in directory().glob("*.py") if path.stem != "__init__")


def find(experiment: str) -> str:
  """Returns an experiment with the path of its file in place of its name.

  Args:
    experiment: NAME or FILE, with :ARGUMENT if its `get_config` takes one.

  Raises:
    ValueError: no such file.
  """
  name, colon, argument = experiment.partition(":")
  if pathlib.Path(name).is_file():
    return experiment
  if name not in names():
    raise ValueError(f"{name}: no such file; use one of {', '.join(names())}, or a file of your own")
  return f"{directory() / name}.py{colon}{argument}"


def load(experiment: str) -> types.ModuleType:
  """Runs an experiment's file, and returns it as a module."""
  path = find(experiment).partition(":")[0]
  spec = importlib.util.spec_from_file_location(f"experiment_{pathlib.Path(path).stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def read(experiment: str) -> ml_collections.ConfigDict:
  """Returns the config of an experiment, for example of "quickstart" or "paper:mor-360m-r3".

  Raises:
    ValueError: no such file, or an argument that its `get_config` refuses.
  """
  _, colon, argument = experiment.partition(":")
  return load(experiment).get_config(*[argument] * bool(colon))


def use_books(config: ml_collections.ConfigDict, max_bytes: int) -> None:
  """Makes a run train on the books of `TEXTS` if they are there; else it keeps its source.

  Args:
    config: config to edit.
    max_bytes: bytes of training text to read at most; 0 reads all.
  """
  if os.path.exists(f"{TEXTS}/books/val.jsonl.xz"):
    config.data.update(source=f"{TEXTS}/books/train-*.jsonl.xz", validation_source=f"{TEXTS}/books/val.jsonl.xz",
                       max_bytes=max_bytes)


def held_out_sets() -> dict[str, Any]:
  """Returns a study's other texts and minimal pairs; a result names those that are missing."""
  return dict(texts={"wikitext_2": f"{TEXTS}/wikitext-2/test.txt"}, blimp=f"{TEXTS}/blimp/blimp.jsonl.gz")


def study_members(num_layers: int, unique_layers: int) -> list[dict[str, Any]]:
  """Returns the models that a study compares: name, label, and fields that differ from its config.

  Args:
    num_layers: unrolled layers of all models but the small one.
    unique_layers: layers that a model with R = 3 stores; the small one has as many.
  """
  def vanilla(layers: int) -> dict[str, Any]:
    return dict(model=dict(sharing="vanilla", num_recursions=1, num_layers=layers, router=_FIXED))

  def recursive(r: int, router: dict[str, Any], **model: Any) -> dict[str, Any]:
    return dict(model=dict(sharing="middle_cycle", num_recursions=r, router=router, **model))

  rows = [
      ("vanilla", "vanilla, same depth", vanilla(num_layers)),
      ("vanilla_small", "vanilla, same parameters as R=3", vanilla(unique_layers)),
      ("recursive_r2", "recursive R=2", recursive(2, _FIXED)),
      ("recursive_r3", "recursive R=3", recursive(3, _FIXED)),
      ("mor_expert_r2", "MoR expert R=2", recursive(2, _EXPERT)),
      ("mor_expert_r3", "MoR expert R=3", recursive(3, _EXPERT)),
      ("mor_token_r3", "MoR token R=3", recursive(3, _TOKEN)),
      ("mor_shared_r3", "MoR expert R=3, shared KV", recursive(3, _EXPERT, kv_plan="shared")),
  ]
  return [dict(name=name, label=label, overrides=overrides) for name, label, overrides in rows]
