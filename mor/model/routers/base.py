"""What a router is. It only routes: it never runs layers.

A router is built once per model from its config and holds no arrays. Its class is
the whole contract: code elsewhere reads these attributes and never a router's name.

  routing    enter (once, before step 0), then at each step `select` (training and
             oracle; may see the future) or `decide` (pointwise and causal)
  sizes      widths (tokens that each step gathers), fractions (tokens to expect)
  arrays     parameters (rows of `parameters.py`), init, update (of the state that
             no gradient reaches, e.g. a bias)
  losses     counts (what a batch must count before its micro-batches run), losses
  tests      test_config (fields with which every suite runs the router)

`select` and `decide` return a `Routing`, which says how the stack's output y
enters the state of the tokens it keeps:

  state' = [carry] * state + entry * state_at_entry + gate * (y [- state, of a change])

In `select` a `soft` router runs every token at every step, and gives the share of the
token that the step processes. A share has a gradient, and hides as a hard routing does:

  output = state_0 + sum_r share_r * (state_r+1 - state_r)
  weight of a token's key for other tokens at step r: share_r, its own step r apart
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from mor import fields
from mor import model_config
from mor import parameters
from mor import types

Sums = Mapping[str, jax.Array]


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
    log_share_BT: logarithm of the share of the token that the step processes, of a soft
      routing; `keep_BT` is then what a hard routing would keep, and is only recorded.
    sums: statistics and auxiliary losses of this step, summed over tokens; the
      recursion itself counts `tokens`, `candidates` and `kept`.
  """

  keep_BT: types.Mask
  score_BT: jax.Array
  gate_BT: jax.Array | None = None
  entry_BT: jax.Array | None = None
  log_share_BT: jax.Array | None = None
  carry: bool = struct.field(pytree_node=False, default=False)
  change: bool = struct.field(pytree_node=False, default=False)
  keeps_all: bool = struct.field(pytree_node=False, default=False)
  sums: Sums = struct.field(default_factory=dict)


class Router:
  """A router without parameters, state and losses; a subclass routes, and declares what it has of these.

  Attributes:
    routes: False if every token runs every step, so that there is nothing to measure.
    looks_ahead: True if `select` sees later tokens, so that `decide` may differ from it.
    soft: True if `select` weighs every step of every token.
    cumulative: True if a step's decision goes on from the score of the step before, see `follow`.
    bounded: True if no batch row ever keeps more tokens than `widths` says; a step of
      another router that does runs masked.
    num_buckets: static widths that a warm-up compiles, see `bucket`; 0 without one.
    any_depth: True if its parameters are the same for every number of recursion steps.
    test_config: fields of `RouterConfig` with which the test suites run the router.
  """

  routes = True
  looks_ahead = False
  soft = False
  cumulative = False
  bounded = False
  num_buckets = 0
  any_depth = False
  test_config: Mapping[str, Any] = {}

  def __init__(self, config: model_config.ModelConfig):
    self.check(config)
    self.config = config
    self.num_steps = config.num_recursions

  @classmethod
  def check(cls, config: model_config.ModelConfig) -> None:
    """Raises ValueError where the fields of a model do not suit the router."""
    fields.require(not cls.routes or config.kv_plan == "recursion_wise"
                   or config.sharing in ("vanilla", "cycle", "middle_cycle"),
                   f"model.kv_plan={config.kv_plan!r} with sharing={config.sharing!r} and a router",
                   "later steps must find every layer's keys in step 0; use 'cycle' or 'middle_cycle'")
    fields.require(not cls.soft or config.attention in ("auto", "xla"),
                   f"model.attention={config.attention!r} with router.name={config.router.name!r}",
                   "its training weighs keys, which this kernel does not; use 'auto' or 'xla'")
    train = config.recursions_train
    fields.require(cls.any_depth or not train.draws,
                   f"model.recursions_train.distribution={train.distribution!r} with router.name={config.router.name!r}",
                   "its scores and capacities belong to the steps of model.num_recursions; use 'fixed', or the router "
                   "'fixed'")
    fields.require(not (cls.routes and train.backprop),
                   f"model.recursions_train.backprop={train.backprop} with router.name={config.router.name!r}",
                   "the router learns from every step; use 0, or the router 'fixed'")

  @property
  def parameters(self) -> tuple[parameters.Parameter, ...]:
    """Rows of the router's parameters, and of its state (collection "balance", which starts at 0)."""
    return ()

  def init(self, key: jax.Array) -> dict[str, Any]:
    """Returns the initial parameters by group."""
    del key
    return {}

  def official_modules(self, edge: int) -> tuple[list[str], list[str]]:
    """Returns the official code's module of each score network, and that of each step's layers.

    Args:
      edge: number of layers before the recursion.

    Raises:
      ValueError: the official code has no such router.
    """
    raise ValueError(f"router.name={self.config.router.name!r}: the official code has no such router; use "
                     "--mode=export --target=hf")

  def widths(self, seq_len: int, bucket: int | None = None) -> tuple[int, ...]:
    """Returns the static number of tokens of a row that each step gathers.

    Args:
      seq_len: tokens of a row.
      bucket: part of a warm-up, see `bucket`; None without one.
    """
    del bucket
    return (seq_len,) * self.num_steps

  def bucket(self, train_step: int) -> int:
    """Returns the part of the warm-up, of `num_buckets`, that a step is in; `num_buckets` behind it."""
    raise NotImplementedError(f"{type(self).__name__} has num_buckets={self.num_buckets} and no `bucket`")

  def fractions(self, seq_len: int) -> tuple[float, ...]:
    """Returns the fraction of a row that each step is expected to process, once trained."""
    return tuple(width / seq_len for width in self.widths(seq_len))

  def train_fractions(self, seq_len: int) -> tuple[float, ...]:
    """Returns the fraction of a row that each step processes in training."""
    return (1.0,) * self.num_steps if self.soft else self.fractions(seq_len)

  def enter(self, params: Mapping[str, Any], h_BTD: types.Activations, valid_BT: types.Mask, *,
            balance: Sums | None = None, train_step: jax.Array | None = None, key: jax.Array | None = None,
            position_BT: jax.Array | None = None) -> Any:
    """Returns a plan: what is decided once, before step 0. Its `sums`, if any, are of the whole recursion.

    Args:
      params: groups of the router's parameters.
      h_BTD: hidden states after the prelude.
      valid_BT: False on padding.
      balance: state that no gradient reaches; None starts it.
      train_step: optimizer step, for warm-ups; None once trained.
      key: for random scores.
      position_BT: positions of the tokens, where they are not the first of a row, as in decoding.
    """
    del params, h_BTD, valid_BT, balance, train_step, key, position_BT

  def assign(self, plan: Any, depth_BT: jax.Array) -> Any:
    """Returns the plan with last steps (0-based) that were chosen elsewhere, if it chooses any."""
    del depth_BT
    return plan

  def follow(self, plan: Any, score_BT: jax.Array) -> Any:
    """Returns the plan of the next step, given the `score_BT` of a step; a cumulative router goes on from it."""
    del score_BT
    return plan

  def select(self, plan: Any, h_BTD: types.Activations, alive_BT: types.Mask, step: jax.Array | int) -> Routing:
    """Returns the routing of a step in training and for the oracle; it may see the future.

    Args:
      plan: what `enter` returned.
      h_BTD: hidden states that enter the step.
      alive_BT: True where the step before kept the token.
      step: recursion step, 0-based.
    """
    raise NotImplementedError(f"{type(self).__name__} has no `select`")

  def decide(self, plan: Any, h_BTD: types.Activations, alive_BT: types.Mask, step: jax.Array | int) -> Routing:
    """Returns the routing of a step where each token is routed alone; `select`, unless the router looks ahead."""
    return self.select(plan, h_BTD, alive_BT, step)

  def counts(self, valid_BT: types.Mask, train_step: jax.Array, entry_sums: Callable[[], Sums]) -> Sums:
    """Returns the sums that `norms` reads, before the micro-batches of a batch run.

    Args:
      valid_BT: False on padding; rows of all micro-batches.
      train_step: optimizer step.
      entry_sums: runs the prelude and `enter` on all micro-batches, and returns the
        plans' sums; a small part of the forward pass, left out if not called.
    """
    del train_step, entry_sums
    return {"tokens": count(valid_BT)}

  def losses(self, sums: Sums, norms: Sums) -> dict[str, jax.Array]:
    """Returns the unscaled auxiliary losses of a micro-batch by name; they add up over micro-batches.

    Args:
      sums: sums of the micro-batch, over tokens.
      norms: counts of the whole batch, from `norms`.
    """
    del sums, norms
    return {}

  @property
  def coefs(self) -> dict[str, float]:
    """Weight of each auxiliary loss in the loss."""
    return {}

  def weigh(self, losses: Sums) -> jax.Array:
    """Returns the sum of the auxiliary losses times their weights."""
    return sum((self.coefs[name] * term for name, term in losses.items()), jnp.zeros((), jnp.float32))

  def update(self, balance: Sums, sums: Sums, train_step: jax.Array) -> Sums:
    """Returns the state after an optimizer step.

    Args:
      balance: state before the step.
      sums: sums of the batch, over tokens.
      train_step: optimizer step.
    """
    del sums, train_step
    return balance


def norms(sums: Sums) -> dict[str, jax.Array]:
  """Returns the counts that `losses` divides by, from a whole batch's sums.

  tokens: number of tokens. candidates: tokens that each step chooses from. fraction:
  share of tokens that chose each depth.
  """
  found = {name: sums[name] for name in ("candidates", "tokens") if name in sums}
  if "chosen_R" in sums:
    found["fraction"] = sums["chosen_R"] / jnp.maximum(sums["tokens"], 1.0)
  return found


def count(mask_BT: types.Mask) -> jax.Array:
  """Returns the number of True entries, float32."""
  return jnp.sum(mask_BT, dtype=jnp.float32)


def total(value_BT: jax.Array, mask_BT: types.Mask) -> jax.Array:
  """Returns the sum of the values where the mask is True; other values may be anything."""
  return jnp.sum(jnp.where(mask_BT, value_BT, 0.0))
