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
  found = []
  for equation in program.eqns:
    if equation.primitive.name in BRANCHES:
      found.append(equation.primitive.name)
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
      if hasattr(value, "eqns"):
        found += find_branches(value)
  return found
