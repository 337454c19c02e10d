"""Expert-choice routing: each step keeps its best-scoring tokens.

With candidates A the tokens kept by the step before (hierarchical filtering):

  g = alpha * act(router_r(h / temperature))        h: un-normalised residual
  A' = the max(1, int(capacity_r * length)) best of A by g
  h[A'] += g[A'] * stack(h[A'])      or += stack(h[A']), or += g[A'] * (stack(h[A']) - h[A'])

Top-k sees the whole sequence, future included. To route causally at inference,
a binary cross-entropy teaches the router (or a second router on detached
states) to predict its own top-k: `decide` keeps a live token where that logit
is >= 0; a step of capacity 1 keeps every live token. Auxiliary losses of a whole batch:

  sampling  sum_r  BCE over the candidates of step r / number of candidates
  z         sum_r  logit^2 over the candidates of step r / number of candidates

Source: MoR paper §2.2.1; raymin0223/mixture_of_recursions
model/mor_model/expert_choice_router.py (no causal mode there; its sampling loss is
divided by the micro-batch only, so its coefficient grows with accumulation). `length`
counts the row's tokens without padding, so padding never changes a row.
"""

from collections.abc import Callable
import math
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mor import fields
from mor import model_config
from mor import parameters
from mor import types
from mor.model.routers import base
from mor.model.routers import scores

WARMUP_BUCKETS = 4  # static widths compiled during a capacity warm-up


@struct.dataclass
class ExpertPlan:
  """What the steps need: parameters, counts and randomness."""

  params: dict
  aux_params: dict
  kept_RB: jax.Array  # tokens each step keeps of each row
  key: jax.Array
  position_BT: jax.Array | None  # of the tokens, where they are not a row's first ones


def top(score_BT: jax.Array, alive_BT: types.Mask, kept_B: jax.Array) -> types.Mask:
  """Marks the `kept_B` best-scoring live tokens of each row; the earlier of equal ones.

  The kept_B-th largest score is found bit by bit: 32 counts of a row, where a sort of
  it takes the TPU's compiler minutes, and every `top_k` of so many is a sort.
  """
  score_BT = jnp.where(alive_BT, score_BT.astype(jnp.float32) + 0.0, -jnp.inf)  # + 0.0: there is one zero
  bits_BT = jax.lax.bitcast_convert_type(score_BT, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  order_BT = jnp.where(bits_BT >= sign, ~bits_BT, bits_BT | sign)  # ordered as the scores are

  def count_B(chosen_BT):
    return jnp.sum(chosen_BT, axis=1, dtype=kept_B.dtype)

  def narrow(i, least_B):
    tried_B = least_B | (sign >> jnp.asarray(i, jnp.uint32))
    return jnp.where(count_B(order_BT >= tried_B[:, None]) >= kept_B, tried_B, least_B)

  least_B1 = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(kept_B.shape, jnp.uint32))[:, None]
  above_BT, equal_BT = order_BT > least_B1, order_BT == least_B1
  room_B = kept_B - count_B(above_BT)
  return above_BT | (equal_BT & (jnp.cumsum(equal_BT, axis=1, dtype=kept_B.dtype) <= room_B[:, None]))


class ExpertChoice(base.Router):
  """See the module docstring."""

  looks_ahead = True
  bounded = True

  def __init__(self, config: model_config.ModelConfig):
    super().__init__(config)
    self.num_buckets = WARMUP_BUCKETS if config.router.capacity_warmup_steps else 0

  @classmethod
  def check(cls, config: model_config.ModelConfig) -> None:
    """Raises ValueError where the fields of a model do not suit the router."""
    super().check(config)
    router = config.router
    fields.require(router.activation != "softmax", f"router.activation={router.activation!r} with {router.name}",
                   "use 'sigmoid', 'tanh' or 'none'")
    fields.require(router.gating != "every_step", f"router.gating={router.gating!r} with {router.name}",
                   "use 'weighted', 'additive' or 'residual'")
    fields.require(router.balancing == "none", f"router.balancing={router.balancing!r} with {router.name}",
                   "its load is fixed by capacity; use 'none'")

  @property
  def parameters(self) -> tuple[parameters.Parameter, ...]:
    """Rows of a score network for each step, and of the second one that predicts its choice."""
    rows = scores.rows(self.config, "router", "mor_router", self.num_steps, 1)
    if self.config.router.sampling == "aux_router":
      rows += scores.rows(self.config, "aux_router", "mlp_router", self.num_steps, 1)
    return rows

  def official_modules(self, edge: int) -> tuple[list[str], list[str]]:
    """Returns a module of each step, and the layers in it."""
    steps = [f"model.layers.{edge + r}" for r in range(self.num_steps)]
    return steps, [f"{step}.block" for step in steps]

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Returns the initial parameters by group."""
    main_key, aux_key = jax.random.split(key)
    params = {"router": scores.init(main_key, self.config, self.num_steps, 1)}
    if self.config.router.sampling == "aux_router":
      params["aux_router"] = scores.init(aux_key, self.config, self.num_steps, 1)
    return {name: tree for name, tree in params.items() if tree}

  def enter(self, params, h_BTD, valid_BT, *, balance=None, train_step=None, key=None, position_BT=None) -> ExpertPlan:
    """Counts what each step keeps of each row."""
    del h_BTD, balance
    return ExpertPlan(params.get("router", {}), params.get("aux_router", {}), self.kept(valid_BT, train_step),
                jax.random.key(0) if key is None else key, position_BT)

  def kept(self, valid_BT: types.Mask, train_step: jax.Array | None) -> jax.Array:
    """Returns the tokens that each step keeps of each row: max(1, int(capacity * length)), 0 of an empty row."""
    length_B = jnp.sum(valid_BT, axis=1)
    seq_len = valid_BT.shape[1]
    table_RS = np.array([[min(t, max(1, int(c * t))) for t in range(seq_len + 1)] for c in self.config.capacity])
    kept_RB = jnp.asarray(table_RS)[:, length_B]
    warmup = self.config.router.capacity_warmup_steps
    if warmup and train_step is not None:
      progress = jnp.minimum(1.0, train_step / warmup)
      capacity_R = jnp.asarray(self.config.capacity, jnp.float32)
      extra = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
      warm_R1 = (capacity_R + (1.0 - capacity_R) * extra)[:, None]
      # The static widths bound the count where float32 rounds up.
      warm_RB = jnp.floor(warm_R1 * length_B[None, :].astype(jnp.float32)).astype(kept_RB.dtype)
      warm_RB = jnp.clip(warm_RB, jnp.minimum(1, length_B)[None, :], length_B[None, :])
      kept_RB = jnp.where(progress >= 1.0, kept_RB, jnp.maximum(kept_RB, warm_RB))
    return kept_RB

  def widths(self, seq_len: int, bucket: int | None = None) -> tuple[int, ...]:
    """Returns the static gather widths; during a warm-up, the widest of the `bucket`."""
    capacity = self.config.capacity
    if bucket is not None and bucket < WARMUP_BUCKETS:
      extra = 0.5 * (1.0 + math.cos(math.pi * bucket / WARMUP_BUCKETS))
      return tuple(min(seq_len, 1 + int((c + (1.0 - c) * extra) * seq_len)) for c in capacity)
    return tuple(max(1, int(c * seq_len)) for c in capacity)

  def bucket(self, train_step: int) -> int:
    """Returns the quarter of the capacity warm-up that a step is in."""
    return min(WARMUP_BUCKETS, train_step * WARMUP_BUCKETS // self.config.router.capacity_warmup_steps)

  def counts(self, valid_BT: types.Mask, train_step: jax.Array, entry_sums: Callable[[], base.Sums]) -> base.Sums:
    """Returns the candidates of each step: they follow from the rows' lengths."""
    del entry_sums
    tokens = base.count(valid_BT)
    kept_R = jnp.sum(self.kept(valid_BT, train_step), axis=1, dtype=jnp.float32)
    return {"candidates": jnp.concatenate([tokens[None], kept_R[:-1]]), "tokens": tokens}

  def losses(self, sums: base.Sums, norms: base.Sums) -> dict[str, jax.Array]:
    """Returns the losses of the module docstring, as far as the config asks for them."""
    return {name: jnp.sum(sums[name] / jnp.maximum(norms["candidates"], 1.0)) for name in ("sampling", "z") if name in sums}

  @property
  def coefs(self) -> dict[str, float]:
    """Weight of each auxiliary loss in the loss."""
    return {"sampling": self.config.router.sampling_coef, "z": self.config.router.z_loss_coef}

  def select(self, plan: ExpertPlan, h_BTD: types.Activations, alive_BT: types.Mask, step) -> base.Routing:
    """Keeps the best-scoring live tokens of each row; not causal."""
    logit_BT, score_BT = self._score(plan, h_BTD, step)
    with jax.named_scope("top_k"):
      keep_BT = top(jax.lax.stop_gradient(score_BT), alive_BT, plan.kept_RB[step])
    if self.config.router.arch == "random":
      return self._routing(keep_BT, logit_BT, score_BT, {}, step)
    predictor_BT = self._predictor(plan, h_BTD, logit_BT, step)
    sums = {
        "correct": base.count(alive_BT & ((predictor_BT >= 0) == keep_BT)),
        "z": base.total(jnp.square(logit_BT), alive_BT),
    }
    if self.config.router.sampling != "none":
      bce_BT = optax.sigmoid_binary_cross_entropy(predictor_BT, keep_BT.astype(jnp.float32))
      sums["sampling"] = base.total(bce_BT, alive_BT)
    return self._routing(keep_BT, logit_BT, score_BT, sums, step)

  def decide(self, plan: ExpertPlan, h_BTD: types.Activations, alive_BT: types.Mask, step) -> base.Routing:
    """Keeps the live tokens whose logit is >= 0; causal, one token at a time."""
    logit_BT, score_BT = self._score(plan, h_BTD, step)
    capacity_R = np.array(self.config.capacity)
    if self.config.router.arch == "random":
      ratio_R = capacity_R / np.concatenate([[1.0], capacity_R[:-1]])
      keep_BT = logit_BT >= 1.0 - jnp.asarray(ratio_R, jnp.float32)[step]
    else:
      keep_BT = self._predictor(plan, h_BTD, logit_BT, step) >= 0
    keep_BT = alive_BT & (keep_BT | jnp.asarray(capacity_R == 1.0)[step])
    return self._routing(keep_BT, logit_BT, score_BT, {}, step)

  def _score(self, plan, h_BTD, step):
    router = self.config.router
    if router.arch == "random":
      logit_BT = scores.uniform(jax.random.fold_in(plan.key, step), h_BTD.shape[:2], plan.position_BT)
      return logit_BT, router.alpha * logit_BT
    logit_BT = scores.logits(plan.params, step, h_BTD / router.temperature)[:, :, 0]
    return logit_BT, scores.activate(router, logit_BT)

  def _predictor(self, plan, h_BTD, logit_BT, step):
    """Returns the logit that predicts the router's own choice."""
    if self.config.router.sampling == "aux_router":
      return scores.logits(plan.aux_params, step, jax.lax.stop_gradient(h_BTD))[:, :, 0]
    return logit_BT

  def _routing(self, keep_BT, logit_BT, score_BT, sums, step) -> base.Routing:
    gating, capacity = self.config.router.gating, self.config.capacity
    keeps_all = (capacity[step] if isinstance(step, int) else min(capacity)) == 1.0
    gate_BT = None if gating == "additive" else score_BT
    return base.Routing(keep_BT=keep_BT, score_BT=logit_BT, gate_BT=gate_BT, carry=True, change=gating == "residual",
                        keeps_all=keeps_all, sums=sums)
