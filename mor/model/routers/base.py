"""What a router is. It only routes: it never runs layers.

A router is built once per model from its config, holds no parameters, and has

  init(key)                          its parameters ({} if none)
  enter(params, h, valid, ...)       what is decided once, before step 0; in decoding
                                     `position_BT` says where the tokens stand
  select(plan, h, alive, step)       training and oracle; may see the future
  decide(plan, h, alive, step)       pointwise and causal
  widths(seq_len, bucket)            static number of tokens each step gathers
  bounded                            True if no row ever keeps more than that; a
                                     step of another router that does runs masked

`select` and `decide` return a `Routing`, which says how the stack's output y
enters the state of the tokens it keeps:

  state' = [carry] * state + entry * state_at_entry + gate * (y [- state, of a change])
"""

from collections.abc import Mapping

from flax import struct
import jax
import jax.numpy as jnp

from mor import types


@struct.dataclass
class Routing:
  """One step's routing.

  Attributes:
    keep_BT: True where the step processes the token; False on padding.
    score_BT: raw router logit, float32.
    gate_BT: factor on the stack's output, float32; None is 1.
    entry_BT: factor on the state at the entrance; None is 0.
    carry: whether the state itself is kept (a residual around the step).
    change: whether the gate is on the stack's change of the state, not its output.
    keeps_all: whether it is known, while tracing, that every live token is kept.
    sums: statistics and auxiliary losses of this step, summed over tokens; the
      recursion itself counts `tokens`, `candidates` and `kept`.
  """

  keep_BT: types.Mask
  score_BT: jax.Array
  gate_BT: jax.Array | None = None
  entry_BT: jax.Array | None = None
  carry: bool = struct.field(pytree_node=False, default=False)
  change: bool = struct.field(pytree_node=False, default=False)
  keeps_all: bool = struct.field(pytree_node=False, default=False)
  sums: Mapping[str, jax.Array] = struct.field(default_factory=dict)


def count(mask_BT: types.Mask) -> jax.Array:
  """Number of True entries, float32."""
  return jnp.sum(mask_BT, dtype=jnp.float32)


def total(value_BT: jax.Array, mask_BT: types.Mask) -> jax.Array:
  """Sum of the values where the mask is True; other values may be anything."""
  return jnp.sum(jnp.where(mask_BT, value_BT, 0.0))
