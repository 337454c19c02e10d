"""Rows of config dataclasses, their values from nested dictionaries, and their one-line errors.

A row is `name: type = fields.field(default, help)`; a group of rows is a field whose
type is a dataclass.
"""

import dataclasses
import math
import typing
from typing import Any, Literal


def require(ok: bool, what: str, remedy: str) -> None:
  """Raises ValueError with what is wrong and what to do about it."""
  if not ok:
    raise ValueError(f"{what}; {remedy}")


def require_finite(value: Any, path: str) -> None:
  """Raises ValueError if a value is, or holds, a float that is infinite or no number."""
  for one in value if isinstance(value, tuple) else (value,):
    require(not isinstance(one, float) or math.isfinite(one), f"{path}={one}", "use a finite number")


def show(value: Any, most: int = 80) -> str:
  """Returns a value as an error message shows it: one line of `most` characters at most, whatever it is."""
  try:
    text = " ".join(repr(value).split())
  except Exception:  # e.g. an integer with more digits than Python writes
    return f"a value of type {type(value).__name__}"
  return text if len(text) <= most else f"{text[:most - 3]}..."


def field(default: Any, help_text: str = "", added: bool = False) -> Any:
  """Declares a dataclass field.

  Args:
    default: value where an experiment says nothing, immutable.
    help_text: meaning and unit, a phrase.
    added: True if configs of older runs lack the field. They did what `default` says, so a
      change of the default must write the old value into `config.upgrade`.
  """
  return dataclasses.field(default=default, metadata=dict(help=help_text, added=added))


@dataclasses.dataclass(frozen=True)
class Row:
  """A field that is no group, as a user sees it: dotted path, value, help text, allowed values."""

  path: str
  value: Any
  help: str
  allowed: str


def rows(config: Any, path: str = "") -> list[Row]:
  """Returns the fields of a config dataclass and of its groups, in their order."""
  found = []
  for each in dataclasses.fields(config):
    name, value = f"{path}{each.name}", getattr(config, each.name)
    if dataclasses.is_dataclass(value):
      found += rows(value, f"{name}.")
    else:
      found.append(Row(name, value, each.metadata["help"], _allowed(each.type)))
  return found


def fill_added(cls: type, values: dict[str, Any]) -> dict[str, Any]:
  """Returns `values`, with defaults for the added fields of `cls` and of its groups that it lacks."""
  filled = dict(values)
  for row in dataclasses.fields(cls):
    if row.name not in filled:
      if row.metadata.get("added"):
        filled[row.name] = plain(row.default)
    elif dataclasses.is_dataclass(row.type) and isinstance(filled[row.name], dict):
      filled[row.name] = fill_added(row.type, filled[row.name])
  return filled


def plain(value: Any) -> Any:
  """Returns a field's value as a dictionary if it is a group."""
  return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def build(cls: type, values: Any, path: str) -> Any:
  """Returns the dataclass `cls` of a dictionary with exactly its fields; defaults fill nothing.

  Raises:
    ValueError: a field is unknown, missing, of another type or out of range; `path`
      says where.
  """
  require(isinstance(values, dict), f"{path}={values!r} is not a group of fields", f"see {cls.__name__}")
  hints = typing.get_type_hints(cls)
  unknown, missing = sorted(set(values) - set(hints)), sorted(set(hints) - set(values))
  require(not unknown, f"unknown field(s) {', '.join(f'{path}.{u}' for u in unknown)}",
           f"the fields are {', '.join(hints)}")
  require(not missing, f"missing field(s) {', '.join(f'{path}.{m}' for m in missing)}", "start from config.default()")
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
  if hint is float and type(value) is int and abs(value) < 2**1000:
    value = float(value)
  require(type(value) is hint, f"{path}={value!r} is of type {type(value).__name__}", f"use a {hint.__name__}")
  require_finite(value, path)
  return value


def _allowed(hint: Any) -> str:
  """Returns the values that a type allows, in words."""
  if typing.get_origin(hint) is Literal:
    return f"one of {', '.join(typing.get_args(hint))}"
  if typing.get_origin(hint) is tuple:
    return f"tuple of {typing.get_args(hint)[0].__name__}"
  return hint.__name__
