"""Recursion-wise caching: each step keeps the keys of the tokens it processed.

Source: MoR paper §2.2.2.
"""

from mor.model import schedule as schedule_lib
from mor.model.kv import base


def plan(schedule: schedule_lib.LayerSchedule) -> base.KVPlan:
  """Every unrolled layer owns a slot and reads no other."""
  num = schedule.num_steps * schedule.depth
  return base.KVPlan(own=tuple(range(num)), base=(-1,) * num, shares=False)
