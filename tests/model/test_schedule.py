"""Sharing schemes against the closed formulas of the paper's Table 5."""

import pytest

from mor.model import schedule
from tests.helpers import tiny

SIZES = [(6, 2), (6, 3), (12, 4), (3, 3), (5, 1)]  # inner layers, recursions


def _make(sharing, num_layers, num_recursions):
  model = dict(sharing=sharing, num_layers=num_layers, num_recursions=num_recursions)
  return schedule.make(tiny.config(model=model).model)


@pytest.mark.parametrize("inner, r", SIZES)
@pytest.mark.parametrize("sharing, formula", [
    ("cycle", lambda l, layers, r: l % (layers // r)),
    ("sequence", lambda l, layers, r: l // r),
])
def test_shared_throughout(sharing, formula, inner, r):
  made = _make(sharing, inner, r)
  assert made.unrolled() == tuple(("stack", formula(l, inner, r)) for l in range(inner))


@pytest.mark.parametrize("inner, r", SIZES)
@pytest.mark.parametrize("sharing, formula", [
    ("middle_cycle", lambda l, layers, r: (l - 1) % ((layers - 2) // r) + 1),
    ("middle_sequence", lambda l, layers, r: (l - 1) // r + 1),
])
def test_unshared_ends(sharing, formula, inner, r):
  layers = inner + 2
  made = _make(sharing, layers, r)
  # The paper numbers all parameter sets: the first layer's, the stack's from 1, the last layer's.
  first = {"prelude": 0, "stack": 1, "coda": 1 + inner // r}
  paper = [0] + [formula(l, layers, r) for l in range(1, layers - 1)] + [1 + inner // r]
  assert [first[group] + row for group, row in made.unrolled()] == paper
  assert made.prelude == made.coda == 1


def test_vanilla_shares_nothing():
  made = schedule.make(tiny.config(model=tiny.VANILLA).model)
  assert made.unrolled() == tuple(("stack", l) for l in range(8))
  assert (made.prelude, made.coda, made.num_steps) == (0, 0, 1)


@pytest.mark.parametrize("sharing, layers, r, unique", [
    ("vanilla", 32, 1, 32),
    ("middle_cycle", 32, 2, 17),  # the paper's 360M
    ("middle_cycle", 32, 3, 12),
    ("middle_cycle", 34, 4, 10),
    ("cycle", 12, 3, 4),
    ("sequence", 12, 3, 4),
    ("middle_sequence", 14, 3, 6),
])
def test_counts(sharing, layers, r, unique):
  model = dict(sharing=sharing, num_layers=layers, num_recursions=r)
  if sharing == "vanilla":
    model["router"] = tiny.FIXED
  made = schedule.make(tiny.config(model=model).model)
  assert made.num_unrolled == layers == len(made.unrolled())
  assert made.num_unique == unique == len(set(made.unrolled()))
  assert made.num_steps == r
  assert made.num_steps * made.depth == layers - made.prelude - made.coda
  assert made.num_stack_rows == unique - made.prelude - made.coda


def test_only_cycles_run_the_whole_stack_in_order():
  cyclic = {name: _make(name, 8, 3 if "middle" in name else 2).cyclic
            for name in schedule.SCHEMES if name != "vanilla"}
  assert cyclic == dict(cycle=True, middle_cycle=True, sequence=False, middle_sequence=False)
