"""Approximate entries of tokens that left early, in place of the deeper layers' own; see `exits.py`."""

from typing import Any

import jax
import jax.numpy as jnp

from mor.inference import cache as cache_lib
from mor.inference import decoder as decoder_lib
from mor.inference import slots as slots_lib
from mor.inference import weights as weights_lib


def fill(decoder, weights, slots, exit_B):
  """Entries of tokens that leave, in the deeper steps and the coda; who finds no page does not leave."""
  tables, exits = decoder.tables, decoder.exits
  schedule, size = tables.schedule, tables.storage.page_size
  num_slots, position_B = exit_B.shape[0], slots.position_B
  shared = exits.kv == "shared"
  rows = range(tables.num_rows)
  own_R = [max(rule.own_R[r] for rule in tables.rules) for r in range(schedule.num_steps)]
  fills = [r for r in range(1, schedule.num_steps) if own_R[r] >= 0 and not (shared and tables.plan.shares)]
  writes_BR = jnp.stack([jnp.any(jnp.stack([exit_B & (slots.step_B <= r) for r in fills if own_R[r] == row]), axis=0)
                         if any(own_R[r] == row for r in fills) else jnp.zeros_like(exit_B) for row in rows], axis=1)
  cache, exit_B = tables.reserve_rows(slots.cache, writes_BR, exit_B)
  writes_BR &= exit_B[:, None]
  rotation = decoder.rotation(position_B)
  stack, edge = list(cache.stack), list(cache.edge)
  from_B = jnp.maximum(slots.step_B - 1, 0)
  for r in fills:
    row = own_R[r]
    on_B = writes_BR[:, row]
    page_B, offset_B = tables.place(cache.page_BRP[:, row], cache.length_BR[:, row], on_B, cache.stack[0])
    for i, parameters in enumerate(schedule.rows[r]):
      if tables.rules[i].own_R[r] < 0:
        continue
      if shared:
        k_BKH, v_BKH = _last_entry(tables, cache, stack[i], from_B)
      else:
        k_BKH, v_BKH = decoder.keys(weights.stack[parameters], slots.h_BD, rotation, weights.deltas[i], r)
      stack[i] = tables.storage.write(stack[i], page_B, offset_B, k_BKH, v_BKH)
  page_B, offset_B = (tables.place(cache.edge_page_BP, position_B, exit_B, cache.edge[0]) if edge else (None, None))
  for i, layer in enumerate(weights.coda, start=schedule.prelude):
    edge[i] = tables.storage.write(edge[i], page_B, offset_B, *decoder.keys(layer, slots.h_BD, rotation))
  length_BR = cache.length_BR + writes_BR.astype(jnp.int32)
  hidden_BRS = cache.hidden_BRS
  if tables.overlays:
    hidden_BRS = hidden_BRS.at[jnp.arange(num_slots)[:, None], jnp.arange(tables.num_rows)[None, :],
                               position_B[:, None]].max(writes_BR & (size > 0), mode="drop")
  return cache.replace(stack=tuple(stack), edge=tuple(edge), length_BR=length_BR, hidden_BRS=hidden_BRS), exit_B


def _last_entry(tables: Any, cache: cache_lib.Cache, buffer: Any, step_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The newest entry of the step that each slot has just run."""
  own_B, _ = tables.stores(step_B)
  row_B = jnp.arange(own_B.shape[0])
  index_B = jnp.maximum(cache.length_BR[row_B, own_B] - 1, 0)
  page_B, offset_B = tables.place(cache.page_BRP[row_B, own_B], index_B, jnp.ones_like(own_B, bool), buffer)
  return tables.storage.entry(buffer, page_B, offset_B)
