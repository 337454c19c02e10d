"""JSON files of other programs: every field is taken with the type that it must have.

A reader of such a file takes its fields through this module only. Then a file that is
damaged, or written by another version, ends in a ValueError of one line.
"""

from collections.abc import Iterator, Mapping
import contextlib
import json
import math
import os
import pathlib
import reprlib
from typing import Any

_LARGEST = 10**30  # beyond it is damage

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = _shown.maxlong = 120
_shown.maxlevel = 3


def show(value: Any) -> str:
  """Returns the value for a message, on one line and short."""
  return _shown.repr(value)


def is_text(value: str) -> bool:
  """Returns False for half a character of UTF-16, which JSON can spell and UTF-8 cannot."""
  return not any("\ud800" <= character <= "\udfff" for character in value)


def first_line(error: BaseException) -> str:
  """Returns the first line of the message of an error, short and without a full stop; its type if it has none."""
  lines = str(error).strip().splitlines()
  return lines[0][:300].rstrip(".") if lines else type(error).__name__


@contextlib.contextmanager
def naming_damage(path: os.PathLike, remedy: str) -> Iterator[None]:
  """Turns any error of reading a file that `mor` wrote into a ValueError with its path and the remedy."""
  try:
    yield
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise ValueError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); {remedy}") from error


def read_text(path: pathlib.Path) -> str | None:
  """Returns the content of a text file; None if there is none. A link to nothing is an error.

  Raises:
    ValueError: not UTF-8.
    OSError: it is a directory, or cannot be read.
  """
  if not os.path.lexists(path):
    return None
  try:
    return path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8; fetch it again") from error


def parse(text: str, where: str | pathlib.Path) -> dict[str, Any]:
  """Returns the object that a text describes.

  Raises:
    ValueError: not JSON, or not an object.
  """
  try:
    fields = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where} is not JSON ({first_line(error)}); fetch it again") from error
  if not isinstance(fields, dict):
    raise ValueError(f"{where} holds a {type(fields).__name__}, not an object; fetch it again")
  return fields


def read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object of a file; raises as `read_text` and `parse`, and FileNotFoundError."""
  text = read_text(path)
  if text is None:
    raise FileNotFoundError(f"{path}: no such file")
  return parse(text, path)


def read_optional(path: pathlib.Path) -> dict[str, Any]:
  """Returns the object of a file, or {} if there is no file; raises as `read`."""
  text = read_text(path)
  return {} if text is None else parse(text, path)


def number(fields: Mapping[str, Any], name: str, kind: type, where: str | pathlib.Path, *default: Any) -> Any:
  """Returns a field that is a finite number of the type `kind`, or `default` if it is missing or null.

  Raises:
    ValueError: another type, not finite, or a field without a default is missing.
  """
  value = fields.get(name)
  if value is None and default:
    return default[0]
  fits = not isinstance(value, bool) and isinstance(value, (int, kind))
  if not fits or not (abs(value) < _LARGEST if isinstance(value, int) else math.isfinite(value)):
    raise ValueError(f"{where}: {name}={show(value)}; give a number of type {kind.__name__}")
  return kind(value)


def flag(fields: Mapping[str, Any], name: str, where: str | pathlib.Path, *default: bool) -> bool:
  """Returns a field that is true or false, or `default` if it is missing or null."""
  value = fields.get(name)
  if value is None and default:
    return default[0]
  if not isinstance(value, bool):
    raise ValueError(f"{where}: {name}={show(value)}; use true or false")
  return value


def group(fields: Mapping[str, Any], name: str, where: str | pathlib.Path) -> dict[str, Any]:
  """Returns a field that is an object; {} if it is missing or null."""
  value = fields.get(name)
  if value is None:
    return {}
  if not isinstance(value, dict):
    raise ValueError(f"{where}: {name}={show(value)}; give a group of options")
  return value


def token(fields: Mapping[str, Any], name: str, where: str | pathlib.Path) -> str | None:
  """Returns the text of a token, which a field gives as text or as an object with `content`; None if missing."""
  value = fields.get(name)
  if isinstance(value, dict):
    value = value.get("content")
  if value is not None and not isinstance(value, str):
    raise ValueError(f"{where}: {name.removesuffix('_token')} is a {type(value).__name__}, not text; fetch it again")
  if value is not None and not is_text(value):
    raise ValueError(f"{where}: {name.removesuffix('_token')} is no text; fetch it again")
  return value


def ids(fields: Mapping[str, Any], name: str, where: str | pathlib.Path) -> tuple[int, ...]:
  """Returns the ids of a field: one, a list of them, or none (missing, null, or -1 in old files)."""
  value = fields.get(name)
  if value is None or type(value) is int and value == -1:
    return ()
  several = value if isinstance(value, list) else [value]
  if not all(type(index) is int and 0 <= index < 2**31 for index in several):
    raise ValueError(f"{where}: {name}={show(value)}; give an id, or a list of them")
  return tuple(several)
