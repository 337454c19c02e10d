"""Prompts of several slots in one call: each is stored as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import prefill
from mor.decode import slots as slots_lib
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.model import kernels
from tests.helpers import decoding
from tests.helpers import tiny

NUM_SLOTS, ROWS, WIDTH = 4, 3, 5


@pytest.fixture(scope="module", params=["recursion_wise", pytest.param("hybrid", marks=pytest.mark.slow)])
def parts(request):
  """A decoder with small pages, and its weights."""
  config = tiny.config(model=dict(num_layers=5, kv_plan=request.param, router=tiny.router("token_choice"))).model
  return decoding.decoder(config, "paged"), weights_lib.prepare(config, decoding.draw(config), "float32")


def make_slots(decoder, weights):
  pages = NUM_SLOTS * decoding.CONTEXT // decoding.PAGE
  return slots_lib.make(decoder, weights, NUM_SLOTS, pages * decoder.tables.num_rows, pages,
                        decoding.CONTEXT // decoding.PAGE)


def store(parts, slots, chunks, context_pages: int = 0):
  """Stores `{slot: (tokens, start)}`; a slot that is negative is padding, however many rows there are."""
  decoder, weights = parts
  slot_G, start_G, length_G = np.full(ROWS, NUM_SLOTS), np.zeros(ROWS, int), np.zeros(ROWS, int)
  tokens_GT = np.full((ROWS, WIDTH), 7)
  for g, (slot, (tokens, start)) in enumerate(chunks.items()):
    if slot >= 0:
      slot_G[g], start_G[g], length_G[g] = slot, start, len(tokens)
      tokens_GT[g, :len(tokens)] = tokens
  slots, ok = prefill.store(decoder, weights, slots, *(x.astype(np.int32) for x in (slot_G, tokens_GT, start_G, length_G)),
                            context_pages=context_pages)
  assert ok
  return slots


def entries(decoder, slots, slot: int) -> list[np.ndarray]:
  """Returns all that is stored of a slot, in order."""
  cache, found = slots.cache, []
  for buffers, page_RP, length_R in ((cache.edge, cache.edge_page_BP[slot][None], cache.edge_length_B[slot][None]),
                                     (cache.stack, cache.page_BRP[slot], cache.length_BR[slot])):
    for buffer in buffers:
      k, v, seen = decoder.tables.storage.read(buffer, storage_lib.SeenEntries(page_RP, length_R))
      found += [np.asarray(k[seen]), np.asarray(v[seen])]
  return [*found, np.asarray(cache.length_BR[slot]), np.asarray(cache.hidden_BRS[slot])]


def assert_same(got, expected) -> None:
  for x, y in zip(got, expected, strict=True):
    np.testing.assert_array_equal(x, y)


def test_entries_do_not_depend_on_who_is_stored_beside(parts):
  """Chunks of one, then of another start; alone, and with neighbours in any row of the batch."""
  a, b, c = ([3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8])
  alone = store(parts, store(parts, make_slots(*parts), {2: (a, 0)}), {2: (b, 5)}, 2)
  beside = store(parts, make_slots(*parts), {0: (b, 0), 2: (a, 0), 3: (c, 0)})
  beside = store(parts, beside, {3: (a, 4), -1: ([], 0), 2: (b, 5)}, 2)
  decoder = parts[0]
  assert_same(entries(decoder, beside, 2), entries(decoder, alone, 2))
  assert entries(decoder, alone, 2)[0].shape[0] == 8
  np.testing.assert_array_equal(beside.cache.edge_length_B, [3, 0, 8, 9])


def test_padding_rows_change_nothing(parts):
  slots = store(parts, make_slots(*parts), {3: ([3, 1, 4], 0)})
  before = [np.array(leaf) for leaf in jax.tree.leaves(slots)]
  assert_same(jax.tree.leaves(store(parts, slots, {})), before)


def test_only_the_pages_of_the_context_are_read(parts):
  """Two pages of three hold the first chunk; the third is not read, whatever the table says."""
  def run(context_pages):
    slots = store(parts, make_slots(*parts), {1: ([3, 1, 4, 1, 5], 0)})
    return entries(parts[0], store(parts, slots, {1: ([2, 7], 5)}, context_pages), 1)

  all_pages, two_pages, one_page = run(3), run(2), run(1)
  for x, y in zip(two_pages, all_pages, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
  assert any(x.shape != y.shape or np.abs(x - y).max() > 1e-3 for x, y in zip(one_page[:-2], all_pages[:-2]))


def test_entries_in_bfloat16_are_read_as_they_are(parts, monkeypatch):
  """On an accelerator no entry is widened to float32 before its product, and results are those of a CPU."""
  decoder, weights = decoding.decoder(parts[0].model, "paged", "bfloat16"), parts[1]
  slots = store((decoder, weights), make_slots(decoder, weights), {1: ([3, 1, 4, 1], 0)})
  fresh = [jnp.array(x) for x in ([[2, 7, 1, 8, 2]], [4], [5])]

  def run(cache):
    names = "edge_page_BP", "edge_length_B", "page_BRP", "length_BR", "hidden_BRS"
    row = cache.replace(**{name: getattr(cache, name)[1:2] for name in names})
    return prefill.run(decoder, weights, row, *fresh, 1)

  wide = jax.jit(lambda cache: run(cache))(slots.cache)
  monkeypatch.setattr(kernels, "platform", lambda: "gpu")
  equations = list(_equations(jax.make_jaxpr(run)(slots.cache).jaxpr))
  products = [eqn for eqn in equations if eqn.primitive.name == "dot_general"]
  attention = [eqn for eqn in products if max(x.aval.ndim for x in eqn.invars) == 5]
  assert len(attention) == 2 * (decoder.tables.num_edges + decoder.num_steps * decoder.tables.schedule.depth)
  assert all(x.aval.dtype == jnp.bfloat16 for eqn in attention for x in eqn.invars)
  assert all(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in attention)
  barriers = [eqn for eqn in equations if eqn.primitive.name == "optimization_barrier"]  # between each read and its write
  assert len(barriers) == len(attention) // 2
  narrow = jax.jit(lambda cache: run(cache))(slots.cache)
  np.testing.assert_array_equal(narrow[1], wide[1])
  got, expected = (entries(decoder, slots.replace(cache=ran[0]), 0) for ran in (narrow, wide))
  for x, y in zip(got, expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-2, atol=2e-2)


def _equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      for one in value if isinstance(value, (list, tuple)) else [value]:
        if hasattr(one, "jaxpr") or hasattr(one, "eqns"):
          yield from _equations(getattr(one, "jaxpr", one))
