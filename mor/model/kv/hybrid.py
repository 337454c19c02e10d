"""Hybrid: the first use's keys everywhere, overlaid by this step's own.

A step replaces the shared keys of the tokens it processes by fresh ones, in a
copy: the next step overlays the first use's keys again.

Source: MoR paper Table 15 (dagger row); raymin0223/mixture_of_recursions
model/kv_caches/cache_utils.py (`update_cache`).
"""

from mor.model import schedule as schedule_lib
from mor.model.kv import base, shared


def plan(schedule: schedule_lib.LayerSchedule) -> base.KVPlan:
  """Every unrolled layer owns a slot; later uses also read the first use's."""
  first = shared.first_uses(schedule)
  return base.KVPlan(
      own=tuple(range(len(first))),
      base=tuple(-1 if f == l else f for l, f in enumerate(first)),
      shares=True)
