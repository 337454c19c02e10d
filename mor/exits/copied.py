"""Approximate entries of tokens that left early, in place of the deeper layers' own; see `exits.py`."""

import jax
import jax.numpy as jnp

from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import slots as slots_lib
from mor.decode import weights as weights_lib


def fill(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, slots: slots_lib.Slots,
         exit_B: jax.Array) -> tuple[cache_lib.Cache, jax.Array]:
  """Entries of tokens that leave, in the deeper steps and the coda.

  Returns:
    The cache, and True for the tokens that found their pages: the others do not leave yet.
  """
  tables = decoder.tables
  writes_BR = jnp.zeros((exit_B.shape[0], tables.num_rows), bool)
  for r, row in _deeper(decoder):
    writes_BR = writes_BR.at[:, row].max(exit_B & (slots.step_B <= r))
  cache, exit_B = tables.reserve_rows(slots.cache, writes_BR, exit_B)
  writes_BR &= exit_B[:, None]

  write = lambda cache: _write(decoder, weights, slots, cache, exit_B, writes_BR)
  return control.run_once(jnp.any(exit_B), write, cache), exit_B


def _deeper(decoder):
  """Steps after the first, and the row in which each stores."""
  tables = decoder.tables
  rows = [max(rule.own_R[r] for rule in tables.rules) for r in range(decoder.num_steps)]
  return [(r, row) for r, row in enumerate(rows) if r > 0 and row >= 0]


def _write(decoder, weights, slots, cache, exit_B, writes_BR):
  tables, position_B = decoder.tables, slots.position_B
  rotation = decoder.rotation(position_B)
  stack, edge = list(cache.stack), list(cache.edge)
  for r, row in _deeper(decoder):
    page_B, offset_B = tables.place(cache.page_BRP[:, row], cache.length_BR[:, row], writes_BR[:, row], cache.stack[0])
    for i, parameters in enumerate(tables.schedule.rows[r]):
      k_BKH, v_BKH = decoder.keys(weights.stack[parameters], slots.h_BD, rotation, weights.deltas[i], r)
      stack[i] = tables.storage.write(stack[i], page_B, offset_B, k_BKH, v_BKH)
  for i, layer in enumerate(weights.coda, start=tables.schedule.prelude):
    page_B, offset_B = tables.place(cache.edge_page_BP, position_B, exit_B, cache.edge[i])
    edge[i] = tables.storage.write(edge[i], page_B, offset_B, *decoder.keys(layer, slots.h_BD, rotation))
  hidden_BRS = cache.hidden_BRS
  if tables.overlays:
    batch_B1, row_1R = jnp.arange(exit_B.shape[0])[:, None], jnp.arange(tables.num_rows)[None, :]
    hidden_BRS = hidden_BRS.at[batch_B1, row_1R, position_B[:, None]].max(writes_BR, mode="drop")
  return cache.replace(stack=tuple(stack), edge=tuple(edge), hidden_BRS=hidden_BRS,
                       length_BR=cache.length_BR + writes_BR.astype(jnp.int32))
