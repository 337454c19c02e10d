"""Arguments of the command line: `--config=NAME` becomes a file, and a mistake becomes one line.

absl and ml_collections report a wrong flag or config field in messages of several lines,
often with quotes inside quotes. `explain` keeps the part that a user needs, and names the
config field that was probably meant.
"""

from collections.abc import Sequence
import difflib
import re

from absl import flags

from mor import config as config_lib
from mor import experiments
from mor import fields


def with_files(argv: Sequence[str]) -> list[str]:
  """Returns the arguments, with the path of its file in place of an experiment's name."""
  found, follows = [], False  # follows: the argument before is --config without a value
  for arg in argv:
    name, equals, value = ("--config", "", arg) if follows else arg.partition("=")
    if name in ("-config", "--config") and (equals or follows):
      try:
        arg = (f"{name}=" if equals else "") + experiments.find(value)
      except ValueError as error:
        raise ValueError(f"--config={error}") from error
    follows = not follows and arg in ("-config", "--config")
    found.append(arg)
  return found


def explain(error: Exception, argv: Sequence[str]) -> str:
  """Returns the part of an error of absl or ml_collections that a user needs."""
  message = str(error)
  if isinstance(error, (AttributeError, KeyError)):  # these quote what they say, once or twice
    message = message.replace("\\n", "\n").replace("\\'", "'").strip("'\"")
  lines = [line.strip() for line in message.splitlines() if line.strip()] or [type(error).__name__]
  if isinstance(error, flags.UnrecognizedFlagError):
    if error.flagname.startswith("config."):
      return f"--{error.flagname} without --config; give --config=NAME before it"
    return f"{' '.join(lines)}; --help lists all"
  if "before a value for --config" in lines[0]:
    return f"{lines[0]}; give --config=NAME first"
  if "Error whilst parsing config file" in lines[0]:
    return f"{lines[0].split(': Error whilst')[0]}: {lines[-1].partition(': ')[2] or lines[-1]}"
  if isinstance(error, (AttributeError, KeyError)):
    name = lines[0].strip("'")
    given = next((arg for arg in argv if arg.startswith("--config.") and name in arg.split("=")[0].split(".")), None)
    if given:
      return f"{given}: unknown config field; {_nearest(given)}--mode=fields lists all"
  if isinstance(error, (flags.Error, ValueError)):
    return " ".join(lines[:2])
  return f"the config file fails with {type(error).__name__}: {lines[0]}"


def read_numbers(flag: str, words: Sequence[str]) -> list[int]:
  """Returns the positive numbers of a flag that takes a list.

  Raises:
    ValueError: a word is no positive number, or there is none.
  """
  if not words or not all(re.fullmatch("[1-9][0-9]{,8}", word) for word in words):
    raise ValueError(f"--{flag}={','.join(words)}; give positive numbers, e.g. --{flag}=1,2,4")
  return [int(word) for word in words]


def _nearest(arg: str) -> str:
  """Returns a question that names the config field most like the field of an argument, or ''."""
  paths = [row.path for row in fields.rows(config_lib.Config())]
  path = arg.partition("=")[0].removeprefix("--config.")
  same_name = [other for other in paths if other.split(".")[-1] == path.split(".")[-1]]
  found = difflib.get_close_matches(path, same_name or paths, n=1)
  return f"did you mean --config.{found[0]}? " if found else ""
