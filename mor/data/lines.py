"""Bytes from anywhere as text: UTF-8, or one JSON object a line.

Errors say what is wrong and the remedy; the caller says where.
"""

import codecs
import json
from typing import Any

_OTHERS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",  # before UTF-16, whose mark begins theirs
           codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_MOST_NAMES, _LONGEST_NAME = 12, 40  # of fields in a message


def without_mark(content: bytes) -> bytes:
  """Returns the beginning of a file without a byte order mark.

  Raises:
    ValueError: the mark says another encoding than UTF-8.
  """
  for mark, name in _OTHERS.items():
    if content.startswith(mark):
      raise ValueError(f"{name}, not UTF-8; convert the file, e.g. with iconv -f {name} -t UTF-8")
  return content.removeprefix(codecs.BOM_UTF8)


def decode(content: bytes) -> str:
  """Returns bytes of UTF-8 as text.

  Raises:
    ValueError: they are something else.
  """
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def parse(line: bytes) -> dict[str, Any]:
  """Returns the JSON object of a line.

  Raises:
    ValueError: it is none, or Python refuses to read it.
  """
  text = decode(line)
  try:
    record = json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f"not JSON ({error.msg}, column {error.colno}); repair or delete the line") from error
  except RecursionError as error:
    raise ValueError("values in values, too deep to be read; repair or delete the line") from error
  except ValueError as error:  # the limit of Python on digits
    raise ValueError("a number of too many digits; write it as text, or delete the line") from error
  if not isinstance(record, dict):
    raise ValueError("not an object; repair or delete the line")
  return record


def names(record: dict[str, Any]) -> str:
  """Returns the names of the fields of an object for a message: on one line, and short."""
  found = [name if name.isprintable() and len(name) <= _LONGEST_NAME else ascii(name)[:_LONGEST_NAME] for name in record]
  return ", ".join(found[:_MOST_NAMES] + ["..."] * (len(found) > _MOST_NAMES)) or "no fields"


def check_pairs(text: str) -> None:
  """Refuses text that has no UTF-8.

  Raises:
    ValueError: half of a surrogate pair, which JSON can spell.
  """
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"half a surrogate pair (character {error.start + 1} of the text); repair or delete it") from error
