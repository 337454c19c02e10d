"""Random requests, what `generate` answers to them, and an engine under load."""

from collections.abc import Sequence
import random
from typing import Any

import numpy as np

from mor.decode import decoder as decoder_lib
from mor.decode import slots as slots_lib
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.serve import engine as engine_lib
from mor.serve import generate
from mor.serve import model as model_lib
from mor.serve import request as request_lib
from tests.helpers import decoding
from tests.helpers import tiny

CONTEXT = 32


def model(**fields: Any) -> model_lib.Model:
  """A tiny model that knows token ids only."""
  config = tiny.config(model=dict(num_layers=5) | fields).model  # one shared layer: less to compile
  return model_lib.Model(config, decoding.draw(config), None, CONTEXT)


def engine(model: model_lib.Model, **options: Any) -> engine_lib.Engine:
  """One with few slots, small pages and the shortest prefill chunk."""
  return engine_lib.Engine(model, **dict(num_slots=5, page_size=4, prefill_chunk=16) | options)


def requests(num: int, seed: int = 0, **options: Any) -> list[tuple[list[int], dict[str, Any]]]:
  """Prompts, up to two chunks long, with settings of every kind.

  Only long prompts are penalised: the width of their history is a shape.
  """
  rng, vocab_size = np.random.default_rng(seed), tiny.config().model.vocab_size
  choose = lambda *values: values[rng.integers(len(values))]
  made = []
  for i in range(num):
    prompt = rng.integers(0, vocab_size, choose(1, 2, int(rng.integers(3, 20)), int(rng.integers(20, 32)))).tolist()
    stop = rng.integers(0, vocab_size, int(rng.integers(0, 4))).tolist()
    made.append((prompt, dict(
        max_tokens=int(rng.integers(1, 14)), temperature=choose(0.0, 0.8, 1.5), top_k=choose(0, 5),
        top_p=choose(1.0, 0.7), min_p=choose(0.0, 0.1), repetition_penalty=choose(1.0, 1.3) if len(prompt) > 16 else 1.0, seed=i,
        stop_tokens=stop, logprobs=bool(i % 2)) | options))
  return made


def reference(model: model_lib.Model, requests, formats: str = "float32") -> list[request_lib.Completion]:
  """What `generate` answers, all in one batch, from dense storage."""
  config = model.config
  storage = storage_lib.Dense(CONTEXT, config.num_kv_heads, config.head_dim, formats)
  weights = weights_lib.prepare(config, model.variables, formats)
  made = [request_lib.make(prompt, **options) for prompt, options in requests]
  return generate.generate(decoder_lib.Decoder(config, storage), weights, made, context=CONTEXT)


def serve(engine: engine_lib.Engine, requests, order: int | None = None,
          abort: float = 0.0) -> tuple[dict[int, request_lib.Completion], dict[int, request_lib.Completion]]:
  """Submits a few requests before each step, in a random order, until all are done.

  Args:
    engine: idle.
    requests: prompts and options.
    order: seed of the order; None keeps it.
    abort: probability, before each step, that some request is aborted.

  Returns:
    Completions of the requests, by their place in `requests`, and those of the aborted.
  """
  rng, places = random.Random(order), list(range(len(requests)))
  if order is not None:
    rng.shuffle(places)
  number, running, done, aborted, decoding = {}, {}, {}, {}, set()
  for _ in range(100 * len(requests)):
    for place in [places.pop(0) for _ in range(min(len(places), rng.randint(0, 4)))]:
      prompt, options = requests[place]
      number[place] = engine.submit(prompt, **options)
      running[number[place]] = place
    if running and rng.random() < abort:
      decodes = rng.random() < 0.5 and [job for job in running if job in decoding]
      place = running.pop(rng.choice(decodes or list(running)))
      aborted[place] = engine.abort(number[place])
    for job, event in engine.step():
      decoding.add(job)
      if event.finish:
        place = running.pop(job)
        done[place] = engine.take(job)
    if not places and not running and engine.idle:
      return done, aborted
  raise AssertionError(f"after many steps the requests {sorted(running.values())} are not done")


def assert_same(got: request_lib.Completion, expected: request_lib.Completion, what: Any = "") -> None:
  """Equal completions; log-probabilities within the tolerance of a whole model."""
  pick = lambda done: (done.tokens, done.depths, done.finish, done.text)
  assert pick(got) == pick(expected), what
  np.testing.assert_allclose(got.logprobs, expected.logprobs, rtol=0, atol=1e-4, err_msg=str(what))


def assert_all_free(engine: engine_lib.Engine) -> None:
  """No slot is held, and every page is free, once, in every replica."""
  assert engine.idle
  for replica in engine.replicas:
    assert replica.scheduler.held == [] and set(replica.scheduler.slots) == {None}
    slots, pool = replica.runner.slots, replica.scheduler.pool
    assert (np.asarray(slots.phase_B) == slots_lib.FREE).all()
    assert not slots.cache.length_BR.any() and not slots.cache.edge_length_B.any() and not slots.cache.hidden_BRS.any()
    for free, num in ((slots.cache.free, pool.num_pages), (slots.cache.edge_free, pool.num_edge_pages)):
      assert int(free.num) == num
      assert sorted(np.asarray(free.page_P)[:num].tolist()) == list(range(num))


def finish(engine: engine_lib.Engine, numbers: Sequence[int], expected: Sequence[request_lib.Completion]) -> None:
  """Runs until all is done; each request has got what is its own, and nothing is left."""
  while not engine.idle:
    engine.step()
  for number, completion in zip(numbers, expected):
    assert_same(engine.take(number), completion)
  assert_all_free(engine)
  assert not engine.meter._submitted and not engine._jobs
