"""A gate that halts: after each step a token leaves with a probability of its own.

One gate serves all steps. With h_r the state after step r - 1, normed without parameters:

  l_r     = sigmoid(w . rms_norm(h_r) / temperature + b)     probability to leave before step r
  share_r = prod_{1 <= i <= r} (1 - l_i),  share_0 = 1       share of the token in step r
  p_r     = share_r-1 - share_r,  p_R = share_R-1            distribution of its number of steps

Training is soft (`base.py`): the output is the expectation sum_r p_r h_r, and a key of step
r counts share_r, so what is hidden in decoding is hidden as far in training. Decoding is
hard: a token leaves as soon as 1 - share_r, the probability that it has left, reaches
`halting_threshold`. Where the gate is sure, both are the same. There is no top-k, no look
ahead and no second predictor. The loss pulls the distribution to the uniform one, so that no
step starves:

  halting  KL(p || uniform) = log R - sum_r share_r-1 H(l_r), mean over tokens

Nothing in it belongs to a step, so the model runs any number of them (`model/depths.py`).
Training runs every token at every step. `capacity`, `activation`, `alpha` and `gating` have
no effect.

Source: Ouro (Zhu et al. 2025, arXiv:2510.25741, §3: exit gate, entropy-regularised exit
distribution, exit by its cumulative sum). There the loss is the expectation over the heads
of all steps, which a coda would have to run R times; here the state is.
"""

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
class HaltingPlan:
  """The gate, the tokens that are no padding, and the share of each in the step before."""

  params: dict
  valid_BT: jax.Array
  log_share_BT: jax.Array


class Halting(base.Router):
  """See the module docstring."""

  soft = True
  cumulative = True
  any_depth = True
  test_config = dict(sampling="none")

  @classmethod
  def check(cls, config: model_config.ModelConfig) -> None:
    """Raises ValueError where the fields of a model do not suit the router."""
    super().check(config)
    router = config.router
    fields.require(router.arch != "random", f"router.arch={router.arch!r} with {router.name}",
                   "a random gate learns nothing; use 'linear', 'mlp' or 'wide_mlp'")
    fields.require(router.sampling == "none", f"router.sampling={router.sampling!r} with {router.name}",
                   "it is causal already; use 'none'")
    fields.require(router.balancing == "none", f"router.balancing={router.balancing!r} with {router.name}",
                   "router.halting_coef balances its steps; use 'none'")
    fields.require(router.capacity_warmup_steps == 0 and router.balance_warmup_steps == 0,
                   f"router.capacity_warmup_steps={router.capacity_warmup_steps}, balance_warmup_steps="
                   f"{router.balance_warmup_steps} with {router.name}", "it has no capacity and no warm-up; use 0")
    fields.require(router.z_loss_coef == 0, f"router.z_loss_coef={router.z_loss_coef} with {router.name}",
                   "it has no z-loss; use 0")

  @property
  def parameters(self) -> tuple[parameters.Parameter, ...]:
    """Rows of the gate."""
    bias = parameters.Parameter("router/bias", "", "O", (None,), "model.router.{i}.bias", count=1, widths=(("O", 1),))
    return *scores.rows(self.config, "router", "", 1, 1), bias

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Returns a gate that leaves with the probability 1/R after each step."""
    bias = -jnp.log(jnp.maximum(self.num_steps - 1.0, 1.0))
    return {"router": {**scores.init(key, self.config, 1, 1), "bias": jnp.full((1, 1), bias, jnp.float32)}}

  def fractions(self, seq_len: int) -> tuple[float, ...]:
    """Returns the load of the uniform distribution, (R-r)/R, towards which the loss pulls."""
    del seq_len
    return tuple((self.num_steps - step) / self.num_steps for step in range(self.num_steps))

  def enter(self, params, h_BTD, valid_BT, *, balance=None, train_step=None, key=None, position_BT=None) -> HaltingPlan:
    """Starts every token with its whole share."""
    del h_BTD, balance, train_step, key, position_BT
    return HaltingPlan(params["router"], valid_BT, jnp.zeros(valid_BT.shape, jnp.float32))

  def follow(self, plan: HaltingPlan, score_BT: jax.Array) -> HaltingPlan:
    """Returns the plan with the share of the step before, whose logarithm is its score."""
    return plan.replace(log_share_BT=score_BT)

  def select(self, plan: HaltingPlan, h_BTD: types.Activations, alive_BT: types.Mask, step) -> base.Routing:
    """Runs every token, and weighs it by its share; marks what decoding would keep."""
    logit_BT, routed = self._route(plan, h_BTD, alive_BT, step)
    leaves_BT = jax.nn.sigmoid(logit_BT)
    entropy_BT = leaves_BT * jax.nn.softplus(-logit_BT) + (1.0 - leaves_BT) * jax.nn.softplus(logit_BT)
    entropy_BT = jnp.where(step == 0, 0.0, jnp.exp(plan.log_share_BT) * entropy_BT)
    sums = {"entropy_R": base.total(entropy_BT, plan.valid_BT),  # of one step; the recursion stacks them
            "share_R": base.total(jnp.exp(routed.score_BT), plan.valid_BT)}
    return routed.replace(log_share_BT=routed.score_BT, sums=sums)

  def decide(self, plan: HaltingPlan, h_BTD: types.Activations, alive_BT: types.Mask, step) -> base.Routing:
    """Keeps the live tokens that have left with a probability below the threshold."""
    return self._route(plan, h_BTD, alive_BT, step)[1]

  def _route(self, plan, h_BTD, alive_BT, step):
    """Returns the logit of the gate, and the routing of a hard step, whose score is the log of the share."""
    x_BTD = h_BTD.astype(jnp.float32)
    square_BT1 = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
    x_BTD = x_BTD * jax.lax.rsqrt(square_BT1 + self.config.norm_eps) / self.config.router.temperature
    logit_BT = scores.logits(plan.params, 0, x_BTD)[:, :, 0] + plan.params["bias"][0, 0]
    log_share_BT = jnp.where(step == 0, 0.0, plan.log_share_BT - jax.nn.softplus(logit_BT))
    keep_BT = alive_BT & (log_share_BT > jnp.log1p(-jnp.float32(self.config.router.halting_threshold)))
    return logit_BT, base.Routing(keep_BT=keep_BT, score_BT=log_share_BT,
                                  keeps_all=isinstance(step, int) and step == 0)

  def losses(self, sums: base.Sums, norms: base.Sums) -> dict[str, jax.Array]:
    """Returns the divergence of the exit distributions from the uniform one."""
    divergence = jnp.log(jnp.float32(self.num_steps)) * sums["tokens"] - jnp.sum(sums["entropy_R"])
    return {"halting": divergence / jnp.maximum(norms["tokens"], 1.0)}

  @property
  def coefs(self) -> dict[str, float]:
    """Weight of each auxiliary loss in the loss."""
    return {"halting": self.config.router.halting_coef}
