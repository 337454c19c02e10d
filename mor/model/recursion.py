"""The recursion: at each of R steps, routes, runs the shared stack on the kept tokens, and merges.

  for r in 0 .. R-1:
    routing = router(h)                      which tokens, and how they enter
    y = stack(h[kept])                       the same parameters at every step
    h[kept] = [carry] h + entry h_0 + gate y     see `routers/base.py`

A routing has two executions, which a test holds equal. `gathered` copies the kept
tokens to a buffer of static width, so that FLOPs, time and memory are saved. Its
indices ascend, and a query sees keys by their original positions. `masked` runs
the full width and hides the keys of the other tokens. It is the reference, and
runs when counts depend on the data (causal routing of a whole sequence).

Full-width steps have equal shapes and run in one `jax.lax.scan`; steps of
different widths are unrolled over R. With truncated backpropagation
(`recursions_train.backprop`) the last steps alone are differentiated: the state
that enters them, and the keys of earlier steps, are constants.
"""

from collections.abc import Mapping
import copy
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import sharding
from mor import types
from mor.model import kernels
from mor.model import layers
from mor.model import lora as lora_lib
from mor.model import schedule as schedule_lib
from mor.model import stacked
from mor.model.kv import view as kv_view
from mor.model.kv import plans as kv_plans
from mor.model.routers import base as router_base
from mor.model.routers import table as router_table


@struct.dataclass
class Trace:
  """Record of the routing of a forward pass.

  Attributes:
    keep_RBT: True where step r processed the token.
    score_RBT: raw router logits.
    sums: statistics and auxiliary losses, summed over tokens.
    exits: hidden states after the layers of `run`'s argument `exits`.
  """

  keep_RBT: jax.Array
  score_RBT: jax.Array
  sums: Mapping[str, jax.Array]
  exits: tuple[jax.Array, ...] = ()


def take(x: jax.Array, index_BC: jax.Array) -> jax.Array:
  """Returns `x[b, index[b, c]]` for every b and c; an index past the end takes the last position."""
  index_BC = jnp.minimum(index_BC, x.shape[1] - 1)
  return jax.vmap(lambda row, index: row[index])(x, index_BC)


def compact(keep_BT: types.Mask, width: int) -> jax.Array:
  """Returns the positions `[B, width]` of the kept tokens, ascending, filled up with T."""
  seq_len = keep_BT.shape[1]

  def row(keep_T):
    place_T = jnp.where(keep_T, jnp.cumsum(keep_T, dtype=jnp.int32) - 1, width)
    return jnp.full(width, seq_len, jnp.int32).at[place_T].set(jnp.arange(seq_len, dtype=jnp.int32), mode="drop")
  return jax.vmap(row)(keep_BT)


def _count(keep_RBT: jax.Array, valid_BT: types.Mask) -> dict[str, jax.Array]:
  """Counts tokens: all, kept by each step, candidates of each step, and kept by the last step at each position."""
  tokens = router_base.count(valid_BT)
  kept_R = jnp.sum(keep_RBT, axis=(1, 2), dtype=jnp.float32)
  return {"tokens": tokens, "kept": kept_R, "candidates": jnp.concatenate([tokens[None], kept_R[:-1]]),
          "last_T": jnp.sum(keep_RBT[-1], axis=0, dtype=jnp.float32)}


class Recursion:
  """The static tables of the recursion of a model, and the forward pass through all steps."""

  def __init__(self, config: config_lib.ModelConfig):
    self.config = config
    self.schedule = schedule_lib.make(config)
    self.plan = kv_plans.make(config.kv_plan, self.schedule)
    self.router = router_table.make(config)

  def run(self, params: dict, h_BTD: types.Activations, segment_BT: types.Segments, *, routing: str,
          balance: Mapping[str, jax.Array] | None = None, train_step: jax.Array | None = None, bucket: int | None = None,
          key: jax.Array | None = None, exits: tuple[int, ...] = (),
          drop_UB: jax.Array | None = None) -> tuple[types.Activations, Trace]:
    """Runs all steps.

    Args:
      params: `stack` and, if the model has them, `router`, `aux_router`, `lora`.
      h_BTD: hidden states after the prelude.
      segment_BT: document of each position, 0 on padding.
      routing: "select" or "decide", static.
      balance: state of the router that no gradient reaches.
      train_step: optimizer step, for capacity and balance warm-up; None once trained.
      bucket: static part of `train_step`; see `routers/base.py`.
      key: random key for scores that are drawn.
      exits: numbers of unrolled layers after which to record the hidden states.
      drop_UB: True where an unrolled layer leaves the batch row as it is.

    Returns:
      Hidden states after the last step, and the record of the routing.
    """
    valid_BT = segment_BT != 0
    plan = self.router.enter(params, h_BTD, valid_BT, balance=balance, train_step=train_step, key=key)
    seq_len = h_BTD.shape[1]
    gathered = self.config.execution == "gathered" and (routing == "select" or not self.router.looks_ahead)
    widths = self.router.widths(seq_len, bucket) if gathered else (seq_len,) * self.schedule.num_steps
    advance = _Pass(self, params["stack"], params.get("lora", {}), segment_BT, entry_BTD=h_BTD,
                    exits=exits if self.schedule.num_steps == 1 else (), drop_UB=drop_UB)
    state, traces, ends = self._run_steps(advance, plan, routing, h_BTD, valid_BT, widths, keep_ends=bool(exits))
    keep_RBT, score_RBT, sums = jax.tree.map(lambda *a: jnp.concatenate(a), *traces)
    sums = {**sums, **getattr(plan, "sums", {}), **_count(keep_RBT, valid_BT)}
    boundaries = self.schedule.boundaries()
    found = tuple(advance.exits[n] if n in advance.exits else ends[boundaries.index(n)] for n in exits)
    return state, Trace(keep_RBT, score_RBT, sums, found)

  def _run_steps(self, advance: "_Pass", plan, routing: str, h_BTD, valid_BT, widths: tuple[int, ...], keep_ends: bool):
    """Runs the steps, those of one shape in a scan.

    Returns:
      The output of the recursion; records of the routing, each of several steps; and, with `keep_ends`, the
      states after every step.
    """
    num_steps, route = self.schedule.num_steps, _Route(self.router, plan, routing)
    first_trained = self.config.recursions_train.first_step(num_steps)
    untrained = advance.without_gradient() if first_trained else advance
    tokens = route.start(jax.lax.stop_gradient(h_BTD) if first_trained else h_BTD, valid_BT)
    store, traces, ends, whole = {}, [], [], True
    first_scanned = self._first_scanned(widths, h_BTD.shape[1])
    for r in range(first_scanned):
      routed = route(tokens, r)
      whole = whole and routed.keeps_all
      run_step = advance if r >= first_trained else untrained
      tokens = route.finish(tokens, routed, run_step(r, r, tokens.state_BTD, routed, store, widths[r], whole))
      ends.append(tokens.state_BTD)
      traces.append((routed.keep_BT, routed.score_BT, routed.sums))
    traces = [jax.tree.map(lambda *a: jnp.stack(a), *traces)] if traces else []

    def scan(run_step, tokens, steps):
      def body(tokens, r):
        routed, seq_len = route(tokens, r), tokens.state_BTD.shape[1]
        new_BTD = run_step(1 if store else 0, r, tokens.state_BTD, routed, store, seq_len, whole and routed.keeps_all)
        tokens = route.finish(tokens, routed, new_BTD)
        return tokens, ((routed.keep_BT, routed.score_BT, routed.sums), tokens.state_BTD if keep_ends else None)

      return jax.lax.scan(body, tokens, jnp.arange(*steps))

    middle = max(first_scanned, first_trained)
    for run_step, steps in (untrained, (first_scanned, middle)), (advance, (middle, num_steps)):
      if steps[0] < steps[1]:
        tokens, (scanned, states) = scan(run_step, tokens, steps)
        traces.append(scanned)
        ends += [] if states is None else list(states)
    return tokens.read(), traces, ends

  def _first_scanned(self, widths: tuple[int, ...], seq_len: int) -> int:
    """Returns the first step from which all steps have one shape and one KV rule; R if none may be scanned."""
    num_steps = self.schedule.num_steps
    if not (self.config.scan_layers and self.schedule.cyclic) or any(w != seq_len for w in widths[1:]):
      return num_steps
    first = 1 if self.plan.shares else 0
    return first if num_steps - first > 1 else num_steps


@struct.dataclass
class _Tokens:
  """The tokens between two steps.

  Attributes:
    state_BTD: hidden states.
    alive_BT: True where the step before kept the token.
    score_BT: score of the step before, of a cumulative router.
    output_BTD: output so far, float32, of a soft routing; otherwise the state is the output.
  """

  state_BTD: jax.Array
  alive_BT: jax.Array
  score_BT: jax.Array | None
  output_BTD: jax.Array | None

  def read(self) -> jax.Array:
    """Returns the output of the recursion."""
    return self.state_BTD if self.output_BTD is None else self.output_BTD.astype(self.state_BTD.dtype)


@dataclasses.dataclass(frozen=True)
class _Route:
  """Routes the tokens of all steps by one plan."""

  router: router_base.Router
  plan: Any
  routing: str

  def start(self, state_BTD, valid_BT) -> _Tokens:
    """Returns the tokens before step 0."""
    score_BT = jnp.zeros(valid_BT.shape, jnp.float32) if self.router.cumulative else None
    soft = self.router.soft and self.routing == "select"
    return _Tokens(state_BTD, valid_BT, score_BT, state_BTD.astype(jnp.float32) if soft else None)

  def __call__(self, tokens: _Tokens, step) -> router_base.Routing:
    plan = self.plan if tokens.score_BT is None else self.router.follow(self.plan, tokens.score_BT)
    return getattr(self.router, self.routing)(plan, tokens.state_BTD, tokens.alive_BT, step)

  def finish(self, tokens: _Tokens, routed: router_base.Routing, new_BTD) -> _Tokens:
    """Returns the tokens after a step."""
    output_BTD = tokens.output_BTD
    if output_BTD is not None:
      change_BTD = (new_BTD - tokens.state_BTD).astype(jnp.float32)
      output_BTD = output_BTD + jnp.exp(routed.log_share_BT)[:, :, None] * change_BTD
    score_BT = routed.score_BT if self.router.cumulative else None
    return _Tokens(new_BTD, routed.keep_BT, score_BT, output_BTD)


class _Pass:
  """Runs the stack over the kept tokens of a step and merges them into the state; one object serves all steps."""

  def __init__(self, recursion: Recursion, stack: dict, lora: dict, segment_BT: types.Segments,
               entry_BTD: types.Activations, exits: tuple[int, ...] = (), drop_UB: jax.Array | None = None):
    self.recursion = recursion
    self.exits = dict.fromkeys(exits)  # hidden states after layers of the only step
    self.drop_UB, self.drop_LB = drop_UB, None  # for all unrolled layers, and for the current step
    self.config = recursion.config
    self.stack = stack
    self.lora = lora
    self.segment_BT = segment_BT
    self.entry_BTD = entry_BTD
    batch, seq_len = segment_BT.shape
    self.position_BT = jnp.broadcast_to(jnp.arange(seq_len)[None, :], (batch, seq_len))

  def without_gradient(self) -> "_Pass":
    """Returns a pass with the same parameters, which no gradient reaches."""
    other = copy.copy(self)
    other.stack, other.lora = jax.lax.stop_gradient((self.stack, self.lora))
    return other

  def __call__(self, step: int, lora_step: jax.Array | int, state_BTD, routed: router_base.Routing, store: dict,
               width: int, whole: bool):
    """Returns the new state; step 0 of a KV plan that shares keys fills `store`.

    Args:
      step: static step by which schedule and KV plan are read.
      lora_step: the step that runs, which may be traced.
      state_BTD: hidden states.
      routed: routing of the step.
      store: shared keys and values, written at step 0.
      width: static gather width; the full width does not gather.
      whole: True if this step and all earlier ones are known to keep every token.
    """
    seq_len = state_BTD.shape[1]
    lora = lora_lib.at_step(self.lora, lora_step)
    if self.drop_UB is not None:
      schedule = self.recursion.schedule
      self.drop_LB = jax.lax.dynamic_slice_in_dim(
          self.drop_UB, schedule.prelude + lora_step * schedule.depth, schedule.depth)
    shared_first = step == 0 and self.recursion.plan.shares
    if width == seq_len or shared_first:
      return self._run_full(step, lora, state_BTD, routed, store, whole)

    def full():
      return self._run_full(step, lora, state_BTD, routed, store, whole)

    def gathered():
      return self._run_gathered(step, lora, state_BTD, routed, store, width)

    if self.recursion.router.bounded:
      return gathered()
    fullest = sharding.max_over_devices(jnp.max(jnp.sum(routed.keep_BT, axis=1)))
    return jax.lax.cond(fullest > width, full, gathered)

  def _run_full(self, step, lora, state_BTD, routed, store, whole):
    seen_BT, soft = self.segment_BT, routed.log_share_BT is not None
    run_BT = self.segment_BT != 0 if soft else routed.keep_BT
    hides = not (whole or self.recursion.plan.shares)
    if hides:
      seen_BT = jnp.where(run_BT, self.segment_BT, 0)
    view = kv_view.make_view(
        "xla" if soft else kernels.choose(self.config, in_order=True), self._rotation(self.position_BT),
        self.position_BT, self.segment_BT, self.position_BT, seen_BT,
        index_BT=jnp.where(run_BT, self.position_BT, state_BTD.shape[1]),
        causal=self.config.cross_documents and not hides)
    if soft:
      view = self._weigh_keys(view, routed.log_share_BT)
    y_BTD = self._run_stack(step, lora, state_BTD, view, store)
    new_BTD = self._enter(state_BTD, y_BTD, routed, None)
    if routed.carry:
      new_BTD = state_BTD + new_BTD
    return jnp.where(run_BT[:, :, None], new_BTD, state_BTD)

  def _weigh_keys(self, view: kv_view.KVView, log_share_BT: jax.Array) -> kv_view.KVView:
    """Returns the view of a soft routing, in which a fresh key has the share of its token."""
    if self.recursion.plan.shares:  # the rest is the key of the first step
      return view.replace(share_BT=jnp.exp(log_share_BT))
    own_TS = jnp.eye(log_share_BT.shape[1], dtype=bool)
    return view.replace(bias_BTS=jnp.where(own_TS[None], 0.0, log_share_BT[:, None, :]))

  def _run_gathered(self, step, lora, state_BTD, routed, store, width):
    with jax.named_scope("gather"):
      index_BC = compact(routed.keep_BT, width)
      x_BCD = take(state_BTD, index_BC)
      segment_BC = jnp.where(index_BC < state_BTD.shape[1], take(self.segment_BT, index_BC), 0)
    reads_base = self.recursion.plan.shares
    k_position, k_segment = (self.position_BT, self.segment_BT) if reads_base else (index_BC, segment_BC)
    view = kv_view.make_view(
        kernels.choose(self.config, in_order=not reads_base), self._rotation(index_BC),
        index_BC, segment_BC, k_position, k_segment, index_BT=index_BC,
        causal=self.config.cross_documents and not reads_base)
    y_BCD = self._run_stack(step, lora, x_BCD, view, store)
    new_BCD = self._enter(x_BCD, y_BCD, routed, index_BC)
    with jax.named_scope("scatter"):
      def write(state_TD, index_C, new_CD):
        kept = state_TD.at[index_C]
        return (kept.add if routed.carry else kept.set)(new_CD, mode="drop", unique_indices=True)

      return jax.vmap(write)(state_BTD, index_BC, new_BCD)

  def _enter(self, x, y, routed: router_base.Routing, index_BC):
    """Returns gate * y (or gate * (y - x)) + entry * h_0, at the full width or at `index_BC`."""
    def pick(a):
      return a if index_BC is None else take(a, index_BC)

    if routed.change:
      y = y - x
    if routed.gate_BT is not None:
      y = y * pick(routed.gate_BT)[:, :, None].astype(y.dtype)
    if routed.entry_BT is not None:
      y = y + pick(routed.entry_BT)[:, :, None].astype(y.dtype) * pick(self.entry_BTD)
    return y

  def _rotation(self, position):
    return layers.rotation(position, self.config)

  def _run_stack(self, step, lora, x, view, store: dict):
    """Runs the layers of `step`, whose keys the KV plan takes from the step itself or from `store`."""
    schedule, plan = self.recursion.schedule, self.recursion.plan
    start = step * schedule.depth
    own = plan.own[start:start + schedule.depth]
    base = plan.base[start:start + schedule.depth]
    if self.exits:
      return self._run_between_exits(x, view, lora)
    if schedule.cyclic:  # every step runs the whole stack in order, by one KV rule
      keep = plan.shares and step == 0
      x, fresh = stacked.run_layers(self.config, self.stack, x, view, store.get("step_0") if base[0] >= 0 else None,
                            own=own[0] >= 0, keep=keep, lora=lora, drop_LB=self.drop_LB)
      if keep:
        store["step_0"] = fresh
      return x
    for i, row in enumerate(schedule.rows[step]):
      apply = stacked.layer_fn(self.config, own[i] >= 0)
      y, fresh = apply(jax.tree.map(lambda a: a[row], self.stack), x, view, store.get(base[i]),
                       jax.tree.map(lambda a, i=i: a[i], lora))
      x = y if self.drop_LB is None else jnp.where(self.drop_LB[i][:, None, None], x, y)
      if own[i] >= 0:
        store[own[i]] = fresh
    return x

  def _run_between_exits(self, x, view, lora):
    """Runs the layers of a plain model, from exit to exit, and records the hidden states at each exit."""
    def run_part(x, start, end):
      stack, deltas, drop_LB = jax.tree.map(lambda a: a[start:end], (self.stack, lora, self.drop_LB))
      return stacked.run_layers(self.config, stack, x, view, lora=deltas, drop_LB=drop_LB)[0]

    start = 0
    for end in (*self.exits, self.recursion.schedule.depth):
      x = run_part(x, start, end)
      if end in self.exits:
        self.exits[end] = x
      start = end
    return x
