"""Every measure of confidence decides in an engine what it decides on paper, and its calibrator learns what it saw."""

import jax
import numpy as np
import pytest

from mor.exits import calibration
from mor.exits import confidence
from tests.helpers import exiting
from tests.helpers import serving

AFTER = exiting.KINDS["plain"][1]
OPTIONS = exiting.GREEDY | dict(stop_tokens=[], repetition_penalty=1.0)
THRESHOLDS = {"margin": 0.2, "maximum": 0.4, "entropy": 0.75, "saturation": 0.75, "agreement": 0.5}


def said(model, tokens_T):
  """Logits and states of unit mean square at the embedding, each exit and the end, `[T, V]` and `[T, D]`."""
  embedding_TD = np.asarray(model.variables["params"]["embedding"])[tokens_T]
  states = [embedding_TD, *(exiting.states(model, tokens_T, n) for n in (*AFTER, model.config.num_layers))]
  return [exiting.logits(model, x_TD) for x_TD in states], states


def sure(measure, at, logits, states):
  """Of exit `at`, 1 for the first, for each token."""
  p_TV = np.asarray(jax.nn.softmax(logits[at]))
  ordered_TV = np.sort(p_TV)
  unit = [x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True) for x_TD in states]
  same_T = np.argmax(logits[at], axis=1) == np.argmax(logits[at - 1], axis=1)
  return {
      "margin": lambda: ordered_TV[:, -1] - ordered_TV[:, -2],
      "maximum": lambda: ordered_TV[:, -1],
      "entropy": lambda: 1 + np.sum(p_TV * np.log(p_TV), axis=1) / np.log(p_TV.shape[1]),
      "saturation": lambda: np.sum(unit[at] * unit[at - 1], axis=1),
      "agreement": lambda: same_T & (at > 1),
  }[measure]()


@pytest.mark.slow
@pytest.mark.parametrize("measure", confidence.MEASURES)
def test_a_token_leaves_where_its_confidence_passes(measure):
  model, threshold = exiting.model("plain"), THRESHOLDS[measure]
  requests = serving.requests(12, **OPTIONS, exit="trust", threshold=threshold)
  got = exiting.answers(exiting.engine(model, "plain", dict(measure=measure)), requests)
  depths = []
  for (prompt, _), completion in zip(requests, got):
    logits, states = said(model, (prompt + completion.tokens)[:serving.CONTEXT])
    for i, token in enumerate(completion.tokens, start=len(prompt) - 1):
      leaves = [sure(measure, at, logits, states)[i] > threshold for at in (1, 2)] + [True]
      depth = 1 + leaves.index(True)
      assert completion.depths[i - len(prompt) + 1] == depth, (i, prompt)
      assert token == np.argmax(logits[depth][i])
      depths.append(depth)
  assert len(set(depths)) == (2 if measure == "agreement" else 3), np.bincount(depths)


def test_a_calibrator_learns_online_what_the_exit_and_the_full_depth_said():
  """Of each token once; the next request without a threshold gets the one that was learnt, and uses it."""
  model = exiting.model("plain")
  calibrator = calibration.Calibrator("learn_then_test", interval=4096, delta=0.5, epsilon=0.1)
  engine = exiting.engine(model, "plain", dict(after=AFTER[1:], monitor=True), calibrator=calibrator)
  requests = serving.requests(16, **OPTIONS, exit="trust")
  pairs = []
  for (prompt, _), completion in zip(requests, exiting.answers(engine, requests)):
    assert not any(completion.early), "nothing was learnt yet"
    logits, states = said(model, (prompt + completion.tokens)[:serving.CONTEXT])
    sure_T, agreed_T = sure("margin", 2, logits, states), np.argmax(logits[2], 1) == np.argmax(logits[3], 1)
    new = slice(len(prompt) - 1, len(prompt) + len(completion.tokens) - 1)
    pairs += zip(sure_T[new].tolist(), agreed_T[new].tolist())
  seen = zip(calibrator.state()["confidence"], calibrator.state()["agreed"])
  np.testing.assert_allclose(sorted(seen), sorted(pairs), rtol=0, atol=1e-4)
  assert {agreed for _, agreed in pairs} == {False, True}

  assert 0 < calibrator.refit() < 1
  seen = [c for c, _ in pairs]
  expected = calibration.learn_then_test(np.array(seen), np.array([a for _, a in pairs]), delta=0.5, epsilon=0.1)
  assert abs(calibrator.threshold - expected) < 1e-9
  stated = exiting.answers(engine, [(p, o | dict(threshold=calibrator.threshold)) for p, o in requests])
  learnt = exiting.answers(engine, requests)
  assert any(any(c.early) for c in learnt)
  for a, b in zip(learnt, stated):
    assert (exiting.told(a), a.early) == (exiting.told(b), b.early)
