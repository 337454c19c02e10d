"""Tiny models in folders of `hf_export.write`.

  case = exported.make(tmp_path, router=tiny.TOKEN_CHOICE)
  case.config, case.variables, case.folder
"""

import importlib.util
import pathlib
import sys
from typing import Any, NamedTuple

from mor import config as config_lib
from mor.conversion import hf_export
from tests.helpers import decoding
from tests.helpers import tiny

CONTEXT = 72
RANKS = dict(q=2, k=1, v=3, o=2, gate=1, up=2, down=4)


def load_modeling():
  """modeling_mor.py on its own, as transformers loads it: under no name that the import hook checks."""
  spec = importlib.util.spec_from_file_location("modeling_mor", hf_export.MODELING)
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


class Case(NamedTuple):
  """A model, and the folder it was written to."""

  config: config_lib.ModelConfig
  variables: dict[str, Any]
  folder: pathlib.Path


def config(**model: Any) -> config_lib.ModelConfig:
  """A model that is quick to compile: 5 unrolled layers, the inner three shared."""
  quick = dict(num_layers=5, num_recursions=3, execution="masked", scan_layers=False)
  return tiny.config(model=quick | model).model


def write(folder: pathlib.Path, model: config_lib.ModelConfig, variables: dict[str, Any], **options: Any) -> None:
  """`hf_export.write` with nothing but the model."""
  defaults = dict(tokenizer=None, chat_template=None, context=CONTEXT, dtype="float32", special_ids={})
  options = defaults | options
  hf_export.write(folder, model, variables, **options)


def make(folder: pathlib.Path, **model: Any) -> Case:
  """A model with random parameters, written to `folder`."""
  case = Case(config(**model), decoding.draw(config(**model)), folder)
  # Else a token's own embedding outweighs what the layers add.
  case.variables["params"]["embedding"] *= 0.3
  write(folder, case.config, case.variables)
  return case
