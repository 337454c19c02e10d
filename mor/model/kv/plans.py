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

A new plan is a function from a schedule to a `KVPlan`, and a line in `PLANS`. What a
pass cannot express raises when the plan is made.

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

  def __post_init__(self):
    written: set[int] = set()
    for layer, (own, base) in enumerate(zip(self.own, self.base, strict=True)):
      where = f"KV plan: layer {layer} of the recursion has own={own}, base={base}"
      if own < 0 and base < 0:
        raise ValueError(f"{where}, so it sees no key; give it a slot of its own or a base")
      if base >= 0 and base not in written:
        raise ValueError(f"{where}, but no earlier layer writes slot {base}; read one of {sorted(written)}")
      if own in written:
        raise ValueError(f"{where}, but an earlier layer writes slot {own}; give it slot {1 + max(written)}")
      if base >= 0 and not self.shares:
        raise ValueError(f"{where}, but shares=False, so the first step may have no key of a token; use shares=True")
      written |= {own} - {-1}

  @property
  def num_slots(self) -> int:
    """Number of slots that some layer writes to."""
    return 1 + max(self.own)


def make(name: str, schedule: schedule_lib.LayerSchedule) -> KVPlan:
  """Returns the plan of a name, once the passes over this schedule can run it.

  Raises:
    ValueError: the plan asks for what a pass cannot express.
  """
  plan = PLANS[name](schedule)
  check(plan, schedule)
  return plan


def check(plan: KVPlan, schedule: schedule_lib.LayerSchedule) -> None:
  """Raises ValueError unless the passes over this schedule can run the plan.

  If every step runs the whole stack in order, its layers are scanned: they follow one
  rule, all their bases are the layers of the first step, and later steps are alike.
  """
  depth, num_layers = schedule.depth, sum(len(row) for row in schedule.rows)
  if len(plan.own) != num_layers:
    raise ValueError(f"KV plan of {len(plan.own)} layers for a recursion of {num_layers}; give each one own and one "
                     "base")
  if not schedule.cyclic:
    return
  rules = []
  for step in range(schedule.num_steps):
    place = slice(step * depth, (step + 1) * depth)
    own, base = plan.own[place], plan.base[place]
    kinds = {(o >= 0, b >= 0) for o, b in zip(own, base)}
    if len(kinds) > 1:
      raise ValueError(f"KV plan: the layers of step {step} have own={own}, base={base}, but they are scanned, so all "
                       "or none must write, and all or none must read a base")
    if base[0] >= 0 and base != plan.own[:depth]:
      raise ValueError(f"KV plan: the layers of step {step} have base={base}, but a scanned layer can read the same "
                       f"layer of step 0 alone; use {plan.own[:depth]}")
    rules.append(kinds.pop())
  alike = rules[1 if plan.shares else 0:]
  if len(set(alike)) > 1:
    raise ValueError(f"KV plan: the steps have (writes, reads a base) {rules}, but they are scanned, so all "
                     f"{'after the first ' if plan.shares else ''}must be alike")


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
