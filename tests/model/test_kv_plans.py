"""Slot tables of the KV plans against the layer-to-slot maps of the reference.

The reference keeps one cache of all layers: slot 0 is the first layer's when it
is unshared, then come the recursion's, then the last layer's. Here the recursion
has its own slots from 0.
"""

import pytest

from mor.decode import cache
from mor.model import recursion
from mor.model import schedule
from mor.model.kv import plans
from tests.helpers import tiny

SHARED = [name for name in schedule.SCHEMES if name != "vanilla"]


def _schedule(sharing, inner, r):
  layers = inner + 2 * schedule.SCHEMES[sharing][0]
  model = dict(sharing=sharing, num_layers=layers, num_recursions=r, router=tiny.FIXED)
  return schedule.make(tiny.config(model=model).model)


def _read(plan):
  """The slot whose keys a layer starts from: its base's, else its own."""
  return [base if base >= 0 else own for own, base in zip(plan.own, plan.base)]


@pytest.mark.parametrize("inner, r", [(6, 2), (6, 3), (12, 4)])
@pytest.mark.parametrize("sharing, formula", [
    ("cycle", lambda l, b, r: l % b),
    ("middle_cycle", lambda l, b, r: 1 + (l - 1) % b),
    ("sequence", lambda l, b, r: l // r),
    ("middle_sequence", lambda l, b, r: 1 + (l - 1) // r),  # the official code has none
])
def test_shared_slots_are_the_references(sharing, formula, inner, r):
  made = _schedule(sharing, inner, r)
  slots = [made.prelude + slot for slot in _read(plans.PLANS["shared"](made))]
  layers = range(made.prelude, made.prelude + inner)
  assert slots == [formula(l, inner // r, r) for l in layers]
  assert plans.PLANS["shared"](made).num_slots == inner // r


def test_tables_of_two_layers_and_three_steps():
  made = _schedule("middle_cycle", 6, 3)
  slots = {name: (plan(made).own, plan(made).base) for name, plan in plans.PLANS.items()}
  none = -1
  assert slots == {
      "recursion_wise": ((0, 1, 2, 3, 4, 5), (none,) * 6),
      "shared": ((0, 1, none, none, none, none), (none, none, 0, 1, 0, 1)),
      "hybrid": ((0, 1, 2, 3, 4, 5), (none, none, 0, 1, 0, 1)),
  }


def test_tables_of_sequences():
  made = _schedule("sequence", 6, 3)
  plan = plans.PLANS["shared"](made)
  assert plan.own == (0, -1, -1, 1, -1, -1)
  assert plan.base == (-1, 0, 0, -1, 1, 1)
  assert plans.PLANS["hybrid"](made).base == (-1, 0, 0, -1, 3, 3)


@pytest.mark.parametrize("sharing", SHARED)
@pytest.mark.parametrize("name", plans.PLANS)
def test_every_plan_is_sound(name, sharing):
  made = _schedule(sharing, 12, 3)
  plan = plans.PLANS[name](made)
  written = [slot for slot in plan.own if slot >= 0]
  assert len(plan.own) == len(plan.base) == made.num_steps * made.depth
  assert sorted(written) == list(range(plan.num_slots)), "a slot is written by exactly one layer"
  flat = [row for rows in made.rows for row in rows]
  for l, (own, base) in enumerate(zip(plan.own, plan.base)):
    assert own >= 0 or base >= 0, "a layer reads nothing"
    if base >= 0:
      writer = plan.own.index(base)
      assert writer < l, "a base is read before it is written"
      assert flat[writer] == flat[l], "a base holds the keys of other parameters"
  assert plan.shares == (name != "recursion_wise")


@pytest.mark.parametrize("name", plans.PLANS)
def test_one_recursion_owns_all_its_keys(name):
  plan = plans.PLANS[name](schedule.make(tiny.config(model=tiny.VANILLA).model))
  assert plan.own == tuple(range(8))
  assert plan.base == (-1,) * 8


@pytest.mark.parametrize("own, base, shares, message", [
    ((0, -1), (-1, -1), True, "layer 1 .* sees no key; give it"),
    ((0, 1), (1, -1), True, "layer 0 .* no earlier layer writes slot 1"),
    ((0, 1), (-1, 1), True, "layer 1 .* no earlier layer writes slot 1"),
    ((0, 0), (-1, -1), False, "layer 1 .* an earlier layer writes slot 0; give it slot 1"),
    ((0, -1), (-1, 0), False, "layer 1 .* shares=False.*use shares=True"),
])
def test_a_plan_that_means_nothing_raises_when_it_is_made(own, base, shares, message):
  with pytest.raises(ValueError, match=message):
    plans.KVPlan(own, base, shares)


@pytest.mark.parametrize("own, base, message", [
    ((0, 1, -1, 2, -1, 3), (-1, -1, 0, -1, 0, -1), r"step 1 have own=\(-1, 2\).*scanned"),
    ((0, 1, -1, -1, -1, -1), (-1, -1, 1, 0, 1, 0), r"step 1 have base=\(1, 0\).*use \(0, 1\)"),
    ((0, 1, 2, 3, -1, -1), (-1, -1, 0, 1, 0, 1), "all after the first must be alike"),
    ((0, 1), (-1, -1), "KV plan of 2 layers for a recursion of 6"),
])
def test_a_plan_that_no_pass_can_express_raises_when_the_model_is_built(own, base, message, monkeypatch):
  """Two scanned layers, three steps; in training and in decoding."""
  monkeypatch.setitem(plans.PLANS, "shared", lambda made: plans.KVPlan(own, base, True))
  model = tiny.config(model=dict(kv_plan="shared")).model
  with pytest.raises(ValueError, match=message):
    recursion.Recursion(model)
  with pytest.raises(ValueError, match=message):
    cache.Tables(model, None)
