"""An exception at any moment of a step leaves an engine exact, or it says for good that it was interrupted."""

import gc
import random
import threading

import pytest

from mor.data import tokenizer as tokenizer_lib
from mor.serve import model as model_lib
from mor.serve import request as request_lib
from tests.helpers import decoding
from tests.helpers import interrupts
from tests.helpers import serving
from tests.helpers import tiny


class Bytes(tokenizer_lib.ByteTokenizer):
  """Bytes; before it decodes, something else may happen."""

  def __init__(self):
    super().__init__()
    self.before = lambda ids: None

  def decode(self, ids):
    self.before(ids)
    return super().decode(ids)


@pytest.fixture(scope="module")
def model():
  config = tiny.config(tiny.BYTES, model=dict(router=tiny.TOKEN_CHOICE, num_layers=5)).model
  return model_lib.Model(config, decoding.draw(config), Bytes(), serving.CONTEXT)


@pytest.fixture
def tokenizer(model):
  yield model.tokenizer
  model.tokenizer.before = lambda ids: None


@pytest.fixture(scope="module")
def cases(model):
  requests = [([10 * i + 1, 3], dict(max_tokens=9 + i, temperature=1.0, seed=i, stop_tokens=[])) for i in range(7)]
  return requests, model.generate_requests([model.request(prompt, **options) for prompt, options in requests])


@pytest.fixture(scope="module")
def used(model):
  """An engine that is idle before and after each test, unless it fails."""
  return serving.engine(model)


def start(engine, cases):
  return [engine.submit(prompt, **options) for prompt, options in cases[0]]


def test_a_step_interrupted_at_any_line_is_exact_or_final(model, used, cases):
  lines, rng, outcomes = interrupts.count_lines(used, *cases), random.Random(0), []
  engine = serving.engine(model)
  for _ in range(16):
    at = interrupts.at_line(rng.randint(1, lines), interrupts.interrupt)
    outcomes.append(interrupts.run(engine, *cases, rng.randrange(4), at))
    if outcomes[-1] == "refused":
      engine = serving.engine(model)
  assert outcomes.count("exact") >= 8, outcomes


def test_an_interrupt_as_a_token_is_handed_out_is_exact(used, cases, monkeypatch):
  add, calls = request_lib.Follower.add, [0]

  def interrupt(*args):
    calls[0] += 1
    if calls[0] == 30:
      raise KeyboardInterrupt
    return add(*args)

  monkeypatch.setattr(request_lib.Follower, "add", interrupt)
  numbers = start(used, cases)
  with pytest.raises(KeyboardInterrupt):
    for _ in range(50):
      used.step()
  serving.finish(used, numbers, cases[1])


def test_an_engine_that_cannot_know_says_so_for_good(model, cases):
  engine = serving.engine(model)
  numbers = start(engine, cases)
  engine.guard.torn = True
  interrupts.assert_refuses(engine, numbers[0])


def test_what_a_tokenizer_cannot_decode_ends_its_request_alone(used, cases, monkeypatch):
  add, own = request_lib.Follower.add, cases[1][2].tokens

  def refuse(follower, *args):
    event = add(follower, *args)
    if follower.request.sampling.seed == 2 and len(follower.completion.tokens) == 5:
      raise KeyError("no such token")
    return event

  monkeypatch.setattr(request_lib.Follower, "add", refuse)
  numbers = start(used, cases)
  with pytest.raises(KeyError, match="no such token"):  # once: it may be of a signal handler
    for _ in range(50):
      used.step()
  while not used.idle:
    used.step()
  failed = used.take(numbers.pop(2))
  assert failed.finish == "error" and failed.tokens == own[:4]
  assert failed.error == f"token {own[4]} cannot be made text: KeyError('no such token')"
  serving.finish(used, numbers, cases[1][:2] + cases[1][3:])


def test_an_interrupted_generate_aborts_its_own_requests(used, tokenizer, cases):
  numbers, calls = start(used, cases), [0]

  def interrupt(ids):
    calls[0] += 1
    if calls[0] == 40:
      raise KeyboardInterrupt

  tokenizer.before = interrupt
  with pytest.raises(KeyboardInterrupt):
    used.generate([[5, 6], [7]], max_tokens=31)
  assert set(used._jobs) == set(numbers)
  serving.finish(used, numbers, cases[1])


def test_calls_from_inside_a_step(used, tokenizer, cases):
  """An abort waits for the end of the step; what would change the engine meanwhile is refused."""
  numbers, seen = start(used, cases), []
  victim = used.submit([9, 9], max_tokens=31, stop_tokens=[])

  def call(ids):
    if len(seen) < 1:
      seen.append(used.abort(victim))
      for refused in (used.step, lambda: used.submit([1]), lambda: used.take(victim)):
        with pytest.raises(RuntimeError, match="inside another call"):
          refused()

  tokenizer.before = call
  while not seen:
    used.step()
  assert victim not in used._jobs and seen[0].finish == "aborted"
  serving.finish(used, numbers, cases[1])


def test_streams_that_are_collected_in_a_step_are_aborted_after_it(used, cases):
  lines, rng = interrupts.count_lines(used, *cases), random.Random(1)
  gc.disable()
  try:
    for _ in range(10):
      numbers, stream = start(used, cases), used.stream([5, 1], max_tokens=31, stop_tokens=[])
      for _ in range(rng.randrange(4)):
        next(stream)
      cycle = [stream]
      cycle.append(cycle)
      del cycle, stream
      with interrupts.at_line(rng.randint(1, lines), gc.collect):
        used.step()
      gc.collect()
      serving.finish(used, numbers, cases[1])
  finally:
    gc.enable()


def test_threads_share_an_engine(used, cases):
  """Each of four threads generates five times, and each of two reads a stream."""
  (prompts, expected), got, streamed = cases, {}, {}
  options = dict(max_tokens=9, temperature=1.0, stop_tokens=[])

  def generate(thread):
    got[thread] = [used.generate([[1, 3]], **options | dict(seed=0))[0].tokens for _ in range(5)]

  def stream(thread):
    streamed[thread] = [event.token for event in used.stream([1, 3], **options | dict(seed=0))]

  threads = [threading.Thread(target=generate, args=(i,)) for i in range(4)]
  threads += [threading.Thread(target=stream, args=(i,)) for i in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert got == {i: [expected[0].tokens] * 5 for i in range(4)}
  assert streamed == {i: expected[0].tokens for i in range(2)}
  serving.finish(used, [], cases[1])


def test_events_are_kept_for_who_asks(used, cases):
  numbers = start(used, cases)
  list(used.stream([5, 1], max_tokens=25, stop_tokens=[]))
  used.generate([[5, 1]], max_tokens=25, stop_tokens=[])
  events = used.step()
  assert {number for number, _ in events} == set(numbers)
  for number, expected in zip(numbers, cases[1]):
    assert [event.token for n, event in events if n == number] == expected.tokens
  serving.finish(used, numbers, cases[1])


def test_events_nobody_reads_go_with_their_request(used, cases):
  numbers = start(used, cases)
  used.generate([[5, 1]], max_tokens=25, stop_tokens=[])
  assert used._events
  for number in numbers:
    used.take(number)
  assert not used._events
  serving.finish(used, [], cases[1])
