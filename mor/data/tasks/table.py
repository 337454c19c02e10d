"""Tasks by name. A new task is one file and one line here."""

from mor import config as config_lib
from mor import fields
from mor.data.tasks import addition
from mor.data.tasks import base
from mor.data.tasks import khop
from mor.data.tasks import mano
from mor.data.tasks import s5

PREFIX = "task:"
TASKS: dict[str, type[base.Task]] = {
    "khop": khop.Khop,
    "mano": mano.Mano,
    "addition": addition.Addition,
    "s5": s5.S5,
}


def is_task(source: str) -> bool:
  """Returns True if `data.source` names a task."""
  return source.startswith(PREFIX)


def make(config: config_lib.DataConfig) -> base.Task:
  """Returns the task that `data.source` names.

  Raises:
    ValueError: there is no such task, or the fields of `data` do not suit it.
  """
  name = config.source.removeprefix(PREFIX)
  fields.require(name in TASKS, f"data.source={config.source!r}: no such task",
                 f"use one of {', '.join(PREFIX + known for known in TASKS)}")
  fields.require(not config.validation_source, f"data.validation_source={config.validation_source!r} with "
                 f"data.source={config.source!r}", "leave it out: held-out rows of a task are made")
  return TASKS[name](config.task)
