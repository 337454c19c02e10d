"""What a KV plan is, and what a query sees.

A plan says, for every unrolled layer of the recursion (step r, layer i, index
r * depth + i), where its keys and values live:

  own   the slot it writes the keys of the tokens it processes to; -1: none
  base  the slot of an earlier step it also reads; -1: none

and whether the plan `shares`: its first step then runs every token, kept or
not, for the keys that others read.

A layer sees its own fresh keys where it has them and, beneath them, its base's.
The mask rule is one: a query at position i sees a key at position j <= i of its
segment. Segment 0 is padding, which nobody sees.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from mor import types


@dataclasses.dataclass(frozen=True)
class KVPlan:
  """Slots of the recursion's unrolled layers; see the module docstring."""

  own: tuple[int, ...]
  base: tuple[int, ...]
  shares: bool

  @property
  def num_slots(self) -> int:
    return 1 + max(self.own)


@struct.dataclass
class KV:
  """Keys (rotated) and values of one layer, or of layers stacked before B."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array


@struct.dataclass
class KVView:
  """What the queries of one pass see; the same for all its layers.

  Attributes:
    rotation: cosine and sine of the queries' positions.
    mask_BTS: True where a query sees a key; None where the kernel makes the mask.
    index_BT: where the queries' own keys belong among the base's keys, when a
      layer has both; ascending, `S` for a query that must write nothing.
    segment_BT: instead of a mask: queries and keys are the same tokens in
      ascending order, of these segments.
    kernel: see `kernels.choose`, static.
  """

  rotation: tuple[jax.Array, jax.Array]
  mask_BTS: types.AttentionMask | None
  index_BT: jax.Array | None = None
  segment_BT: types.Segments | None = None
  kernel: str = struct.field(pytree_node=False, default="xla")

  def overlay(self, base: KV, fresh: KV) -> KV:
    """The base's keys with the queries' own fresh ones in their places, in a copy."""
    write = jax.vmap(lambda old, index, new: old.at[index].set(new, mode="drop"))
    return KV(write(base.k_BSKH, self.index_BT, fresh.k_BSKH), write(base.v_BSKH, self.index_BT, fresh.v_BSKH))


def see(kernel: str, rotation: tuple[jax.Array, jax.Array], q_position_BT: types.Positions,
        q_segment_BT: types.Segments, k_position_BS: jax.Array, k_segment_BS: jax.Array,
        index_BT: jax.Array | None = None, causal: bool = False) -> KVView:
  """The view of a pass, with a mask only where its kernel reads one.

  Where `causal`, a query sees a key that stands no later: both are the same tokens
  in ascending order, of one document, and what is hidden comes after all the rest.

  Splash gives each query its key's segment: a token whose key is hidden (segment 0
  among the keys) attends to the other hidden ones, and what it gives is to be dropped.
  """
  if kernel == "splash":
    return KVView(rotation, None, index_BT, k_segment_BS, kernel)
  if kernel == "cudnn" and causal:
    return KVView(rotation, None, index_BT, None, kernel)
  return KVView(rotation, visible(q_position_BT, q_segment_BT, k_position_BS, k_segment_BS), index_BT, None, kernel)


def visible(q_position_BT: types.Positions, q_segment_BT: types.Segments,
            k_position_BS: jax.Array, k_segment_BS: jax.Array) -> types.AttentionMask:
  """The one mask rule: not later, same segment, not padding."""
  past_BTS = k_position_BS[:, None, :] <= q_position_BT[:, :, None]
  same_BTS = k_segment_BS[:, None, :] == q_segment_BT[:, :, None]
  return past_BTS & same_BTS & (k_segment_BS != 0)[:, None, :]
