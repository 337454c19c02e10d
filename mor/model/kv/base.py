"""What a KV plan is.

A plan says, for every unrolled layer of the recursion (step r, layer i, index
r * depth + i), where its keys and values live:

  own   the slot it writes the keys of the tokens it processes to; -1: none
  base  the slot of an earlier step it also reads; -1: none

A layer sees its own fresh keys where it has them and, beneath them, its base's.
The mask rule is the same everywhere: a query at position i sees a key at
position j <= i of its segment.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class KVPlan:
  """Slots of the recursion's unrolled layers; see the module docstring."""

  own: tuple[int, ...]
  base: tuple[int, ...]

  @property
  def num_slots(self) -> int:
    return 1 + max(self.own)

  @property
  def shares(self) -> bool:
    """True where a later step reads keys that an earlier step wrote."""
    return any(b >= 0 for b in self.base)
