"""Token-choice routing: each token picks its depth once, before step 0.

  p = alpha * softmax(router(h))  (or alpha * sigmoid)      h: entrance state x
  depth = argmax(p + bias),  w = p[depth]
  while r < depth:  state = y       ("every_step", paper eq. 2.2: state = w * y)
  at r = depth:     state = x + w * y       ("additive": x + y; "residual": x + w * (y - x))

It is causal as it stands: `decide` is `select`. Balance comes from a loss on
fraction * probability, or without a loss from a bias that a training step
moves toward the underloaded depths. Auxiliary losses of a whole batch:

  z         logsumexp(logits)^2 over tokens / number of tokens
  balance   sum_i  (R * fraction_i) * mean p_i,  fraction_i of the whole batch

Source: MoR paper §2.2.1, eq. 2.2; raymin0223/mixture_of_recursions
model/mor_model/token_choice_router.py, which gates the exit only.
"""

from collections.abc import Callable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from mor import fields
from mor import model_config
from mor import parameters
from mor import types
from mor.model.routers import base
from mor.model.routers import scores


@struct.dataclass
class DepthPlan:
  """Every token's depth (0-based), its gate and its logits."""

  depth_BT: jax.Array
  gate_BT: jax.Array
  logits_BTR: jax.Array
  sums: dict  # scalars and [R] arrays over the whole recursion


class TokenChoice(base.Router):
  """See the module docstring."""

  test_config = dict(activation="softmax", alpha=1.0, sampling="none", balancing="loss")

  @classmethod
  def check(cls, config: model_config.ModelConfig) -> None:
    """Raises ValueError where the fields of a model do not suit the router."""
    super().check(config)
    router = config.router
    fields.require(router.activation in ("softmax", "sigmoid"),
                   f"router.activation={router.activation!r} with {router.name}", "use 'softmax' or 'sigmoid'")
    fields.require(router.sampling == "none", f"router.sampling={router.sampling!r} with {router.name}",
                   "it is causal already; use 'none'")
    fields.require(router.capacity_warmup_steps == 0,
                   f"router.capacity_warmup_steps={router.capacity_warmup_steps} with {router.name}",
                   "its capacity is only a buffer; use 0")
    fields.require(router.arch != "random" or router.balancing == "none",
                   f"router.balancing={router.balancing!r} with arch 'random'", "use 'none'")

  @property
  def parameters(self) -> tuple[parameters.Parameter, ...]:
    """Rows of the one score network, and of the bias of loss-free balancing."""
    rows = scores.rows(self.config, "router", "mor_router", 1, self.num_steps)
    if self.config.router.balancing == "loss_free":
      rows += (parameters.Parameter(
          "bias_R", "", "R", (None,), "model.balance_bias", official="router_bias", collection="balance"),)
    return rows

  def official_modules(self, edge: int) -> tuple[list[str], list[str]]:
    """Returns one module of all steps, which is no list without a prelude, and the layers in it."""
    step = f"model.layers.{edge}" if edge else "model.layers"
    return [step], [f"{step}.block_list.{r}" for r in range(self.num_steps)]

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Returns the initial parameters by group."""
    params = scores.init(key, self.config, 1, self.num_steps)
    return {"router": params} if params else {}

  def enter(self, params, h_BTD, valid_BT, *, balance=None, train_step=None, key=None, position_BT=None) -> DepthPlan:
    """Picks every token's depth."""
    router, steps, bias_R = self.config.router, self.num_steps, (balance or {}).get("bias_R")
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
    return DepthPlan(depth_BT, _gate(prob_BTR, depth_BT), logits_BTR, self._sums(logits_BTR, prob_BTR, depth_BT, valid_BT))

  def assign(self, plan: DepthPlan, depth_BT: jax.Array) -> DepthPlan:
    """Returns the plan with depths (0-based) that were chosen elsewhere, and their gates."""
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
    """Returns the sizes of the gather buffers; a batch with a fuller step runs that step masked."""
    del bucket
    return tuple(max(1, int(c * seq_len)) for c in self.config.capacity)

  def fractions(self, seq_len: int) -> tuple[float, ...]:
    """Returns the balanced load (R-r)/R, towards which balancing pushes."""
    del seq_len
    return tuple((self.num_steps - step) / self.num_steps for step in range(self.num_steps))

  def counts(self, valid_BT: types.Mask, train_step: jax.Array, entry_sums: Callable[[], base.Sums]) -> base.Sums:
    """Returns how many tokens choose each depth, which takes the prelude and the router."""
    del train_step
    return {"tokens": base.count(valid_BT), "chosen_R": entry_sums()["chosen_R"]}

  def losses(self, sums: base.Sums, norms: base.Sums) -> dict[str, jax.Array]:
    """Returns the losses of the module docstring, as far as the config asks for them."""
    terms = {}
    if "z" in sums:
      terms["z"] = sums["z"] / jnp.maximum(norms["tokens"], 1.0)
    if "prob_R" in sums and self.config.router.balancing == "loss":
      fraction_R = jax.lax.stop_gradient(norms["fraction"])
      balance = jnp.sum(self.num_steps * fraction_R * sums["prob_R"])
      terms["balance"] = balance / jnp.maximum(norms["tokens"], 1.0)
    return terms

  @property
  def coefs(self) -> dict[str, float]:
    """Weight of each auxiliary loss in the loss."""
    return {"z": self.config.router.z_loss_coef, "balance": self.config.router.balance_coef}

  def update(self, balance: base.Sums, sums: base.Sums, train_step: jax.Array) -> base.Sums:
    """Moves the bias of loss-free balancing toward the underloaded depths."""
    router = self.config.router
    if router.balancing != "loss_free":
      return balance
    load_R = sums["chosen_R"] / jnp.maximum(sums["tokens"], 1.0)
    bias_R = balance["bias_R"] + router.bias_update_rate * jnp.sign(jnp.mean(load_R) - load_R)
    return {"bias_R": jnp.where(train_step < router.balance_warmup_steps, 0.0, bias_R)}

  def select(self, plan: DepthPlan, h_BTD: types.Activations, alive_BT: types.Mask, step) -> base.Routing:
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


def _gate(prob_BTR: jax.Array, depth_BT: jax.Array) -> jax.Array:
  return jnp.take_along_axis(prob_BTR, depth_BT[:, :, None], axis=-1)[:, :, 0]
