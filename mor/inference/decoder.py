"""One decoded token: the same layers, routers and KV plans, a token at a time.

  start   embed, prelude, the router's entrance, its decision for step 0
  pass    the shared stack once, every row at its own recursion step
  finish  coda, norm, head

`generate` and the engine call these three in different orders. Rows of a batch
never meet: each reads and writes its own pages.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor.inference import cache as cache_lib
from mor.inference import weights as weights_lib
from mor.model import layers
from mor.model.kv import storage as storage_lib
from mor.model.routers import base as router_base
from mor.model.routers import table as router_table


class Decoder:
  """A model's static tables, and its passes over a cache.

  Args:
    model: the model's config.
    storage: of keys and values.
    router: in place of the model's own; same interface (`routers/base.py`).
  """

  def __init__(self, model: config_lib.ModelConfig, storage: Any, router: Any = None):
    self.model = model
    self.tables = cache_lib.Tables(model, storage)
    self.router = router or router_table.ROUTERS[model.router.name](model)
    self.num_steps = model.num_recursions
    self._key = (model, storage, router)  # equal decoders share their compiled programs

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Decoder) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)

  def layer(self, weights: weights_lib.Layer, x_1MD: jax.Array, rotation: Any, attend: Callable,
            deltas: Mapping[str, weights_lib.Delta] | None = None, step: jax.Array | int = 0) -> jax.Array:
    """One decoder layer over M tokens; `attend(q_MNH, k_MKH, v_MKH)` does the rest.

    Args:
      weights: of the layer.
      x_1MD: hidden states.
      rotation: of the tokens.
      attend: attention, and what it stores.
      deltas: of the layer in every step.
      step: whose deltas: one static step, or each token's `[M]`.
    """
    model = self.model

    def project(x_MI, name):
      y_MO = weights_lib.project(x_MI, getattr(weights, name))
      return y_MO + weights_lib.project_delta(x_MI, deltas[name], step) if deltas and name in deltas else y_MO

    num_q, num_k = model.num_heads, model.num_kv_heads
    with jax.named_scope("attention"):
      normed_MD = layers.rms_norm(x_1MD, weights.attention_norm_D, model.norm_eps)[0]
      qkv_1MNH = project(normed_MD, "qkv").reshape(1, -1, num_q + 2 * num_k, model.head_dim)
      qk_MNH = layers.rotate(qkv_1MNH[:, :, :num_q + num_k], rotation)[0]
      out_MNH = attend(qk_MNH[:, :num_q], qk_MNH[:, num_q:], qkv_1MNH[0, :, num_q + num_k:])
      out_MO = out_MNH.reshape(out_MNH.shape[0], -1).astype(jnp.float32)
      x_1MD = x_1MD + project(out_MO, "o")[None]
    with jax.named_scope("ffw"):
      normed_MD = layers.rms_norm(x_1MD, weights.ffw_norm_D, model.norm_eps)[0]
      gate_MF, up_MF = jnp.split(project(normed_MD, "gate_up"), 2, axis=-1)
      return x_1MD + project(jax.nn.silu(gate_MF) * up_MF, "down")[None]

  def rotation(self, position_M: jax.Array) -> Any:
    """Of flat tokens."""
    return layers.rotation(position_M[None], self.model)

  # The passes of one token.

  def embed(self, weights: weights_lib.Weights, token_B: jax.Array) -> jax.Array:
    """Hidden states before the prelude."""
    return storage_lib.decode(weights.lookup_VD.at[token_B].get(mode="clip")).astype(jnp.float32)

  def edge(self, group: str, weights: weights_lib.Weights, cache: cache_lib.Cache, h_BD: jax.Array,
           position_B: jax.Array, run_B: jax.Array) -> tuple[cache_lib.Cache, jax.Array]:
    """Prelude or coda, for the rows of `run_B`; the others' results mean nothing.

    The page that holds `position_B` must have been reserved.
    """
    group_layers = getattr(weights, group)
    if not group_layers:
      return cache, h_BD
    first = 0 if group == "prelude" else self.tables.schedule.prelude
    page_B, offset_B = self.tables.place(cache.edge_page_BP, position_B, run_B, cache.edge[first])
    rows = storage_lib.Rows(cache.edge_page_BP, jnp.where(run_B, position_B + 1, 0))
    order_B = jnp.argsort(-rows.length_M)  # alike together; see `Paged`
    x_1BD, position_B, page_B, offset_B, rows = jax.tree.map(
        lambda a: a[order_B], (h_BD, position_B, page_B, offset_B, rows))
    x_1BD, buffers, rotation = x_1BD[None], list(cache.edge), self.rotation(position_B)
    for i, layer in enumerate(group_layers, start=first):
      def attend(q_BNH, k_BKH, v_BKH, i=i):
        buffers[i] = self.tables.storage.write(buffers[i], page_B, offset_B, k_BKH, v_BKH)
        return self.tables.storage.attend(q_BNH, [(buffers[i], rows)])
      x_1BD = self.layer(layer, x_1BD, rotation, attend)
    return cache.replace(edge=tuple(buffers)), jnp.zeros_like(h_BD).at[order_B].set(x_1BD[0], unique_indices=True)

  def decide(self, weights: weights_lib.Weights, h_BD: jax.Array, entry_BD: jax.Array, alive_B: jax.Array,
             position_B: jax.Array, step_B: jax.Array, steps: tuple[int, ...]) -> router_base.Routing:
    """The causal decision of each row for its own step, one of `steps`."""
    plan = self.router.enter(weights.router, entry_BD[:, None], alive_B[:, None], bias_R=weights.bias_R,
                             position_BT=position_B[:, None])
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
    """Rows that the stack processes: the kept ones, and where keys are shared every token in step 0."""
    return keep_B | (alive_B & (step_B == 0)) if self.tables.plan.shares else keep_B

  def run_pass(self, weights: weights_lib.Weights, cache: cache_lib.Cache, h_BD: jax.Array, position_B: jax.Array,
               step_B: jax.Array, run_B: jax.Array,
               static_step: int | None = None) -> tuple[cache_lib.Cache, jax.Array]:
    """The stack once for the rows of `run_B`, each at its step; the others' results mean nothing.

    Args:
      weights: of the model.
      cache: where the next entry's page is reserved.
      h_BD: hidden states.
      position_B: of the token.
      step_B: recursion step of each row.
      run_B: rows that run.
      static_step: the one step of all rows, where known; needed by sharing schemes
        whose steps use different layers.
    """
    if static_step is None and not self.tables.schedule.cyclic:
      raise ValueError(f"sharing={self.model.sharing!r} gives each step its own layers, so rows at different steps "
                       "cannot share a batch; use a cyclic scheme, or generate()")
    own_B, stores_B = self.tables.stores(step_B)
    stores_B &= run_B
    batch_B = jnp.arange(own_B.shape[0])
    index_B = cache.length_BR[batch_B, own_B]
    page_B, offset_B = self.tables.place(cache.page_BRP[batch_B, own_B], index_B, stores_B, cache.stack[0])
    cache = cache.replace(length_BR=cache.length_BR.at[batch_B, own_B].add(stores_B.astype(jnp.int32)))
    if self.tables.overlays:
      hidden_BRS = cache.hidden_BRS.at[batch_B, own_B, position_B].max(stores_B, mode="drop")
      cache = cache.replace(hidden_BRS=hidden_BRS)
    tables = sorted({(rule.own_R, rule.base_R) for rule in self.tables.rules})  # one, where the scheme is cyclic
    rows = [self.tables.rows(*table, cache, step_B, run_B) for table in tables]
    order_B = jnp.argsort(-sum(row.length_M for row in rows[0]))  # alike together; see `Paged`
    (h_1BD, position_B, page_B, offset_B, step_B, rows) = jax.tree.map(
        lambda a: a[order_B], (h_BD, position_B, page_B, offset_B, step_B, rows))
    h_1BD, buffers, rotation = h_1BD[None], list(cache.stack), self.rotation(position_B)
    static = static_step or 0
    for i, parameters in enumerate(self.tables.schedule.rows[static]):
      rule = self.tables.rules[i]
      rule_rows = rows[tables.index((rule.own_R, rule.base_R))]
      source = i if self.tables.schedule.cyclic or rule.base_buffer_R[static] < 0 else rule.base_buffer_R[static]

      def attend(q_BNH, k_BKH, v_BKH, i=i, rule=rule, rule_rows=rule_rows, source=source):
        if any(own >= 0 for own in rule.own_R):
          buffers[i] = self.tables.storage.write(buffers[i], page_B, offset_B, k_BKH, v_BKH)
        return self.tables.storage.attend(q_BNH, list(zip((buffers[source], buffers[i]), rule_rows)))

      h_1BD = self.layer(weights.stack[parameters], h_1BD, rotation, attend, weights.deltas[i],
                         step_B if static_step is None else static_step)
    return cache.replace(stack=tuple(buffers)), jnp.zeros_like(h_BD).at[order_B].set(h_1BD[0], unique_indices=True)

  def merge(self, h_BD: jax.Array, y_BD: jax.Array, entry_BD: jax.Array,
            routed: router_base.Routing) -> jax.Array:
    """The state after a pass, where the router kept the token; see `routers/base.py`."""
    new_BD = y_BD - h_BD if routed.change else y_BD
    if routed.gate_BT is not None:
      new_BD = new_BD * routed.gate_BT
    if routed.entry_BT is not None:
      new_BD = new_BD + routed.entry_BT * entry_BD
    if routed.carry:
      new_BD = new_BD + h_BD
    return jnp.where(routed.keep_BT, new_BD, h_BD)

  def head(self, weights: weights_lib.Weights, h_MD: jax.Array) -> jax.Array:
    """Logits `[M, V]` after the coda."""
    normed_MD = layers.rms_norm(h_MD[None], weights.final_norm_D, self.model.norm_eps)[0]
    with jax.named_scope("head"):
      return weights_lib.project(normed_MD, weights.head)
