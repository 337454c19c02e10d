"""Typed dataclasses from nested dictionaries, and their one-line errors."""

import dataclasses
import typing
from typing import Any, Literal


def require(ok: bool, what: str, remedy: str) -> None:
  """Raises ValueError with what is wrong and what to do about it."""
  if not ok:
    raise ValueError(f"{what}; {remedy}")


def build(cls: type, values: Any, path: str) -> Any:
  """The dataclass `cls` of a dictionary with exactly its fields.

  Raises:
    ValueError: a field is unknown, missing, of another type or out of range; `path`
      says where.
  """
  require(isinstance(values, dict), f"{path}={values!r} is not a group of fields", f"see {cls.__name__}")
  hints = typing.get_type_hints(cls)
  unknown, missing = sorted(set(values) - set(hints)), sorted(set(hints) - set(values))
  require(not unknown, f"unknown field(s) {', '.join(f'{path}.{u}' for u in unknown)}",
           f"the fields are {', '.join(hints)}")
  require(not missing, f"missing field(s) {', '.join(f'{path}.{m}' for m in missing)}", "start from configs/base.py")
  return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
  if dataclasses.is_dataclass(hint):
    return build(hint, value, path)
  if typing.get_origin(hint) is Literal:
    require(value in typing.get_args(hint), f"{path}={value!r}", f"use one of {', '.join(typing.get_args(hint))}")
    return value
  if typing.get_origin(hint) is tuple:
    require(isinstance(value, (tuple, list)), f"{path}={value!r} is not a list", "use e.g. (1.0, 0.5)")
    inner = typing.get_args(hint)[0]
    return tuple(_convert(inner, v, f"{path}[{i}]") for i, v in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  require(type(value) is hint, f"{path}={value!r} is of type {type(value).__name__}", f"use a {hint.__name__}")
  return value
