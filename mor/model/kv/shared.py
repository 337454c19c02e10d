"""Recursive KV sharing: the first use of a layer writes, later uses only query.

Source: MoR paper §2.2.2; raymin0223/mixture_of_recursions
model/kv_caches/cache_utils.py (`RecursiveDynamicCache`), which supports no
middle_sequence; here any scheme has its first use.
"""

from mor.model import schedule as schedule_lib
from mor.model.kv import base


def first_uses(schedule: schedule_lib.LayerSchedule) -> tuple[int, ...]:
  """For each unrolled inner layer, the index of its parameters' first use."""
  flat = [i for row in schedule.rows for i in row]
  return tuple(flat.index(i) for i in flat)


def plan(schedule: schedule_lib.LayerSchedule) -> base.KVPlan:
  """One slot per parameter set of the stack."""
  flat = [i for row in schedule.rows for i in row]
  fresh = [first == l for l, first in enumerate(first_uses(schedule))]
  return base.KVPlan(
      own=tuple(i if new else -1 for i, new in zip(flat, fresh)),
      base=tuple(-1 if new else i for i, new in zip(flat, fresh)),
      shares=True)
