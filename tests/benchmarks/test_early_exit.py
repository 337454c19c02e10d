"""The benchmark of early exit: a whole record of a tiny model whose exit is right by construction."""

import argparse

import numpy as np
import pytest

from benchmarks import early_exit
from tests.helpers import exiting


@pytest.mark.slow
def test_a_whole_record():
  """Layers behind the exit that add nothing: every draft is confirmed, and every text is the full depth's."""
  model = early_exit.damped(exiting.model("plain"), 2, 0.0)
  args = argparse.Namespace(after=(2,), thresholds=(0.0,), batches=(2,), format="float32", pending=3, first=0, prompts=6,
                            prompt_tokens=4, new_tokens=8, rounds=1, hf="", eval="", clock="wall", kinds=early_exit.KINDS)
  record = early_exit.measure(args, model, 2)
  rows = {row["variant"]: row for row in record["variants"]}
  assert list(rows) == ["full", "none", "trust-0.0", "verify-0.0", "copied-0.0", "mixed-0.0"]
  assert all(row["agreement"] == {"equal": 1.0, "prefix": 1.0} and row["to_full"]["median"] > 0 for row in rows.values())
  assert rows["trust-0.0"]["exit_rate"] > 0.7 and rows["full"]["exit_rate"] == rows["verify-0.0"]["exit_rate"] == 0
  assert len({row["nll"] for row in rows.values()}) == 1


def test_nats_are_the_full_depths():
  model, prompt, tokens = exiting.model("plain"), [1, 5, 9], [7, 2, 30, 4]
  logits_TV = exiting.logits(model, exiting.states(model, prompt + tokens, model.config.num_layers))
  logprob_TV = logits_TV - np.log(np.sum(np.exp(logits_TV), axis=1, keepdims=True))
  expected = -np.mean([logprob_TV[2 + i, token] for i, token in enumerate(tokens)])
  np.testing.assert_allclose(early_exit.nll(model, [prompt], [tokens]), expected, rtol=1e-4)
