"""Many prompts in one call of the prefill, as on accelerators: fewer calls, and each request's own tokens."""

import random

import pytest

from mor.decode import prefill
from mor.model import kernels
from mor.serve import runner as runner_lib
from mor.serve import scheduler as scheduler_lib
from tests.helpers import interrupts
from tests.helpers import serving


@pytest.fixture(scope="module")
def model():
  return serving.model()


@pytest.fixture
def packing(monkeypatch):
  """Lets the runner store several prompts in a call, in small buckets."""
  monkeypatch.setattr(kernels, "platform", lambda: "gpu")
  monkeypatch.setattr(runner_lib, "LEAST_CHUNK", 4)


def spy(monkeypatch, store) -> list:
  """Puts `store` in place of the prefill; returns a list that takes the shape, the context and the chunks of each call."""
  calls: list = []

  def call(decoder, weights, slots, slot_G, tokens_GT, start_G, length_G, *, context_pages):
    real_G = length_G > 0
    assert len(set(slot_G[real_G])) == real_G.sum() and (slot_G[~real_G] == slots.phase_B.shape[0]).all()
    assert (context_pages == 0) == (start_G == 0).all()
    chunks = list(zip(slot_G[real_G].tolist(), start_G[real_G].tolist(), length_G[real_G].tolist()))
    calls.append((tokens_GT.shape, context_pages, chunks))
    return store(decoder, weights, slots, slot_G, tokens_GT, start_G, length_G, context_pages=context_pages)

  monkeypatch.setattr(prefill, "store", call)
  return calls


def run(model, monkeypatch, to_store: list[int], decodes: bool = False) -> tuple[list, list[int]]:
  """Prefills prompts of so many tokens to store, without a device; returns the calls, and the requests that started."""
  runner, started = serving.engine(model, prefill_chunk=16, num_slots=6, storage="paged").runner, []
  calls = spy(monkeypatch, lambda decoder, weights, slots, *arrays, context_pages: (slots, True))

  def start(jobs):
    for job in jobs:
      started.append(job.id)
      job.started = True

  monkeypatch.setattr(runner, "_start", start)
  jobs = [scheduler_lib.Job(i, (0,), 1, None, tokens=[0] * (1 + num), slot=i) for i, num in enumerate(to_store)]
  jobs[0].started = decodes
  runner.prefill(jobs)
  return calls, started


def test_calls_hold_chunks_of_one_shape_the_oldest_first(model, packing, monkeypatch):
  calls, started = run(model, monkeypatch, [3, 7, 4, 0, 20, 23])
  assert calls == [
      ((4, 4), 0, [(0, 0, 3), (2, 0, 4)]), ((2, 8), 0, [(1, 0, 7)]), ((1, 16), 0, [(4, 0, 16)]),
      ((4, 4), 4, [(4, 16, 4)]), ((1, 16), 0, [(5, 0, 16)]), ((2, 8), 4, [(5, 16, 7)])]
  assert started == [0, 2, 3, 1, 4, 5]


def test_beside_decoding_the_calls_keep_to_the_budget(model, packing, monkeypatch):
  """A call is as large as the budget; what is left over takes one more."""
  calls, started = run(model, monkeypatch, [1, 9, 7, 8, 8, 3], decodes=True)
  assert calls == [((1, 16), 0, [(1, 0, 9)]), ((2, 8), 0, [(2, 0, 7)])] and started == [1, 2]


def test_on_a_cpu_a_call_holds_one_chunk(model, monkeypatch):
  calls, started = run(model, monkeypatch, [3, 7, 0, 4, 20, 0])
  pages = serving.CONTEXT // 4
  assert calls == [((1, 16), 0, [(0, 0, 3)]), ((1, 16), 0, [(1, 0, 7)]), ((1, 16), 0, [(3, 0, 4)]),
                   ((1, 16), 0, [(4, 0, 16)]), ((1, 16), pages, [(4, 16, 4)])]
  assert started == [0, 2, 5, 1, 3, 4]


@pytest.mark.slow
def test_requests_get_their_own_tokens_whatever_is_stored_beside(model, packing, monkeypatch):
  requests = serving.requests(14)
  expected, calls = serving.reference(model, requests), spy(monkeypatch, prefill.store)
  for options in ({}, dict(num_pages=24, num_edge_pages=12)):  # the second preempts
    engine = serving.engine(model, storage="paged", **options)
    done, _ = serving.serve(engine, requests, order=0)
    for place, completion in done.items():
      serving.assert_same(completion, expected[place], requests[place])
    serving.assert_all_free(engine)
  assert max(len(chunks) for *_, chunks in calls) > 1 and {pages for _, pages, _ in calls} >= {0, 4}


@pytest.mark.slow
def test_a_step_that_stores_several_prompts_may_be_interrupted_at_any_line(model, packing):
  requests = [(prompt, options) for prompt, options in serving.requests(9, stop_tokens=[], logprobs=False)
              if options["repetition_penalty"] == 1]
  expected, rng, outcomes = serving.reference(model, requests), random.Random(0), []
  engine = serving.engine(model, storage="paged")
  lines = interrupts.count_lines(engine, requests, expected)
  for _ in range(24):
    at = interrupts.at_line(rng.randint(1, lines), interrupts.interrupt)
    outcomes.append(interrupts.run(engine, requests, expected, rng.randrange(3), at))
    if outcomes[-1] == "refused":
      engine = serving.engine(model, storage="paged")
  assert outcomes.count("exact") >= 8, outcomes
