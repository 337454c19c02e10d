"""The model over a few tokens and a cache: the same layers, routers and KV plans as in training.

  start   embed, prelude, the router's entrance, its decision for step 0
  pass    the shared stack once, every row at its own recursion step
  finish  coda, norm, head

`generate` and the engine call these three in different orders. Sequences of a batch
never meet: each reads and writes its own pages.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import sharding
from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.model import block
from mor.model import layers
from mor.model.routers import base as router_base
from mor.model.routers import table as router_table


class Decoder:
  """A model's static tables, and its passes over a cache.

  Args:
    model: the model's config.
    storage: of keys and values.
    router: in place of the model's own; same interface (`routers/base.py`).
    after: layers after which tokens may leave early; a plain model is cut there into steps.
  """

  def __init__(self, model: config_lib.ModelConfig, storage: Any, router: Any = None,
               after: tuple[int, ...] = ()):
    self.model = model
    self.tables = cache_lib.Tables(model, storage, after)
    self.router = router or router_table.make(model)
    self.num_steps = self.tables.schedule.num_steps
    self._key = (model, storage, router, after)  # equal decoders share their compiled programs

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Decoder) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)

  def layer(self, weights: weights_lib.Layer, x_1MD: jax.Array, rotation: Any, attend: Callable,
            deltas: Mapping[str, weights_lib.Delta] | None = None, step: jax.Array | int = 0,
            narrow: control.Narrow | None = None) -> jax.Array:
    """Runs one decoder layer over M tokens; `attend(q_MNH, k_MKH, v_MKH)` does the rest.

    Args:
      weights: of the layer.
      x_1MD: hidden states.
      rotation: of the tokens.
      attend: attention, and what it stores.
      deltas: of the layer in every step.
      step: whose deltas: one static step, or each token's `[M]`.
      narrow: how many tokens at the front the products are of; None is all.
    """
    def enter(x_1MD, rotation, step):
      project = weights_lib.projector(self.model, weights, deltas, step)
      return block.enter(self.model, weights.norms, x_1MD, rotation, project)

    def leave(x_1MD, out_1MNH, step):
      project = weights_lib.projector(self.model, weights, deltas, step)
      return block.leave(self.model, weights.norms, x_1MD, out_1MNH, project)

    with jax.named_scope("attention"):
      q_1MNH, k_1MKH, v_1MKH = control.run_first(enter, narrow, x_1MD, rotation, step)
      out_1MNH = attend(q_1MNH[0], k_1MKH[0], v_1MKH[0])[None].astype(jnp.float32)
    return control.run_first(leave, narrow, x_1MD, out_1MNH, step)

  def keys(self, weights: weights_lib.Layer, h_MD: jax.Array, rotation: Any,
           deltas: Mapping[str, weights_lib.Delta] | None = None, step: int = 0) -> tuple[jax.Array, jax.Array]:
    """Returns the keys (rotated) and values `[M, K, H]` of hidden states that the layer does not process."""
    project = weights_lib.projector(self.model, weights, deltas, step)
    k_1MKH, v_1MKH = block.enter(self.model, weights.norms, h_MD[None], rotation, project, "kv")
    return k_1MKH[0], v_1MKH[0]

  def rotation(self, position_M: jax.Array) -> Any:
    """Returns the rotation of flat tokens at their positions."""
    return layers.rotation(position_M[None], self.model)

  def embed(self, weights: weights_lib.Weights, token_B: jax.Array) -> jax.Array:
    """Returns hidden states before the prelude."""
    num = weights.table_VD.shape[0]
    row_B = token_B - sharding.first_of_part(num)
    h_BD = storage_lib.decode(weights.table_VD.at[row_B].get(mode="clip")).astype(jnp.float32)[:, :self.model.d_model]
    if num == self.model.vocab_size:
      return h_BD
    return sharding.sum_over_parts(jnp.where(((row_B >= 0) & (row_B < num))[:, None], h_BD, 0.0))

  def edge(self, group: str, weights: weights_lib.Weights, cache: cache_lib.Cache, h_MD: jax.Array,
           tokens: cache_lib.Tokens) -> tuple[cache_lib.Cache, jax.Array]:
    """Runs prelude or coda for the tokens that run; the other tokens' results mean nothing.

    The page that holds a token's position must have been reserved.
    """
    group_layers = getattr(weights, group)
    if not group_layers:
      return cache, h_MD
    first = 0 if group == "prelude" else self.tables.schedule.prelude
    page_MP = cache.edge_page_BP[tokens.slot_M]
    page_M, offset_M = self.tables.place(page_MP, tokens.position_M, tokens.run_M, cache.edge[first])
    rows = storage_lib.SeenEntries(page_MP, jnp.where(tokens.run_M, tokens.position_M + 1, 0))
    narrow = self.narrow(tokens, cache.edge_page_BP.shape[0])
    (x_MD, position_M, page_M, offset_M, rows), unsort = self._sort(
        rows.length_M, narrow, (h_MD, tokens.position_M, page_M, offset_M, rows))
    x_1MD, buffers, rotation = x_MD[None], list(cache.edge), self.rotation(position_M)
    cuts = (narrow.widths, narrow.num) if narrow else ()
    for i, layer in enumerate(group_layers, start=first):
      def attend(q_MNH, k_MKH, v_MKH, i=i):
        buffers[i] = self.tables.storage.write(buffers[i], page_M, offset_M, k_MKH, v_MKH)
        return self.tables.storage.attend(q_MNH, [(buffers[i], rows)], *cuts)
      x_1MD = self.layer(layer, x_1MD, rotation, attend, narrow=narrow)
    return cache.replace(edge=tuple(buffers)), unsort(x_1MD[0])

  def _sort(self, length_M: jax.Array, narrow: control.Narrow | None,
            arrays: Any) -> tuple[Any, Callable[[jax.Array], jax.Array]]:
    """Returns arrays with what is alike together, if the storage or `narrow` needs it, and the function that undoes it.

    Args:
      length_M: entries that each token sees; those that see much come first.
      narrow: of the matmuls, which need running tokens at the front.
      arrays: tree of `[M, …]` arrays.
    """
    if narrow is None and not self.tables.storage.sorts_rows:
      return arrays, lambda x_MD: x_MD
    order_M = jnp.argsort(-length_M)

    def unsort(x_MD):
      return jnp.zeros_like(x_MD).at[order_M].set(x_MD, unique_indices=True)

    return jax.tree.map(lambda a: a[order_M], arrays), unsort

  def narrow(self, tokens: cache_lib.Tokens, num: int, sparse: bool = False) -> control.Narrow | None:
    """Returns matmuls as wide as the running tokens need; None is all, as where each sequence has one token.

    Args:
      tokens: of the pass.
      num: sequences.
      sparse: whether many sequences have no token in the pass.
    """
    if not control.adapts() or tokens.alone and not sparse:
      return None
    return control.Narrow(jnp.sum(tokens.run_M), control.list_widths(num, tokens.run_M.shape[0]))

  def decide(self, weights: weights_lib.Weights, h_BD: jax.Array, entry_BD: jax.Array, alive_B: jax.Array,
             position_B: jax.Array, step_B: jax.Array, steps: tuple[int, ...],
             before: router_base.Routing | None = None) -> router_base.Routing:
    """Returns the router's causal decision of each token for its own step, one of `steps`, after that `before`."""
    plan = self.router.enter(weights.router, entry_BD[:, None], alive_B[:, None], balance=weights.balance,
                             position_BT=position_B[:, None])
    if before is not None:
      plan = self.router.follow(plan, before.score_BT)
    routed = [self.router.decide(plan, h_BD[:, None], alive_B[:, None], r) for r in steps]

    def pick(*values):
      if values[0] is None:
        return None
      conditions = [(step_B == r)[:, None] for r in steps]
      return jnp.select(conditions, values, jnp.zeros_like(values[0]))
    return router_base.Routing(
        keep_BT=pick(*(r.keep_BT for r in routed)), score_BT=pick(*(r.score_BT for r in routed)),
        gate_BT=pick(*(r.gate_BT for r in routed)), entry_BT=pick(*(r.entry_BT for r in routed)),
        carry=routed[0].carry, change=routed[0].change)

  def runs(self, keep_B: jax.Array, alive_B: jax.Array, step_B: jax.Array) -> jax.Array:
    """Marks tokens that the stack processes: the kept ones, and every token in step 0 if its keys are shared."""
    return keep_B | (alive_B & (step_B == 0)) if self.tables.plan.shares else keep_B

  def run_pass(self, weights: weights_lib.Weights, cache: cache_lib.Cache, h_MD: jax.Array, tokens: cache_lib.Tokens,
               static_step: int | None = None, sparse: bool = False) -> tuple[cache_lib.Cache, jax.Array]:
    """Runs the stack once for the tokens that run, each at its step; the other tokens' results mean nothing.

    Args:
      weights: of the model.
      cache: where the next entries' pages are reserved.
      h_MD: hidden states.
      tokens: which they are.
      static_step: the one step of all of them, where known; needed where steps use
        different layers.
      sparse: see `narrow`.
    """
    if static_step is None and not self.tables.schedule.cyclic:
      raise ValueError(f"sharing={self.model.sharing!r} gives each step its own layers, so rows at different steps "
                       "cannot share a batch; use a cyclic scheme, or generate()")
    slot_M, position_M, step_M = tokens.slot_M, tokens.position_M, tokens.step_M
    own_M, stores_M = self.tables.stores(step_M)
    stores_M &= tokens.run_M
    index_M = cache.length_BR[slot_M, own_M] + tokens.before(stores_M)
    page_M, offset_M = self.tables.place(cache.page_BRP[slot_M, own_M], index_M, stores_M, cache.stack[0])
    cache = cache.replace(length_BR=cache.length_BR.at[slot_M, own_M].add(stores_M.astype(jnp.int32)))
    if self.tables.overlays:
      hidden_BRS = cache.hidden_BRS.at[slot_M, own_M, position_M].max(stores_M, mode="drop")
      cache = cache.replace(hidden_BRS=hidden_BRS)
    static = static_step or 0
    rules = self.tables.rules[:len(self.tables.schedule.rows[static])]
    tables = sorted({(rule.own_R, rule.base_R) for rule in rules})  # one, where the scheme is cyclic
    rows = [self.tables.rows(*table, cache, tokens, index_M) for table in tables]
    narrow = self.narrow(tokens, cache.page_BRP.shape[0], sparse)
    (h_MD, position_M, page_M, offset_M, step_M, rows), unsort = self._sort(
        sum(row.length_M for row in rows[0]), narrow, (h_MD, position_M, page_M, offset_M, step_M, rows))
    h_1MD, buffers, rotation = h_MD[None], list(cache.stack), self.rotation(position_M)
    cuts = (narrow.widths, narrow.num) if narrow else ()
    for i, parameters in enumerate(self.tables.schedule.rows[static]):
      rule = rules[i]
      rule_rows = rows[tables.index((rule.own_R, rule.base_R))]
      source = i if self.tables.schedule.cyclic or rule.base_buffer_R[static] < 0 else rule.base_buffer_R[static]

      def attend(q_MNH, k_MKH, v_MKH, i=i, rule=rule, rule_rows=rule_rows, source=source):
        if any(own >= 0 for own in rule.own_R):
          buffers[i] = self.tables.storage.write(buffers[i], page_M, offset_M, k_MKH, v_MKH)
        parts = list(zip((buffers[source], buffers[i]), rule_rows))
        return self.tables.storage.attend(q_MNH, parts, *cuts)

      h_1MD = self.layer(weights.stack[parameters], h_1MD, rotation, attend, weights.deltas[i],
                         step_M if static_step is None else static_step, narrow)
    return cache.replace(stack=tuple(buffers)), unsort(h_1MD[0])

  def merge(self, h_BD: jax.Array, y_BD: jax.Array, entry_BD: jax.Array,
            routed: router_base.Routing) -> jax.Array:
    """Returns the state after a pass, if the router kept the token; see `routers/base.py`."""
    new_BD = y_BD - h_BD if routed.change else y_BD
    if routed.gate_BT is not None:
      new_BD = new_BD * routed.gate_BT
    if routed.entry_BT is not None:
      new_BD = new_BD + routed.entry_BT * entry_BD
    if routed.carry:
      new_BD = new_BD + h_BD
    return jnp.where(routed.keep_BT, new_BD, h_BD)

  def head(self, weights: weights_lib.Weights, h_MD: jax.Array) -> jax.Array:
    """Returns logits `[M, V]` after the coda."""
    normed_MD = layers.rms_norm(h_MD[None], weights.final_norm_D, self.model.norm_eps)[0]
    with jax.named_scope("head"):
      return sharding.join_parts(weights_lib.project(normed_MD, weights.head), axis=1)
