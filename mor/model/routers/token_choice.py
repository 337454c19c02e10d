"""Token-choice routing: each token picks its depth once, before step 0.

  p = alpha * softmax(router(h))  (or alpha * sigmoid)      h: entrance state x
  depth = argmax(p + bias),  w = p[depth]
  while r < depth:  state = y       ("every_step", paper eq. 2.2: state = w * y)
  at r = depth:     state = x + w * y       ("additive": x + y; "residual": x + w * (y - x))

It is causal as it stands: `decide` is `select`. Balance comes from a loss on
fraction * probability, or without a loss from a bias that a training step
moves toward the underloaded depths.

Source: MoR paper §2.2.1, eq. 2.2; raymin0223/mixture_of_recursions
model/mor_model/token_choice_router.py, which gates the exit only.
"""

from flax import struct
import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import types
from mor.model.routers import base
from mor.model.routers import scores


@struct.dataclass
class Plan:
  """Every token's depth (0-based), its gate and its logits."""

  depth_BT: jax.Array
  gate_BT: jax.Array
  logits_BTR: jax.Array
  sums: dict  # scalars and [R] arrays over the whole recursion


class TokenChoice:
  """See the module docstring."""

  bounded = False

  def __init__(self, config: config_lib.ModelConfig):
    self.config = config
    self.num_steps = config.num_recursions

  def init(self, key: jax.Array) -> dict:
    params = scores.init(key, self.config, 1, self.num_steps)
    return {"router": params} if params else {}

  def enter(self, params, h_BTD, valid_BT, *, bias_R=None, train_step=None, key=None, position_BT=None) -> Plan:
    """Picks every token's depth."""
    router, steps = self.config.router, self.num_steps
    if router.arch == "random":
      key = jax.random.key(0) if key is None else key
      logits_BTR = jnp.stack(
          [scores.uniform(jax.random.fold_in(key, r), h_BTD.shape[:2], position_BT) for r in range(steps)], axis=-1)
    else:
      logits_BTR = scores.logits(params["router"], 0, h_BTD / router.temperature)
    prob_BTR = self._probabilities(logits_BTR)
    biased_BTR = prob_BTR if bias_R is None else prob_BTR + bias_R[None, None, :]
    depth_BT = jnp.argmax(jax.lax.stop_gradient(biased_BTR), axis=-1)
    if router.balance_warmup_steps and train_step is not None:
      depth_BT = jnp.where(train_step < router.balance_warmup_steps, steps - 1, depth_BT)
    return Plan(depth_BT, _gate(prob_BTR, depth_BT), logits_BTR, self._sums(logits_BTR, prob_BTR, depth_BT, valid_BT))

  def assign(self, plan: Plan, depth_BT: jax.Array) -> Plan:
    """The plan with depths (0-based) that were chosen elsewhere, and their gates."""
    return plan.replace(depth_BT=depth_BT, gate_BT=_gate(self._probabilities(plan.logits_BTR), depth_BT))

  def _probabilities(self, logits_BTR):
    router = self.config.router
    return router.alpha * logits_BTR if router.arch == "random" else scores.activate(router, logits_BTR)

  def _sums(self, logits_BTR, prob_BTR, depth_BT, valid_BT) -> dict:
    chosen_BTR = jax.nn.one_hot(depth_BT, self.num_steps, dtype=jnp.float32) * valid_BT[:, :, None]
    sums = {"chosen_R": jnp.sum(chosen_BTR, axis=(0, 1))}
    if self.config.router.arch == "random":
      return sums
    share_BTR = prob_BTR / jnp.maximum(jnp.sum(prob_BTR, axis=-1, keepdims=True), 1e-20)
    entropy_BT = -jnp.sum(share_BTR * jnp.log(jnp.maximum(share_BTR, 1e-20)), axis=-1)
    return {
        **sums,
        "prob_R": jnp.sum(prob_BTR * valid_BT[:, :, None], axis=(0, 1)),
        "entropy": base.total(jax.lax.stop_gradient(entropy_BT), valid_BT),
        "z": base.total(jnp.square(jax.nn.logsumexp(logits_BTR, axis=-1)), valid_BT),
    }

  def widths(self, seq_len: int, bucket: int | None = None) -> tuple[int, ...]:
    """Gather buffers; a batch with a fuller step runs that step masked."""
    del bucket
    return tuple(max(1, int(c * seq_len)) for c in self.config.capacity)

  def select(self, plan: Plan, h_BTD: types.Activations, alive_BT: types.Mask, step) -> base.Routing:
    """Keeps the live tokens whose depth is at least `step`."""
    del h_BTD
    gating = self.config.router.gating
    keep_BT = alive_BT & (plan.depth_BT >= step)
    last_BT = plan.depth_BT == step
    if gating == "every_step":
      gate_BT = plan.gate_BT
    elif gating in ("weighted", "residual"):
      gate_BT = jnp.where(last_BT, plan.gate_BT, 1.0)
    else:
      gate_BT = None
    entry_BT = last_BT.astype(jnp.float32)
    if gating == "residual":
      entry_BT = entry_BT * (1.0 - plan.gate_BT)
    return base.Routing(keep_BT=keep_BT, score_BT=jnp.take(plan.logits_BTR, step, axis=-1), gate_BT=gate_BT,
                        entry_BT=entry_BT, keeps_all=isinstance(step, int) and step == 0)

  decide = select


def _gate(prob_BTR: jax.Array, depth_BT: jax.Array) -> jax.Array:
  return jnp.take_along_axis(prob_BTR, depth_BT[:, :, None], axis=-1)[:, :, 0]
