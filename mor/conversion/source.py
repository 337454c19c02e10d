"""Reads a pretrained model of any kind we know.

  model = source.read("hf:models/SmolLM2-135M")
  model = source.read("gguf:SmolLM2-135M-Instruct.Q4_1.gguf")
  model = source.read("official_mor:checkpoint-14161", target=config.model)
"""

from collections.abc import Collection
import pathlib

from mor import model_config
from mor.conversion import gguf_import
from mor.conversion import hf_import
from mor.conversion import official_import
from mor.conversion import pretrained

_DESCRIBERS = {"hf": hf_import.describe, "gguf": gguf_import.describe}
_READERS = {  # prefix -> reader of a path and the config it becomes
    "hf": lambda path, target: hf_import.read(path),
    "gguf": lambda path, target: gguf_import.read(path),
    "official_mor": official_import.read,
}


def read(spec: str, target: model_config.ModelConfig | None = None) -> pretrained.Source:
  """Reads what `spec` names, whole, before anything is written.

  Args:
    spec: "hf:FOLDER", "gguf:FILE" or "official_mor:FOLDER_OR_FILE".
    target: for official_mor, what the files do not tell; else unused.

  Raises:
    ValueError: the kind is unknown, the model unsupported, or a file lies.
    OSError: a file cannot be read.
  """
  kind, path = _find(spec, _READERS)
  return _READERS[kind](path, target)


def describe(spec: str) -> model_config.ModelConfig:
  """The model of an "hf:FOLDER" or "gguf:FILE", without its weights; raises as `read` does."""
  kind, path = _find(spec, _DESCRIBERS)
  return _DESCRIBERS[kind](path)


def _find(spec: str, kinds: Collection[str]) -> tuple[str, pathlib.Path]:
  kind, colon, path = spec.partition(":")
  if kind not in kinds or not colon or not path:
    raise ValueError(f"source {spec!r}; use {', '.join(f'{known}:PATH' for known in kinds)}, or mor:WORKDIR to "
                     "convert a run")
  expanded = pathlib.Path(path).expanduser()
  if not expanded.exists():
    raise FileNotFoundError(f"source {spec!r}: there is no {expanded}")
  return kind, expanded
