"""Early exit: trusted tokens are their exits', approximate entries what they are said to be, and no request depends on
a preemption or its drafts."""

import jax
import numpy as np
import pytest
import scipy.stats

from tests.helpers import exit_oracle
from tests.helpers import exiting
from tests.helpers import serving

TEMPERATURE = 5.0  # at which no pair of tokens is rare


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "cycle"])
def test_copied_entries_are_the_deeper_layers_projections_of_the_exits_state(kind):
  """What is read from them is what a slow reference reads."""
  model = exiting.model(kind)
  some = 6 if kind == "plain" else 12  # the slow one takes more
  requests = serving.requests(some, **exiting.GREEDY, exit="trust", threshold=0.3, stop_tokens=[], repetition_penalty=1.0,
                              logprobs=True)
  got, depths = exiting.answers(exiting.engine(model, kind, dict(kv="copied")), requests), set()
  for (prompt, options), completion in zip(requests, got):
    num = min(options["max_tokens"], serving.CONTEXT + 1 - len(prompt))
    tokens, expected_depths, logprobs = exit_oracle.answer(model, exiting.KINDS[kind][1], 0.3, prompt, num)
    assert (completion.tokens, completion.depths) == (tokens, expected_depths), prompt
    np.testing.assert_allclose(completion.logprobs, logprobs, rtol=0, atol=1e-4)
    depths |= set(expected_depths)
  assert depths == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "expert_choice"])
def test_a_small_pool_preempts_and_changes_nothing(kind):
  """Not even how often a trusting request looks for an exit, which its history decides."""
  model = exiting.model(kind)
  modes = [dict(), dict(exit="trust", threshold=0.1), dict(exit="verify", threshold=0.1)]
  requests = serving.requests(12, max_tokens=31, stop_tokens=[], temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
  requests = [(prompt[:1], options | modes[i % 3]) for i, (prompt, options) in enumerate(requests)]
  engine = exiting.engine(model, kind, dict(worth=0.5), num_pages=44 if kind == "plain" else 27)
  expected = [exiting.answers(engine, [request])[0] for request in requests]
  assert engine.metrics()["preemptions"] == 0
  for i, completion in enumerate(exiting.answers(engine, requests)):
    serving.assert_same(completion, expected[i], requests[i])
    assert completion.early == expected[i].early, requests[i]
  assert engine.metrics()["preemptions"] > 0
  assert any(any(c.early) for c in expected)


def joint(model, prompt, vocab_size):
  """The full depth's probabilities of the next two tokens."""
  rows = [prompt + [a] for a in range(vocab_size)]
  p_VV = np.zeros((vocab_size, vocab_size))
  first_V = None
  for a, row in enumerate(rows):
    logits_TV = exiting.logits(model, exiting.states(model, row, model.config.num_layers)) / TEMPERATURE
    first_V, p_VV[a] = np.asarray(jax.nn.softmax(logits_TV[-2])), np.asarray(jax.nn.softmax(logits_TV[-1]))
  return first_V[:, None] * p_VV


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "cycle"])
def test_sampled_and_verified_tokens_follow_the_full_depth(kind):
  """Chi-square over pairs of tokens; a true sampler fails at this level once in 10^6 choices of seeds."""
  num, vocab_size, prompt = 1000 if kind == "cycle" else 2500, 5, [1, 3, 0]
  model = exiting.model(kind, vocab_size=vocab_size)
  chance_VV = joint(model, prompt, vocab_size)
  engine = exiting.engine(model, kind, num_slots=16)

  def p_value(mode, num):
    options = dict(temperature=TEMPERATURE, max_tokens=2, exit=mode, threshold=0.0)
    got = exiting.answers(
        engine, [(prompt, options | dict(seed=seed)) for seed in range(num)])
    count_VV = np.zeros_like(chance_VV)
    for completion in got:
      count_VV[tuple(completion.tokens)] += 1
    return scipy.stats.chisquare(count_VV.ravel(), num * chance_VV.ravel() / chance_VV.sum()).pvalue

  assert num * chance_VV.min() > 5
  assert p_value("verify", num) > 1e-6
  assert 0.1 < engine.metrics()["acceptance"] < 0.99
  assert p_value("trust", num // 2) < 1e-6, "the exit's own distribution is the full depth's: nothing was shown"
