"""Formats are scored on the same tokens as the forward pass."""

import json

import jax
import numpy as np
import pytest

from benchmarks import formats
from mor.model import transformer
from mor.serve import model as model_lib
from mor.train import loop
from tests.helpers import tiny


def test_scores_are_the_forward_passes():
  config = tiny.config().model
  tokens_BT, target_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 3, 7)).astype(np.int32)
  module = transformer.Transformer(config)
  variables = module.init(jax.random.key(0), tokens_BT)
  out = module.apply(variables, tokens_BT, routing="decide")
  log_BTV = jax.nn.log_softmax(transformer.unembed(variables["params"], out.hidden_BTD))
  nll_BT, token_BT, depth_BT = formats.score(model_lib.Model(config, variables, None, 16), "float32", "float32",
                                             tokens_BT, target_BT)
  np.testing.assert_allclose(nll_BT, -np.take_along_axis(np.asarray(log_BTV), target_BT[:, :, None], 2)[:, :, 0],
                             atol=1e-4)
  np.testing.assert_array_equal(token_BT, np.argmax(log_BTV, axis=2))
  np.testing.assert_array_equal(depth_BT, np.sum(out.keep_RBT, axis=0))


@pytest.mark.slow
def test_a_whole_record(tmp_path):
  config = tiny.config(tiny.BYTES, data=dict(source=tiny.write_text(tmp_path), cache_dir=str(tmp_path / "cache")),
                       train=dict(steps=2))
  loop.train(config, tmp_path / "run")
  formats.main([f"--workdir={tmp_path / 'run'}", "--rows=2", f"--out={tmp_path / 'out.json'}"])
  record = json.loads((tmp_path / "out.json").read_text())
  first, *others = record["formats"]
  assert (first["same_token"], first["same_depth"]) == (1.0, 1.0)
  assert [row["weights"] for row in others] == ["bfloat16", "int8"]
  for row in others:
    assert 0 < abs(row["nll"] - first["nll"]) < 0.02 * first["nll"]
