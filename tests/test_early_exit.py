"""Early exit: verified requests are the full depth's, trusted ones their exits', and no entry is approximate."""

import jax
import numpy as np
import pytest
import scipy.stats

from mor.inference import slots as slots_lib
from tests import exiting
from tests import serving

GREEDY = dict(temperature=0.0)
TEMPERATURE = 5.0  # at which no pair of tokens is rare


def answers(engine, requests, order=0):
  done, _ = serving.serve(engine, requests, order)
  serving.assert_all_free(engine)
  return [done[i] for i in range(len(requests))]


def told(completion):
  return completion.tokens, completion.finish


def without_exits(requests):
  return [(p, {k: v for k, v in o.items() if k not in ("exit", "threshold")}) for p, o in requests]


@pytest.mark.parametrize("kind, pending", exiting.quick(("plain", 3), ("middle", 3), ("expert_choice", 1)))
def test_verified_requests_are_the_full_depths(kind, pending):
  """Token for token on 500 prompts, where all exit, some do, and none; stop tokens come from exits too."""
  model = exiting.model(kind)
  requests = serving.requests(500 if pending == 1 else 200, **GREEDY)
  expected = serving.reference(model, requests)
  assert {c.finish for c in expected} == {"stop", "length"}
  engine, acceptance = exiting.engine(model, kind, dict(pending=pending)), []
  for threshold in (1.0, 0.0, 0.3):
    got = answers(engine, [(p, o | dict(exit="verify", threshold=threshold)) for p, o in requests])
    for i, completion in enumerate(got):
      assert told(completion) == told(expected[i]), requests[i]
      assert not any(completion.early)
      np.testing.assert_allclose(completion.logprobs, expected[i].logprobs, rtol=0, atol=1e-4)
    acceptance.append(engine.metrics()["acceptance"])
  assert acceptance[0] == 0 < 0.05 < acceptance[1] <= acceptance[2] < 0.95, acceptance


@pytest.mark.parametrize("kind, num_slots", exiting.quick(("plain", 1), ("middle", 8), ("expert_choice", 8)))
def test_every_entry_after_a_sync_is_the_full_forwards(kind, num_slots):
  model = exiting.model(kind)
  modes = [dict(exit="trust"), dict(exit="verify")]
  requests = [(p, o | modes[i % 2]) for i, (p, o) in enumerate(serving.requests(20, **GREEDY, threshold=0.1))]
  engine = exiting.engine(model, kind, num_slots=num_slots, ticks=1)
  numbers = [engine.submit(prompt, **options) for prompt, options in requests]
  seen, done = [], {}
  while not engine.idle:
    for number, event in engine.step():
      if event.finish:
        done[number] = requests[numbers.index(number)][0] + engine.take(number).tokens
    slots = engine.slots
    for slot, job in enumerate(engine.scheduler.slots):
      synced = int(slots.phase_B[slot]) == slots_lib.START and int(slots.ring.count_B[slot]) == 0
      if job and job.started and synced:
        seen.append((job.id, int(slots.position_B[slot]), exiting.entries(engine.decoder, slots.cache, slot)))
  figures, compared = engine.metrics(), 0
  assert figures["exit_rate"] > 0 and 0 < figures["acceptance"] < 1
  for number, length, found in seen[::2]:
    if length > len(done[number]):
      continue  # a stop token, which the request does not keep, and none after it
    expected = exiting.prefilled(engine, done[number][:length])
    for place in expected:
      assert found[place].shape == expected[place].shape, (place, length)
      np.testing.assert_allclose(found[place], expected[place], rtol=0, atol=1e-4, err_msg=str((place, length)))
    compared += 1
  assert compared >= 10


@pytest.mark.parametrize("kind, first", [
    pytest.param("plain", 0, marks=pytest.mark.slow), pytest.param("cycle", 0, marks=pytest.mark.slow), ("cycle", 24)])
def test_trusted_tokens_are_their_exits(kind, first):
  """By the model that ends at each exit, over what was generated; an exit may know the first tokens only."""
  model, after = exiting.model(kind), exiting.KINDS[kind][1]
  requests = serving.requests(30, **GREEDY, exit="trust", threshold=0.2, stop_tokens=[], repetition_penalty=1.0)
  got = answers(exiting.engine(model, kind, dict(first=first)), requests)
  depths = set()
  for (prompt, _), completion in zip(requests, got):
    tokens_T = (prompt + completion.tokens)[:serving.CONTEXT]
    logits = [exiting.logits(model, exiting.states(model, tokens_T, n)) for n in (*after, model.config.num_layers)]
    for i, token in enumerate(completion.tokens, start=len(prompt) - 1):
      for depth, logits_TV in enumerate(logits, start=1):
        logits_V = logits_TV[i, :first or None] if depth < len(logits) else logits_TV[i]
        best = np.sort(jax.nn.softmax(logits_V))
        if best[-1] - best[-2] > 0.2 or depth == len(logits):
          assert completion.depths[i - len(prompt) + 1] == depth, (i, prompt)
          assert token == np.argmax(logits_V), (i, prompt)
          assert completion.early[i - len(prompt) + 1] == (depth < len(logits))
          break
      depths.add(depth)
  assert depths == {1, 2, 3}


@pytest.mark.parametrize("kind", exiting.quick(("plain",), ("expert_choice",)))
def test_requests_do_not_depend_on_their_neighbours(kind):
  """Trusted, verified, full and sampled ones together are what each is alone: tokens, depths and exits."""
  model = exiting.model(kind)
  modes = [dict(), dict(exit="trust", threshold=0.15), dict(exit="verify", threshold=0.1)]
  requests = [(p, o | modes[i % 3]) for i, (p, o) in enumerate(serving.requests(36))]
  first = dict(first=24) if kind == "expert_choice" else {}
  alone = exiting.engine(model, kind, first, num_slots=1)
  expected = [answers(alone, [request])[0] for request in requests]
  together = exiting.engine(model, kind, dict(pending=2, carry=3) | first)
  for order in range(3):
    for i, completion in enumerate(answers(together, requests, order)):
      serving.assert_same(completion, expected[i], requests[i])
      assert completion.early == expected[i].early, requests[i]
  assert together.metrics()["crowded"] > 0 and any(any(c.early) for c in expected)
  full = serving.reference(model, without_exits(requests))
  for i in range(0, 36, 3):
    assert told(expected[i]) == told(full[i])
  quiet = answers(together, without_exits(requests))  # in slots where exits were used
  assert [told(c) for c in quiet] == [told(c) for c in full]


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "expert_choice"])
def test_a_small_pool_preempts_and_changes_nothing(kind):
  """Not even how often a trusting request looks for an exit, which its history decides."""
  model = exiting.model(kind)
  modes = [dict(), dict(exit="trust", threshold=0.1), dict(exit="verify", threshold=0.1)]
  requests = serving.requests(12, max_tokens=31, stop_tokens=[], temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
  requests = [(prompt[:1], options | modes[i % 3]) for i, (prompt, options) in enumerate(requests)]
  fields = dict(worth=0.5, candidates=12)
  expected = answers(exiting.engine(model, kind, fields), requests)
  engine = exiting.engine(model, kind, fields, num_pages=44 if kind == "plain" else 27)
  for i, completion in enumerate(answers(engine, requests)):
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


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "cycle"])
def test_sampled_and_verified_tokens_follow_the_full_depth(kind):
  """Chi-square over pairs of tokens; a true sampler fails at this level once in 10^6 choices of seeds."""
  num, vocab_size, prompt = 4000, 5, [1, 3, 0]
  model = exiting.model(kind, vocab_size=vocab_size)
  expected_VV = num * joint(model, prompt, vocab_size)
  engine = exiting.engine(model, kind, num_slots=16)

  def p_value(mode):
    options = dict(temperature=TEMPERATURE, max_tokens=2, exit=mode, threshold=0.0)
    got = answers(
        engine, [(prompt, options | dict(seed=seed)) for seed in range(num)])
    count_VV = np.zeros_like(expected_VV)
    for completion in got:
      count_VV[tuple(completion.tokens)] += 1
    return scipy.stats.chisquare(count_VV.ravel(), expected_VV.ravel() * num / expected_VV.sum()).pvalue

  assert expected_VV.min() > 5
  assert p_value("verify") > 1e-6
  assert 0.1 < engine.metrics()["acceptance"] < 0.99
  assert p_value("trust") < 1e-6, "the exit's own distribution is the full depth's: nothing was shown"
