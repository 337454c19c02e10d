"""KV plans: which slot each unrolled layer of the recursion writes to, and which it reads.

For the unrolled layer of index r * depth + i (recursion step r, layer i) a plan says

  own   slot to which the layer writes the keys of the tokens it processes; -1: none
  base  slot of an earlier step that the layer reads too; -1: none

and whether the plan `shares`: then the first step runs every token, kept or not,
for the keys that later steps read. A layer sees its own fresh keys, if it writes
any, and beneath them those of its base.

  recursion_wise  each step keeps the keys of the tokens it processed
  shared          the first use of a parameter set writes, later uses only query
  hybrid          the keys of the first use, overlaid by those of the step itself, in
                  a copy: the next step overlays the first use again

A new plan is a function from a schedule to a `KVPlan`, and a line in `PLANS`.

Source: MoR paper §2.2.2 and Table 15 (dagger row); raymin0223/mixture_of_recursions
model/kv_caches/cache_utils.py (`RecursiveDynamicCache`, `update_cache`), which
supports no middle_sequence; here any scheme has its first use.
"""

import dataclasses

from mor.model import schedule as schedule_lib


@dataclasses.dataclass(frozen=True)
class KVPlan:
  """Slots of the unrolled layers of the recursion; see the module docstring."""

  own: tuple[int, ...]
  base: tuple[int, ...]
  shares: bool

  @property
  def num_slots(self) -> int:
    """Number of slots that some layer writes to."""
    return 1 + max(self.own)


def recursion_wise(schedule: schedule_lib.LayerSchedule) -> KVPlan:
  """Gives every unrolled layer a slot of its own; no layer reads another slot."""
  num_layers = schedule.num_steps * schedule.depth
  return KVPlan(own=tuple(range(num_layers)), base=(-1,) * num_layers, shares=False)


def shared(schedule: schedule_lib.LayerSchedule) -> KVPlan:
  """Gives every parameter set of the stack one slot."""
  flat = [i for row in schedule.rows for i in row]
  fresh = [first == layer for layer, first in enumerate(_first_uses(schedule))]
  return KVPlan(
      own=tuple(i if new else -1 for i, new in zip(flat, fresh)),
      base=tuple(-1 if new else i for i, new in zip(flat, fresh)),
      shares=True)


def hybrid(schedule: schedule_lib.LayerSchedule) -> KVPlan:
  """Gives every unrolled layer a slot of its own; later uses also read the slot of the first use."""
  first = _first_uses(schedule)
  return KVPlan(
      own=tuple(range(len(first))),
      base=tuple(-1 if f == layer else f for layer, f in enumerate(first)),
      shares=True)


def _first_uses(schedule: schedule_lib.LayerSchedule) -> tuple[int, ...]:
  """Returns, for each unrolled inner layer, the index of the first use of its parameters."""
  flat = [i for row in schedule.rows for i in row]
  return tuple(flat.index(i) for i in flat)


PLANS = {"recursion_wise": recursion_wise, "shared": shared, "hybrid": hybrid}
