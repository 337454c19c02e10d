"""What the queries of a pass see: keys, values and the one mask rule.

A query at position i sees a key at position j <= i of its segment. Segment 0 is
padding, which no query sees.
"""

from flax import struct
import jax

from mor import types


@struct.dataclass
class KV:
  """Keys (rotated) and values of one layer, or of layers stacked before B."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array


@struct.dataclass
class KVView:
  """What the queries of one pass see, the same in all its layers.

  Attributes:
    rotation: cosine and sine of the queries' positions.
    mask_BTS: True where a query sees a key; None where the kernel makes the mask.
    index_BT: places of the fresh keys of the queries among those of the base, for a
      layer that has both; ascending, `S` for a query that must write nothing.
    segment_BT: segments, instead of a mask, if queries and keys are the same tokens
      in ascending order.
    kernel: see `kernels.choose`, static.
    bias_BTS: bias of the logits, in XLA alone; None is no bias.
    share_BT: share of each fresh key in an overlay, of all places; None is all of it, at `index_BT`.
  """

  rotation: tuple[jax.Array, jax.Array]
  mask_BTS: types.AttentionMask | None
  index_BT: jax.Array | None = None
  segment_BT: types.Segments | None = None
  kernel: str = struct.field(pytree_node=False, default="xla")
  bias_BTS: jax.Array | None = None
  share_BT: jax.Array | None = None

  def overlay(self, base: KV, fresh: KV) -> KV:
    """Returns a copy of the base in which the fresh keys of the queries stand at their places."""
    if self.share_BT is not None:
      share_BT11 = self.share_BT[:, :, None, None]
      return jax.tree.map(lambda old, new: old + (share_BT11 * (new - old)).astype(old.dtype), base, fresh)
    write = jax.vmap(lambda old, index, new: old.at[index].set(new, mode="drop"))
    return KV(write(base.k_BSKH, self.index_BT, fresh.k_BSKH), write(base.v_BSKH, self.index_BT, fresh.v_BSKH))


def make_view(kernel: str, rotation: tuple[jax.Array, jax.Array], q_position_BT: types.Positions,
              q_segment_BT: types.Segments, k_position_BS: jax.Array, k_segment_BS: jax.Array,
              index_BT: jax.Array | None = None, causal: bool = False) -> KVView:
  """Returns the view of a pass, with a mask only if its kernel reads one.

  With splash, each query takes the segment of its own key. A token whose key is hidden
  (segment 0 among the keys) then attends to the other hidden tokens, and the caller
  drops its result.

  Args:
    kernel: name of the kernel; see `kernels.choose`.
    rotation: cosine and sine of the positions of the queries.
    q_position_BT, q_segment_BT: positions and documents of the queries.
    k_position_BS, k_segment_BS: positions and documents of the keys; 0 hides a key.
    index_BT: see `KVView`.
    causal: True if queries and keys are the same tokens in ascending order, of one
      document, and hidden tokens come last: then order alone masks.
  """
  if kernel == "splash":
    return KVView(rotation, None, index_BT, k_segment_BS, kernel)
  if kernel == "cudnn" and causal:
    return KVView(rotation, None, index_BT, None, kernel)
  return KVView(rotation, visible(q_position_BT, q_segment_BT, k_position_BS, k_segment_BS), index_BT, None, kernel)


def visible(q_position_BT: types.Positions, q_segment_BT: types.Segments,
            k_position_BS: jax.Array, k_segment_BS: jax.Array) -> types.AttentionMask:
  """Marks the keys that a query sees: not later, of the same segment, no padding."""
  past_BTS = k_position_BS[:, None, :] <= q_position_BT[:, :, None]
  same_BTS = k_segment_BS[:, None, :] == q_segment_BT[:, :, None]
  return past_BTS & same_BTS & (k_segment_BS != 0)[:, None, :]
