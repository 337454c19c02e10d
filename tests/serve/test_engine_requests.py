"""Requests that are wrong, aborted or streamed; and what an engine says of itself."""

import numpy as np
import pytest

from mor.data import tokenizer as tokenizer_lib
from mor.serve import engine as engine_lib
from mor.serve import model as model_lib
from tests.helpers import decoding
from tests.helpers import serving
from tests.helpers import tiny


@pytest.fixture(scope="module")
def model():
  config = tiny.config(tiny.BYTES, model=dict(router=tiny.TOKEN_CHOICE)).model
  return model_lib.Model(config, decoding.draw(config), tokenizer_lib.ByteTokenizer(), serving.CONTEXT)


@pytest.fixture(scope="module")
def engine(model):
  """Idle before and after each test."""
  return serving.engine(model)


@pytest.fixture(scope="module")
def beside(model):
  """Requests that run beside those of a test, and what becomes of them."""
  requests = [([10 * i + 1, 3], dict(max_tokens=8 + i, temperature=1.0, seed=i)) for i in range(4)]
  expected = model.generate_requests([model.request(prompt, **options) for prompt, options in requests])
  return requests, expected


def start(engine, beside):
  return [engine.submit(prompt, **options) for prompt, options in beside[0]]


WRONG = [
    ([], {}, "the prompt is empty"),
    ("", {}, "the prompt is empty; give some text"),
    ([999], {}, "token 999 of the prompt is not in the vocabulary; use ids 0 to 262"),
    ([1] * 33, {}, "the prompt has 33 tokens, more than the context of 32"),
    ([1], dict(max_tokens=0), "max_tokens=0; use a count >= 1"),
    ([1], dict(temperature=float("nan")), "temperature=nan; use a finite number"),
    ([1], dict(stop_strings=[""]), "use non-empty strings"),
    ([1], dict(top_q=1), "unknown option 'top_q'"),
    (None, {}, "prompt=None; give text, or a list of token ids"),
    (np.array([1.9, 2.2]), {}, "token 1.9 of the prompt"),
    (b"hi", {}, "prompt=b'hi' is bytes"),
    ([1], dict(max_tokens="3"), "max_tokens='3'; use a count >= 1"),
    ([1], dict(self=1), "unknown option .self."),
]


def test_a_wrong_request_is_refused_alone(engine, beside):
  numbers = start(engine, beside)
  for prompt, options, message in WRONG:
    for call in (engine.submit, engine.stream):
      with pytest.raises(ValueError, match=message):
        call(prompt, **options)
    with pytest.raises(ValueError, match=message):
      engine.generate([[1, 2], prompt], **options)
    engine.step()
  serving.finish(engine, numbers, beside[1])


def test_arrays_and_their_integers_are_prompts(engine, model, beside):
  numbers, options = start(engine, beside), dict(max_tokens=np.int64(3), seed=np.uint32(1), temperature=np.float32(1.0))
  (expected,) = model.generate([[1, 2]], max_tokens=3, seed=1, temperature=1.0)
  for done in engine.generate(np.array([[1, 2], [1, 2]]), **options):
    serving.assert_same(done, expected)
  serving.finish(engine, numbers, beside[1])


def test_a_request_that_never_fits_is_refused_alone(model, beside):
  engine = serving.engine(model, num_pages=12)
  numbers = start(engine, beside)
  with pytest.raises(ValueError, match="may need 24 .* pages .* more than the pool of 12 .*; lower max_tokens"):
    engine.submit([1] * 20, max_tokens=13)
  serving.finish(engine, numbers, beside[1])


def test_a_stream_adds_up_to_the_completion(engine, model, beside):
  numbers = start(engine, beside)
  options = dict(max_tokens=12, temperature=1.0, seed=11, logprobs=True)
  (expected,) = model.generate(["of "], **options)
  events = list(engine.stream("of ", **options))
  assert [e.token for e in events if e.token is not None] == expected.tokens
  assert "".join(e.text for e in events) == expected.text != ""
  assert [e.depth for e in events][:len(expected.depths)] == expected.depths
  assert [e.logprob for e in events][:len(expected.logprobs)] == pytest.approx(expected.logprobs, abs=1e-4)
  assert [e.finish for e in events] == [""] * (len(events) - 1) + [expected.finish]
  serving.finish(engine, numbers, beside[1])


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_closed_stream_aborts_its_request(engine, beside, taken):
  numbers = start(engine, beside)
  stream = engine.stream([5], max_tokens=31)
  for _ in range(taken):
    assert not next(stream).finish
  waiting = len(engine.scheduler.queue) + len(engine.scheduler.held)
  stream.close()
  assert len(engine.scheduler.queue) + len(engine.scheduler.held) == waiting - 1
  serving.finish(engine, numbers, beside[1])


def test_two_streams_take_turns(engine, model):
  options = dict(max_tokens=9, temperature=1.0)
  expected = model.generate_requests([model.request([7], seed=seed, **options) for seed in range(2)])
  streams = [engine.stream([7], seed=seed, **options) for seed in range(2)]
  tokens = [[], []]
  for _ in range(20):
    for stream, mine in zip(streams, tokens):
      mine += [e.token for e in [next(stream, None)] if e and e.token is not None]
  assert tokens == [done.tokens for done in expected]
  serving.finish(engine, [], [])


def test_aborted_and_taken_requests_are_forgotten(engine, beside):
  numbers = start(engine, beside)
  queued = [engine.submit([6, 7], max_tokens=20) for _ in range(3)]
  assert engine.abort(queued[2]).finish == "aborted"  # from the queue
  while not engine.take(queued[0]).tokens:  # a look at what goes on forgets nothing
    engine.step()
  assert engine.abort(queued[0]).tokens and engine.abort(queued[1]).finish == "aborted"
  for number in (*queued, 999):
    for call in (engine.take, engine.abort):
      with pytest.raises(ValueError, match=f"no request {number}; it was never submitted, or its completion was taken"):
        call(number)
  serving.finish(engine, numbers, beside[1])


def test_a_stop_string_frees_the_slot(engine, model, beside):
  numbers = start(engine, beside)
  text = engine.generate(["of "], max_tokens=20, temperature=2.0, seed=3)[0].text
  (done,) = engine.generate(["of "], max_tokens=20, temperature=2.0, seed=3, stop_strings=[text[2:4]])
  assert done.finish == "stop" and done.text == text[:text.find(text[2:4])]
  serving.finish(engine, numbers, beside[1])


def test_figures(model, beside):
  engine = serving.engine(model)
  assert engine.metrics()["output_tokens"] == 0 == engine.metrics()["output_throughput"]
  done = engine.generate([prompt for prompt, _ in beside[0]], max_tokens=10, stop_tokens=[])
  figures, depths = engine.metrics(), [depth for c in done for depth in c.depths]
  assert figures["requests"] == 4 and figures["output_tokens"] == 40 and figures["prompt_tokens"] == 4
  assert figures["mean_depth"] == pytest.approx(sum(depths) / len(depths))
  ran = figures["slot_utilisation"] * figures["ticks"] * engine.num_slots
  assert ran == pytest.approx(sum(depths)), "a tick of a slot is a step of a token"
  assert max(sum(c.depths) for c in done) <= figures["ticks"] < 2 * max(sum(c.depths) for c in done)
  assert figures["output_throughput"] == pytest.approx(40 / figures["seconds"])
  assert 0 < figures["ttft_p50_seconds"] <= figures["ttft_p99_seconds"] <= figures["seconds"]
  assert 0 < figures["tpot_p50_seconds"] <= figures["tpot_p99_seconds"] <= figures["seconds"]
  pool, page = engine.scheduler.pool, 4
  edge_pages = sum(-(-(2 + 10 - 1) // page) for _ in done)  # the last token is not stored
  assert 0 < figures["edge_pool_peak"] <= edge_pages / pool.num_edge_pages
  assert 0 < figures["pool_peak"] <= pool.num_rows * edge_pages / pool.num_pages
  assert figures["preemptions"] == figures["stalled"] == 0


@pytest.mark.parametrize("options, message", [
    (dict(num_slots=0), "num_slots=0; use a count >= 1"),
    (dict(page_size=0), "page_size=0; use a count >= 1"),
    (dict(num_pages=0), "num_pages=0; use a count >= 1"),
    (dict(num_edge_pages=-1), "num_edge_pages=-1; use a count >= 1"),
    (dict(prefill_chunk=0), "prefill_chunk=0; use a count >= 1"),
    (dict(ticks=0), "ticks=0; use a count >= 1"),
    (dict(context=0), "context=0; use a count >= 1"),
    (dict(batching="rows"), "batching='rows'; use one of depth, sequence"),
    (dict(storage="disk"), "storage='disk'; use one of paged, packed, gather, dense"),
    (dict(kv_format="int4"), "kv_format='int4'; use one of float32, bfloat16"),
    (dict(weight_format="int4"), "weight_format='int4'; use one of float32, bfloat16"),
])
def test_bad_engines_are_refused(model, options, message):
  with pytest.raises(ValueError, match=message):
    engine_lib.Engine(model, **options)


@pytest.mark.parametrize("sharing, layers", [("sequence", 6), ("middle_sequence", 8)])
def test_schemes_whose_steps_have_layers_of_their_own_are_refused(sharing, layers):
  model = serving.model(sharing=sharing, num_layers=layers, router=tiny.FIXED)
  with pytest.raises(ValueError, match=rf"sharing='{sharing}' gives each step its own layers.*use generate\(\)"):
    engine_lib.Engine(model)


def test_what_was_read_while_waiting_comes_with_the_next_step(engine):
  numbers = [engine.submit([token, 3], max_tokens=6) for token in (1, 2)]
  got = {number: [] for number in numbers}
  while not engine.idle:
    for number, event in engine.step():
      got[number].append(event.token)
    engine.wait()
    assert not engine.runner.flights
  assert got == {number: engine.take(number).tokens for number in numbers} and all(map(len, got.values()))
