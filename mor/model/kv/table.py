"""KV plans by name. A new plan is one file with `plan(schedule)` and one line."""

from mor.model.kv import hybrid, recursion_wise, shared

PLANS = {
    "recursion_wise": recursion_wise.plan,
    "shared": shared.plan,
    "hybrid": hybrid.plan,
}
