"""Programs of devices that share a model, compiled and counted."""

import importlib.util

import jax
import pytest

from configs import paper
from mor import config as config_lib
from mor import main
from mor.aot import chips
from mor.aot import decoding
from tests.helpers import tiny
from tests.house import test_main

HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None


@pytest.mark.slow
def test_a_device_has_half_of_the_pool_and_of_the_matrices():
  config = tiny.config(model=dict(vocab_size=62, num_layers=5))
  one, two = (decoding.DecodingSetup(config, jax.devices()[0], num_slots=2, page_size=4, more=tuple(more))
              for more in ([], jax.devices()[1:2]))
  alone, shared = (decoding.tick_figures(setup, decoding.compile_tick(setup)) for setup in (one, two))
  assert (alone["devices"], shared["devices"]) == (1, 2)
  assert shared["pool_bytes"] == alone["pool_bytes"] / 2
  assert alone["collectives"] == {} and set(shared["collectives"]) == {"all-gather", "all-reduce"}
  assert 0.4 < shared["ideal_bytes"] / alone["ideal_bytes"] < 0.6
  prefill = decoding.prefill_figures(two, decoding.compile_prefill(two, 1, 8), 1, 8)
  assert prefill["operations"] > 0


@pytest.mark.aot
@pytest.mark.skipif(not HAS_TPU_COMPILER, reason="needs pip install 'mor[tpu]'")
def test_four_chips_share_a_model_of_1700_million_parameters():
  """Ten layers of a pass, two sums each, one for the embedding and one of all logits; no loop, and no copy of the pool."""
  config = config_lib.from_config_dict(paper.get_config("mor-1.7b-r3"))
  first, *more = chips.devices("v5e:2x2")
  setup = decoding.DecodingSetup(config, first, num_slots=32, more=tuple(more))
  found = decoding.tick_figures(setup, decoding.compile_tick(setup))
  ticks = found["ticks"]
  assert {kind: one["count"] for kind, one in found["collectives"].items()} == {"all-gather": ticks, "all-reduce": 21 * ticks}
  assert found["a_tick"]["loops"] == found["a_tick"]["pool_copies"] == 0
  assert found["temporaries_of_pool"] < 0.05 and found["arguments"] + found["temporaries"] < chips.find(first).memory


def test_more_chips_than_there_are_is_refused(monkeypatch, capsys):
  monkeypatch.setattr(chips, "devices", lambda topology: jax.devices()[:4])
  given = ("--mode=compile", "--config=configs/quickstart.py", "--topology=v5e:2x2")
  assert test_main.run(*given, "--tensor=8") == main.WRONG
  assert capsys.readouterr().err == "error: --tensor=8, and v5e:2x2 has 4 chips; use at most 4\n"
  assert test_main.run(*given, "--tensor=4") == main.WRONG
  assert "tensor=4 does not divide model.num_heads=6, model.num_kv_heads=2; use 1 or 2" in capsys.readouterr().err
