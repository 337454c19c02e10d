"""The decoding benchmark: its models, its ceiling, and a whole record at a tiny size."""

import json

import jax
import numpy as np
import pytest

from benchmarks import decode as benchmark
from benchmarks import decode_parts
from configs import paper
from mor.model import transformer
from mor.serve import engine as engine_lib
from mor.serve import model as model_lib
from tests.helpers import tiny


def _model(**fields):
  config = tiny.config(model=fields).model
  variables = transformer.Transformer(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))
  return model_lib.Model(config, variables, None, 32)


@pytest.mark.parametrize("sharing, num_layers", [("cycle", 6), ("middle_cycle", 8)])
def test_unrolled_model_is_the_recursive_one(sharing, num_layers):
  model = _model(sharing=sharing, num_layers=num_layers, router=tiny.FIXED)
  flat = benchmark.unroll(model)
  assert flat.config.num_recursions == 1 and flat.config.num_layers == num_layers
  tokens = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
  hidden = [transformer.Transformer(m.config).apply(m.variables, tokens).hidden_BTD for m in (model, flat)]
  np.testing.assert_allclose(*hidden, atol=1e-5)


def test_models_have_the_size_of_the_paper():
  assert benchmark.model_config("135m", 3, True).num_layers == 30
  assert benchmark.model_config("135m", 4, True).num_layers == 32
  assert benchmark.model_config("135m", 1, False, vanilla=True).num_layers == 30
  model = benchmark.model_config("360m", 3, True)
  assert (model.num_layers, model.sharing, model.d_model) == (32, "middle_cycle", 960)


def test_probabilities_of_the_variants():
  assert benchmark.probabilities("all", 3) == (1.0, 0.0, 0.0)
  assert benchmark.probabilities("never", 3) == (0.0, 0.0, 1.0)
  assert benchmark.probabilities("naive", 2) == (0.5, 0.5)


def test_requests_repeat_and_fit_the_context():
  for mix, prompts in (("plain", {1}), ("chat", set(range(8, 257)))):
    made = benchmark.requests(61, mix)
    some = [next(made) for _ in range(200)]
    again = benchmark.requests(61, mix)
    assert some == [next(again) for _ in range(200)]
    assert {len(r.prompt) for r in some} <= prompts
    assert all(len(r.prompt) + r.max_tokens <= benchmark.CONTEXT + 1 for r in some)
    assert len({r.max_tokens for r in some}) > 50


def test_steps_are_drawn_as_often_as_they_store():
  model = _model()
  engine = engine_lib.Engine(model, num_slots=4, page_size=4)
  length_BR = np.array([[10, 5, 0]] * 4, np.int32)
  engine.runner.slots = engine.runner.slots.replace(cache=engine.runner.slots.cache.replace(length_BR=jax.numpy.asarray(length_BR)))
  steps_KB = decode_parts._steps(engine)
  assert set(steps_KB.flat) == {0, 1}
  assert 0.4 < (steps_KB == 0).mean() < 0.95  # 2 in 3 of 32: outside by chance in under 1 of 1000


def test_bytes_are_those_of_the_pools():
  engine = engine_lib.Engine(_model(), num_slots=3, page_size=4, num_pages=11, num_edge_pages=7)
  entry = 2 * 2 * 6 * 4  # keys and values, 2 heads of 6, float32
  assert decode_parts.kv_bytes(engine) == entry * 4 * (2 * 11 + 2 * 7)


def test_a_whole_record(tmp_path, monkeypatch):
  monkeypatch.setitem(paper.SIZES, "tiny", (8, 16, 2, 1, 24))
  monkeypatch.setattr(benchmark, "WARM_UP", 2)
  out = tmp_path / "out.json"
  benchmark.main(["--shape=tiny", "--batches=3", "--rounds=2", "--turn=2", "--variants=never,balanced",
                  "--format=float32", "--context=64", "--ticks=3", "--storage=dense", f"--out={out}"])
  record = json.loads(out.read_text())
  assert record["clock"] == "wall"
  (batch,) = record["batches"]
  assert [row["variant"] for row in batch["variants"]] == ["never-r3", "balanced-r3"]
  (gain,) = batch["gains"]
  parts, depth = gain["seconds"], gain["mean_depth"]
  ceiling = (3 * parts["pass_full"] + parts["edge_full"]) / (depth * (parts["pass_routed"] + parts["edge_routed"]))
  assert gain["ceiling"] == pytest.approx(ceiling)
  assert gain["gain_per_ceiling"] == pytest.approx(gain["gain"]["median"] / ceiling)
  assert batch["variants"][0]["metrics"]["mean_depth"] == 3
  assert 1 <= depth < 3


@pytest.mark.parametrize("argv, message", [
    (["--variants=dance"], "use some of vanilla"),
    (["--variants=trained"], "give --workdir"),
    (["--batches=a"], "use counts"),
    (["--recursions=1"], "start"),
    (["--shape=9m"], "--help"),
    (["--context=9"], "use at least 16"),
])
def test_wrong_options(argv, message):
  with pytest.raises(ValueError, match=message):
    benchmark.parse(argv)
