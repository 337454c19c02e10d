"""The engine gives every request the tokens of `generate`, whatever else it serves."""

import numpy as np
import pytest

from mor.decode import decoder as decoder_lib
from mor.model.kv import plans as kv_plans
from mor.model.routers import fixed
from mor.model.routers import table as router_table
from tests.helpers import decoding
from tests.helpers import serving
from tests.helpers import tiny

def check(engine, requests, expected, order=0):
  done, _ = serving.serve(engine, requests, order)
  assert len(done) == len(requests)
  for place, completion in done.items():
    serving.assert_same(completion, expected[place], requests[place])
  serving.assert_all_free(engine)


def test_engine_equals_generate_in_any_order_and_beside_aborts():
  model, requests = serving.model(), serving.requests(200)
  expected = serving.reference(model, requests)
  assert {c.finish for c in expected} == {"stop", "length"}
  assert {depth for c in expected for depth in c.depths} == {1, 2, 3}
  engine = serving.engine(model)
  for order in range(5):
    done, aborted = serving.serve(engine, requests, order, abort=0.15)
    assert aborted and len(done) + len(aborted) == len(requests)
    for place, completion in done.items():
      serving.assert_same(completion, expected[place], (order, requests[place]))
    for place, completion in aborted.items():
      assert completion.finish == "aborted"
      assert completion.tokens == expected[place].tokens[:len(completion.tokens)]
    assert 0 < sum(bool(c.tokens) for c in aborted.values()) < len(aborted), "all aborts met one kind of request"
    serving.assert_all_free(engine)


@pytest.mark.parametrize("router,plan", tiny.crossed(router_table.ROUTERS, kv_plans.PLANS))
def test_every_router_and_plan(router, plan):
  model, requests = serving.model(kv_plan=plan, router=tiny.router(router)), serving.requests(20)
  check(serving.engine(model), requests, serving.reference(model, requests))


@pytest.mark.parametrize("fields, options", [
    pytest.param(tiny.VANILLA, {}, id="vanilla"),
    pytest.param(dict(sharing="cycle", num_layers=6), {}, id="no_edges", marks=pytest.mark.slow),
    pytest.param({}, dict(batching="sequence"), id="sequence"),
    pytest.param(dict(kv_plan="hybrid"), dict(storage="dense"), id="dense"),
    pytest.param(dict(lora=dict(q=2, k=1, o=3, gate=4, down=2), router=dict(gating="residual", alpha=1.5),
                      tie_embeddings=False), {}, id="relaxed", marks=pytest.mark.slow),
    pytest.param({}, dict(num_slots=1, ticks=1), id="one_slot_one_tick", marks=pytest.mark.slow),
])
def test_other_engines(fields, options):
  model, requests = serving.model(**fields), serving.requests(20)
  check(serving.engine(model, **options), requests, serving.reference(model, requests))


@pytest.mark.parametrize("options", [
    pytest.param(dict(num_pages=24), id="stack"),
    pytest.param(dict(num_edge_pages=9, batching="sequence"), id="edges"),
])
def test_small_pool_preempts_and_changes_no_token(options):
  """A request may take the whole of the stack's pool, and almost all of the edges'."""
  model = serving.model()
  requests = serving.requests(10, max_tokens=31, stop_tokens=[], temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
  requests = [(prompt[:1], options) for prompt, options in requests]
  engine = serving.engine(model, **options)
  check(engine, requests, serving.reference(model, requests))
  figures = engine.metrics()
  assert figures["preemptions"] > 0 and figures["stalled"] > 0
  assert figures["pool_peak" if "num_pages" in options else "edge_pool_peak"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["float32", "bfloat16", "int8"])
def test_small_pool_changes_no_token_with_keys_in_bfloat16(weight_format):
  """Seeds are fixed: entries that are computed again may differ in a last bit, which moves few tokens."""
  model, formats = serving.model(), dict(kv_format="bfloat16", weight_format=weight_format)
  requests = serving.requests(40, max_tokens=31, stop_tokens=[], top_k=0, top_p=1.0, min_p=0.0, logprobs=False)
  requests = [(prompt[:1], options) for prompt, options in requests]
  (whole, _), small = serving.serve(serving.engine(model, **formats), requests), serving.engine(model, num_pages=24, **formats)
  assert {place: done.tokens for place, done in serving.serve(small, requests)[0].items()} == {
      place: done.tokens for place, done in whole.items()}
  assert small.metrics()["preemptions"] > 5


def test_chunks_of_long_prompts_find_their_pages():
  """The rows that decode meanwhile take pages too, until the last chunk is stored.

  Six prompts need 360 pages and eight turns; in each, a decoding row takes six.
  """
  model = serving.model(router=tiny.FIXED)
  requests = [([i], dict(max_tokens=31)) for i in range(5)] + [(list(range(20)), dict(max_tokens=13))] * 6
  engine = serving.engine(model, num_slots=11, page_size=1, num_pages=560)
  numbers = [engine.submit(prompt, **options) for prompt, options in requests[:5]]
  while not engine.step():
    pass
  numbers += [engine.submit(prompt, **options) for prompt, options in requests[5:]]
  while not engine.idle:
    engine.step()
  for number, expected in zip(numbers, serving.reference(model, requests)):
    serving.assert_same(engine.take(number), expected)
  serving.assert_all_free(engine)


def test_decoding_goes_on_while_a_long_prompt_is_stored():
  model = serving.model()
  engine = serving.engine(model, ticks=2)
  first = engine.submit([1], max_tokens=30)
  while not engine.step():
    pass
  engine.submit(list(range(31)), max_tokens=2)
  job, tokens = engine.scheduler.queue[0], []
  for stored in (16, 30):
    tokens.append(sum(number == first for number, _ in engine.step()))
    assert job.stored == stored
  assert min(tokens) > 0, "a decoding slot stalled"


def test_requests_are_served_though_the_pressing_ones_are_aborted():
  model = serving.model(router=tiny.FIXED)
  engine = serving.engine(model, num_slots=2, num_pages=24, num_edge_pages=9)
  pressing = [engine.submit([token], max_tokens=30) for token in (1, 2)]
  waiting = engine.submit([3], max_tokens=3)
  while not engine.scheduler.pressed:
    engine.step()
  for number in pressing:
    engine.abort(number)
  for _ in range(10):
    engine.step()
  assert engine.take(waiting).finish == "length"
  serving.assert_all_free(engine)


def test_bfloat16_scores_its_own_tokens():
  """Its tokens may differ; their scores may not. Random depths, which rounding does not move."""
  model = serving.model(router=dict(arch="random", sampling="none"))
  requests = serving.requests(10, temperature=0.0, repetition_penalty=1.0, logprobs=True)
  done, _ = serving.serve(serving.engine(model, weight_format="bfloat16", kv_format="bfloat16"), requests)
  tokens_BT = np.zeros((len(requests), 2 * serving.CONTEXT), np.int32)
  for place, (prompt, _) in enumerate(requests):
    text = prompt + done[place].tokens
    tokens_BT[place, :len(text)] = text
  logits_BTV, depth_BT = decoding.forward(model.config, model.variables, tokens_BT)
  tolerance = 2e-2 * np.abs(logits_BTV).max()
  for place, (prompt, _) in enumerate(requests):
    tokens, start = done[place].tokens, len(prompt) - 1
    logits_SV = logits_BTV[place, start:start + len(tokens)]
    chosen_S = logits_SV[np.arange(len(tokens)), tokens]
    assert done[place].depths == depth_BT[place, start:start + len(tokens)].tolist()
    assert (chosen_S >= logits_SV.max(axis=1) - tolerance).all()
    np.testing.assert_allclose(done[place].logprobs, chosen_S - np.log(np.exp(logits_SV).sum(axis=1)), rtol=0,
                               atol=tolerance)


def test_equal_engines_share_their_programs():
  config = tiny.config().model
  first, second = (decoding.decoder(config, "paged") for _ in range(2))
  assert first == second and hash(first) == hash(second)
  assert first != decoding.decoder(config, "dense")
  assert first != decoder_lib.Decoder(config, first.tables.storage, fixed.Fixed(config))
