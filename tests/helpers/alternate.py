"""The router of docs/extending.md, which a suite runs under its own name without knowing it.

  python -m pytest -p tests.helpers.alternate -k alternate tests/model/test_transformer.py

As a plugin of pytest this file puts the router into the table before tests are collected.
"""

import pathlib
import re

NAME = "alternate"
PAGE = pathlib.Path(__file__).parents[2] / "docs/extending.md"


def load() -> type:
  """Returns the class that the page defines."""
  source, = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
  namespace = {}
  exec(source, namespace)
  return namespace["Alternate"]


def pytest_sessionstart(session) -> None:
  """Registers the router, once conftest.py has set jax up."""
  del session
  from mor.model.routers import table
  table.ROUTERS[NAME] = load()
