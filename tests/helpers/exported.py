"""Tiny models in folders of `hf_export.write`.

  case = exported.make(tmp_path, router=tiny.TOKEN_CHOICE)
  case.config, case.variables, case.folder
"""

import importlib
import pathlib
import sys
import types
from typing import Any, NamedTuple

from mor import config as config_lib
from mor.conversion import hf_export
from tests.helpers import decoding
from tests.helpers import tiny

CONTEXT = 72
RANKS = dict(q=2, k=1, v=3, o=2, gate=1, up=2, down=4)


def load_modeling():
  """modeling_mor.py in its folder, as transformers loads it: under no name that the import hook checks."""
  package = sys.modules.setdefault("exported_code", types.ModuleType("exported_code"))
  package.__path__ = [str(hf_export.MODELING.parent)]
  return importlib.import_module(f"exported_code.{hf_export.MODELING.stem}")


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
