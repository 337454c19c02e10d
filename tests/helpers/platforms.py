"""Programs as they are traced for another platform, run on the CPU.

  with platforms.pretend("gpu"):
    …
"""

from collections.abc import Iterator
import contextlib
from typing import Any
from unittest import mock

import jax

from mor.model import kernels

BRANCHES = ("cond", "while")  # primitives that a GPU's host drives; a `scan` has a known length


@contextlib.contextmanager
def pretend(platform: str) -> Iterator[None]:
  """Traces programs for a platform inside the `with` block; those that are compiled already are forgotten on both sides."""
  jax.clear_caches()
  try:
    with mock.patch.object(kernels, "platform", lambda: platform):
      yield
  finally:
    jax.clear_caches()


def find_branches(program: Any) -> list[str]:
  """Returns the names of primitives in a jaxpr, at any depth, that choose what runs next by a value."""
  return [e.primitive.name for e in _list_equations(program) if e.primitive.name in BRANCHES]


def find_precisions(program: Any, dtype: str = "float32") -> set[str]:
  """Returns the precisions that products of numbers of a type in a jaxpr ask for, at any depth."""
  products = [e for e in _list_equations(program) if e.primitive.name == "dot_general"]
  return {str(e.params["precision"]) for e in products if any(x.aval.dtype == dtype for x in e.invars)}


def _list_equations(program):
  found = []
  for equation in program.eqns:
    found.append(equation)
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(value, "eqns"):
        found += _list_equations(value)
  return found
