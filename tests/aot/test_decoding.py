"""The engine's programs, compiled and counted; ideal ticks."""

import jax
import pytest

from configs import paper
from mor import config as config_lib
from mor.aot import chips
from mor.aot import decoding
from mor.aot import ideal
from tests.helpers import tiny


def setup(num_slots=2, **changes):
  return decoding.DecodingSetup(tiny.config(), jax.devices()[0], num_slots=num_slots, page_size=4, **changes)


def test_a_tick_is_compiled_and_counted_for_any_device():
  made = setup(context=24)
  found = decoding.tick_figures(made, decoding.compile_tick(made))
  assert (found["context"], found["position"], found["ticks"], found["storage"]) == (24, 12, 6, "Paged")
  assert found["a_tick"]["operations"] > found["beside"]["operations"] > 0
  assert found["a_tick"]["loops"] > 0 and found["a_tick"]["predicates"] > found["a_tick"]["loops"]
  assert found["bytes"] > found["ideal_bytes"] > 0
  cache = made.decoder.tables.make_cache(2, 2 * 6 * made.decoder.tables.num_rows, 12, 6)
  assert found["pool_bytes"] == sum(x.nbytes for x in jax.tree.leaves((cache.edge, cache.stack)))


@pytest.mark.slow
def test_prompts_in_one_call_share_the_weights():
  made = setup(num_slots=3)
  alone, together = (decoding.prefill_figures(made, decoding.compile_prefill(made, n, 8), n, 8) for n in (1, 3))
  assert together["operations"] < 3 * alone["operations"]
  assert alone["ideal_bytes"] < together["ideal_bytes"] < 3 * alone["ideal_bytes"]


@pytest.mark.parametrize("model,num_slots,gigabytes", [
    ("mor-360m-r3", 32, (0.236, 0.094, 0.368)), ("mor-360m-r3", 128, (0.236, 0.094, 1.473)),
    ("mor-1.7b-r3", 32, (1.342, 0.201, 1.939))])
def test_an_ideal_tick_reads_weights_head_and_entries(model, num_slots, gigabytes):
  """The numbers were added up by hand: 12 layers, the head, and rows of p, 2p/3 and p/3 entries as 3 to 2 to 1."""
  found = ideal.tick(config_lib.from_config_dict(paper.get_config(model)).model, num_slots, 1024)
  assert [found.weights / 1e9, found.head / 1e9, found.entries / 1e9] == pytest.approx(gigabytes, rel=0.01)
  assert found.seconds(chips.CHIPS["h200"]) == pytest.approx(sum(gigabytes) / 4800, rel=0.01)


def test_a_model_without_recursion_reads_every_entry():
  config = config_lib.from_config_dict(paper.get_config("vanilla-135m")).model
  found = ideal.tick(config, 2, 100)
  assert found.entries == 2 * 100 * 30 * 2 * 3 * 64 * 2
