"""A router whose depths are prescribed, so that cost is measured at a known depth.

The model's own router runs and gates as ever; only who stops where is ours:

  depth = the step at which the cumulative `probabilities` pass u
  u     = hash(seed, position, signs of 16 components of the entrance state)

so a token's depth is a function of that token alone, in any batch, slot or chunk.
Signs, because prefill and decoding round differently, and rounding seldom turns a
sign: the depth of a token that is computed twice is the same.
"""

from collections.abc import Sequence
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from mor import parameters
from mor import types
from mor.model.routers import base

_SIGNS = 16  # components whose signs tell tokens of one position apart
_BITS = 24  # of u


@struct.dataclass
class PrescribedPlan:
  """The inner router's plan, and every token's depth, from 1."""

  inner: Any
  depth_BT: jax.Array


class Prescribed(base.Router):
  """See the module docstring.

  Args:
    inner: router of the model, `table.make(config)`.
    probabilities: probability of each depth, 1 to R; (0, 0, 1) never leaves early.
    seed: seed of the draws.

  Raises:
    ValueError: `probabilities` are not a distribution over the R depths.
  """

  def __init__(self, inner: base.Router, probabilities: Sequence[float], seed: int = 0):
    probabilities = tuple(float(p) for p in probabilities)
    if len(probabilities) != inner.num_steps:
      raise ValueError(f"{len(probabilities)} probabilities for {inner.num_steps} depths; give one for each of "
                       f"1 to {inner.num_steps}")
    if not all(p >= 0 for p in probabilities) or not math.isclose(sum(probabilities), 1.0, abs_tol=1e-6):
      raise ValueError(f"probabilities={probabilities}; use non-negative numbers that sum to 1")
    super().__init__(inner.config)
    self.inner, self.probabilities, self.seed = inner, probabilities, seed
    self._key = (type(inner), inner.config, probabilities, seed)  # equal routers share compiled programs

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Prescribed) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)

  @property
  def parameters(self) -> tuple[parameters.Parameter, ...]:
    """Rows of the inner router."""
    return self.inner.parameters

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Returns the initial parameters of the inner router."""
    return self.inner.init(key)

  def enter(self, params, h_BTD, valid_BT, *, balance=None, train_step=None, key=None, position_BT=None) -> PrescribedPlan:
    """Draws every token's depth, and enters the inner router."""
    plan = self.inner.enter(params, h_BTD, valid_BT, balance=balance, train_step=train_step, key=key,
                            position_BT=position_BT)
    if position_BT is None:
      position_BT = jnp.broadcast_to(jnp.arange(h_BTD.shape[1])[None, :], h_BTD.shape[:2])
    depth_BT = self.depth(h_BTD, position_BT)
    return PrescribedPlan(self.inner.assign(plan, depth_BT - 1), depth_BT)

  def follow(self, plan: PrescribedPlan, score_BT: jax.Array) -> PrescribedPlan:
    """Returns the plan with the inner router's plan of the next step."""
    return plan.replace(inner=self.inner.follow(plan.inner, score_BT))

  def depth(self, h_BTD: types.Activations, position_BT: jax.Array) -> jax.Array:
    """Returns the recursion steps `[B, T]` of each token, from 1."""
    index_I = np.linspace(0, h_BTD.shape[-1] - 1, _SIGNS).astype(int)
    sign_BTI = (h_BTD[:, :, index_I] >= 0).astype(jnp.uint32)
    signature_BT = jnp.sum(sign_BTI << jnp.arange(_SIGNS, dtype=jnp.uint32)[None, None, :], axis=-1, dtype=jnp.uint32)
    hash_BT = _mix(position_BT.astype(jnp.uint32) + _mix(signature_BT + _mix(jnp.uint32(self.seed % 2**32))))
    u_BT = (hash_BT >> (32 - _BITS)).astype(jnp.int32)
    passed = [round(c * 2**_BITS) for c in np.cumsum(self.probabilities[:-1])]
    return 1 + sum(((u_BT >= c).astype(jnp.int32) for c in passed), jnp.zeros_like(u_BT))

  def select(self, plan: PrescribedPlan, h_BTD: types.Activations, alive_BT: types.Mask, step) -> base.Routing:
    """Keeps the live tokens whose prescribed depth is beyond `step`."""
    routed = self.inner.decide(plan.inner, h_BTD, alive_BT, step)
    return routed.replace(keep_BT=alive_BT & (plan.depth_BT > step), keeps_all=False)


def _mix(x: jax.Array) -> jax.Array:
  """Hashes 32 bits: the finaliser of MurmurHash3, after an odd constant for 0."""
  x = x + jnp.uint32(0x9E3779B9)
  for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
    x = (x ^ (x >> shift)) * jnp.uint32(factor)
  return x ^ (x >> 16)
