"""Bytes of stored keys and values: the calculator's, entry by entry and page by page."""

import jax
import numpy as np
import pytest

from mor import costs
from mor.decode import decoder as decoder_lib
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.model.kv import plans as kv_plans
from mor.model.routers import fixed
from mor.model.routers import table as router_table
from tests.helpers import decoding
from tests.helpers import serving
from tests.helpers import tiny

R, DEPTH, EDGES = 3, 2, 2  # steps, layers of a step, layers outside
LENGTHS = (9, 6, 12)  # of each sequence, multiples of R
BYTES = {"float32": 4, "bfloat16": 2}
PAIR = 2 * 2 * 6  # numbers of a key and a value: K=2, H=6


class Balanced:
  """A model's router, but the token at position p takes 1 + p % R steps: its calculator's balanced load."""

  bounded = False

  def __init__(self, config):
    self.inner, self.num_steps = router_table.make(config), config.num_recursions
    self._key = config

  def __eq__(self, other):
    return isinstance(other, Balanced) and self._key == other._key

  def __hash__(self):
    return hash(self._key)

  def enter(self, params, h_BTD, valid_BT, *, balance=None, position_BT=None):
    inner = self.inner.enter(params, h_BTD, valid_BT, balance=balance, position_BT=position_BT)
    return inner, position_BT % self.num_steps

  def follow(self, plan, score_BT):
    inner, last_BT = plan
    return self.inner.follow(inner, score_BT), last_BT

  def decide(self, plan, h_BTD, alive_BT, step):
    inner, last_BT = plan
    return self.inner.decide(inner, h_BTD, alive_BT, step).replace(keep_BT=alive_BT & (last_BT >= step))


def stored(plan, kv_format="float32", router=Balanced):
  """A decoder and its cache after prefilling all but a few tokens of each sequence and decoding the rest."""
  config = tiny.config(model=dict(kv_plan=plan)).model
  storage = storage_lib.Paged(decoding.PAGE, config.num_kv_heads, config.head_dim, kv_format)
  decoder = decoder_lib.Decoder(config, storage, router(config))
  weights = weights_lib.prepare(config, decoding.draw(config), "float32")
  tokens_BT, batch = decoding.tokens(config, len(LENGTHS)), len(LENGTHS)
  cache, end_B = decoding.make_cache(decoder, batch), np.array(LENGTHS, np.int32)
  start_B = end_B - np.array((2, 6, 1), np.int32)
  cache, depth_BT, ok = decoding.prefill(decoder, weights, cache, tokens_BT, 0 * start_B, start_B, True)
  assert ok
  while (start_B < end_B).any():
    run_B, at_B = start_B < end_B, np.minimum(start_B, end_B - 1)
    cache, _, _ = decoding.advance(decoder, weights, cache, tokens_BT[np.arange(batch), at_B], start_B, run_B)
    start_B = start_B + run_B
  return decoder, cache


def entries(cache):
  """Entries of all layers: those outside the recursion, and those of its steps."""
  return EDGES * int(cache.edge_length_B.sum()), DEPTH * int(cache.length_BR.sum())


@pytest.mark.parametrize("plan", kv_plans.PLANS)
def test_stored_bytes_are_the_calculators(plan):
  decoder, cache = stored(plan)
  np.testing.assert_array_equal(cache.edge_length_B, LENGTHS)
  per_token = costs.kv_bytes_per_token(decoder.model, 12, BYTES["float32"])
  assert sum(entries(cache)) * PAIR * BYTES["float32"] == pytest.approx(per_token * sum(LENGTHS))


def test_balanced_stack_stores_its_part_of_plain_recursion():
  """(R + 1) / 2R, and 1 / R where the first step's keys are shared."""
  plain = R * DEPTH * sum(LENGTHS)
  assert entries(stored("recursion_wise")[1])[1] / plain == pytest.approx((R + 1) / (2 * R))
  assert entries(stored("shared")[1])[1] / plain == pytest.approx(1 / R)
  assert entries(stored("recursion_wise", router=fixed.Fixed)[1])[1] == plain


def pages_in_use(free):
  return free.page_P.shape[0] - int(free.num)


@pytest.mark.parametrize("kv_format", BYTES)
def test_allocated_bytes_are_those_of_the_pages(kv_format):
  """Each row takes the pages that hold its entries; buffers are as long as their pools."""
  decoder, cache = stored("recursion_wise", kv_format)
  ceil = lambda length: int(np.ceil(np.asarray(length) / decoding.PAGE).sum())
  assert pages_in_use(cache.free) == ceil(cache.length_BR) > 0
  assert pages_in_use(cache.edge_free) == ceil(cache.edge_length_B) > 0
  page_bytes = decoding.PAGE * PAIR * BYTES[kv_format]
  for buffers, free, layers in ((cache.stack, cache.free, DEPTH), (cache.edge, cache.edge_free, EDGES)):
    allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(buffers))
    assert allocated == layers * free.page_P.shape[0] * page_bytes
  # What is allocated but not used: less than a page a row.
  used = page_bytes * (DEPTH * pages_in_use(cache.free) + EDGES * pages_in_use(cache.edge_free))
  waste = used - sum(entries(cache)) * PAIR * BYTES[kv_format]
  assert 0 <= waste < page_bytes * (DEPTH * cache.length_BR.size + EDGES * len(LENGTHS))


def test_engine_stores_the_kept_tokens_and_no_others():
  model = serving.model()
  engine = serving.engine(model, num_slots=3, router=Balanced(model.config), ticks=1)
  numbers = [engine.submit(list(range(1, 1 + n)), max_tokens=13) for n in (5, 12, 18)]
  kept = lambda num: [sum(p % R >= step for p in range(num)) for step in range(R)]
  ceil = lambda length: int(np.ceil(np.asarray(length) / 4).sum())
  while not engine.idle:
    engine.step()
    cache = engine.runner.slots.cache
    for num, length_R in zip(np.asarray(cache.edge_length_B), np.asarray(cache.length_BR)):
      assert (np.array(kept(num - 1)) <= length_R).all() and (length_R <= kept(num)).all()  # the last may be halfway
    assert pages_in_use(cache.free) == ceil(cache.length_BR)
    assert pages_in_use(cache.edge_free) == ceil(cache.edge_length_B)
  for number, start in zip(numbers, (4, 11, 17)):
    assert engine.take(number).depths == [1 + (start + i) % R for i in range(13)]
  assert engine.metrics()["edge_pool_peak"] > 0.5
  serving.assert_all_free(engine)
