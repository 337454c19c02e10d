"""Early exit: verified requests are the full depth's, trusted tokens their exits', no entry is approximate, and no
neighbour matters.

The quick tests of a kind share one program, whose dispatches are of one tick.
"""

import time

import jax
import numpy as np
import pytest

from mor.decode import slots as slots_lib
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


def engine(kind, model, num_slots=8, calibrator=None, **fields):
  fields = dict(carry=4, first=24 if kind == "expert_choice" else 0, monitor=kind == "plain") | fields
  return exiting.engine(model, kind, fields, num_slots=num_slots, ticks=1, calibrator=calibrator)


@pytest.mark.parametrize("kind, pending", exiting.quick(("plain", 3), slow=((3,), (1,))))
def test_verified_requests_are_the_full_depths(kind, pending):
  """Token for token, where all exit, some do, and none; stop tokens come from exits too."""
  model, num = exiting.model(kind), 40 if (kind, pending) == ("plain", 3) else 500
  requests = serving.requests(num, **exiting.GREEDY)
  expected = serving.reference(model, requests)
  assert {c.finish for c in expected} == {"stop", "length"}
  made, acceptance = engine(kind, model, pending=pending), []
  for threshold in (1.0, 0.0, 0.3):
    got = exiting.answers(made, [(p, o | dict(exit="verify", threshold=threshold)) for p, o in requests])
    for i, completion in enumerate(got):
      assert exiting.told(completion) == exiting.told(expected[i]), requests[i]
      assert not any(completion.early)
      np.testing.assert_allclose(completion.logprobs, expected[i].logprobs, rtol=0, atol=1e-4)
    acceptance.append(made.metrics()["acceptance"])
  assert acceptance[0] == 0 < 0.05 < acceptance[1] <= acceptance[2] < 0.95, acceptance


@pytest.mark.parametrize("kind, num_slots", exiting.quick(("plain", 8), ("expert_choice", 8), slow=((1,), (8,))))
def test_every_entry_after_a_sync_is_the_full_forwards(kind, num_slots):
  model = exiting.model(kind)
  modes = [dict(exit="trust"), dict(exit="verify")]
  requests = [(p, o | modes[i % 2]) for i, (p, o) in enumerate(serving.requests(20, **exiting.GREEDY, threshold=0.1))]
  made = engine(kind, model, num_slots)
  numbers = [made.submit(prompt, **options) for prompt, options in requests]
  seen, done = [], {}
  while not made.idle:
    for number, event in made.step():
      if event.finish:
        done[number] = requests[numbers.index(number)][0] + made.take(number).tokens
    slots = made.runner.slots
    for slot, job in enumerate(made.scheduler.slots):
      synced = int(slots.phase_B[slot]) == slots_lib.START and int(slots.ring.count_B[slot]) == 0
      if job and job.started and synced:
        seen.append((job.id, int(slots.position_B[slot]), exiting.entries(made.runner.decoder, slots.cache, slot)))
  figures, compared = made.metrics(), 0
  assert figures["exit_rate"] > 0 and 0 < figures["acceptance"] < 1
  for number, length, found in seen[::4 if (kind, num_slots) in (("plain", 8), ("expert_choice", 8)) else 2]:
    if length > len(done[number]):
      continue  # a stop token, which the request does not keep, and none after it
    expected = exiting.prefilled(made, done[number][:length])
    for place in expected:
      assert found[place].shape == expected[place].shape, (place, length)
      np.testing.assert_allclose(found[place], expected[place], rtol=0, atol=1e-4, err_msg=str((place, length)))
    compared += 1
  assert compared >= 10


@pytest.mark.parametrize("kind", exiting.quick(("plain",), ("expert_choice",), slow=((),)))
def test_requests_do_not_depend_on_their_neighbours(kind):
  """Trusted, verified, full and sampled ones together are what each is alone: tokens, depths and exits."""
  model = exiting.model(kind)
  modes = [dict(), dict(exit="trust", threshold=0.15), dict(exit="verify", threshold=0.1)]
  requests = [(p, o | modes[i % 3]) for i, (p, o) in enumerate(serving.requests(36))]
  made = engine(kind, model)
  expected = [exiting.answers(made, [request])[0] for request in requests]
  assert made.metrics()["crowded"] == 0
  for order in range(3):
    for i, completion in enumerate(exiting.answers(made, requests, order)):
      serving.assert_same(completion, expected[i], requests[i])
      assert completion.early == expected[i].early, requests[i]
  assert made.metrics()["crowded"] > 0 and any(any(c.early) for c in expected)
  if made.exits.first:
    chosen = [token for c in expected for token, early in zip(c.tokens, c.early) if early]
    assert max(chosen) < made.exits.first, "an exit chose a token that it may not"
  full = serving.reference(model, exiting.without_exits(requests))
  for i in range(0, 36, 3):
    assert exiting.told(expected[i]) == exiting.told(full[i])
  quiet = exiting.answers(made, exiting.without_exits(requests))  # in slots where exits were used
  assert [exiting.told(c) for c in quiet] == [exiting.told(c) for c in full]


@pytest.mark.parametrize("kind, fields", [
    pytest.param("plain", {}, marks=pytest.mark.slow), pytest.param("cycle", {}, marks=pytest.mark.slow),
    pytest.param("cycle", dict(first=24), marks=pytest.mark.slow)])
def test_trusted_tokens_are_their_exits(kind, fields):
  """By the model that ends at each exit, over what was generated; an exit may have to choose from some tokens only."""
  model, after = exiting.model(kind), exiting.KINDS[kind][1]
  num = 16 if kind == "plain" else 30  # the slow ones take more
  requests = serving.requests(num, **exiting.GREEDY, exit="trust", threshold=0.2, stop_tokens=[], repetition_penalty=1.0)
  got = exiting.answers(engine(kind, model, **fields), requests)
  depths, num_tokens = set(), model.config.vocab_size
  for (prompt, _), completion in zip(requests, got):
    tokens_T = (prompt + completion.tokens)[:serving.CONTEXT]
    logits = [exiting.logits(model, exiting.states(model, tokens_T, n)) for n in (*after, model.config.num_layers)]
    first = np.arange(fields.get("first", num_tokens))
    for i, token in enumerate(completion.tokens, start=len(prompt) - 1):
      for depth, logits_TV in enumerate(logits, start=1):
        told, choice = logits_TV[i], first if depth < len(logits) else np.arange(num_tokens)
        best = np.sort(jax.nn.softmax(told[choice]))
        if best[-1] - best[-2] > 0.2 or depth == len(logits):
          assert completion.depths[i - len(prompt) + 1] == depth, (i, prompt)
          assert token == choice[np.argmax(told[choice])], (i, prompt)
          assert completion.early[i - len(prompt) + 1] == (depth < len(logits))
          break
      depths.add(depth)
  assert depths == {1, 2, 3}


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
  made = engine("plain", model, calibrator=calibrator)
  requests = serving.requests(16, **OPTIONS, exit="trust")
  pairs = []
  for (prompt, _), completion in zip(requests, exiting.answers(made, requests)):
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
  stated = exiting.answers(made, [(p, o | dict(threshold=calibrator.threshold)) for p, o in requests])
  learnt = exiting.answers(made, requests)
  assert any(any(c.early) for c in learnt)
  for a, b in zip(learnt, stated):
    assert (exiting.told(a), a.early) == (exiting.told(b), b.early)


def test_the_time_of_a_dispatch_is_its_own():
  """Not that of what the host does between it and the next one."""
  made, seen, own = engine("plain", exiting.model("plain")), [], []
  made.runner.pace.saw = lambda drafted, tokens, seconds, alone: seen.append(seconds)
  made.submit([1, 5], max_tokens=20, stop_tokens=(), exit="verify", threshold=0.2)
  while not made.idle:
    start = time.monotonic()
    made.step()
    made.wait()
    own.append(time.monotonic() - start)
    time.sleep(0.1)
  assert len(seen) > 1 and 0 < sum(seen) <= sum(own[1:])  # the first one compiles, and is not told
