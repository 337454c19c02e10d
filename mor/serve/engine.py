"""The serving engine: continuous depth-wise batching behind submit, stream and abort.

  engine = Engine(model, num_slots=16)
  for event in engine.stream("Once upon a time", max_tokens=100):
    print(event.text, end="")

A call of `step` admits requests, prefills a bounded number of prompt tokens,
dispatches a few ticks (`tick.py`) and reads the results of the dispatch *before*, so
that the device never waits for the host. The tokens of a request depend on the
request alone: not on its neighbours, the order of arrival, or a preemption.
"""

from collections.abc import Iterator, Sequence
import collections
from typing import Any

from mor.serve import early_exit as exit_host
from mor.serve import loop
from mor.serve import request as request_lib
from mor.serve import scheduler as scheduler_lib


class Engine(loop.Loop):
  """Serves one model; see the module docstring.

  Args:
    model: `serve.model.Model`: config, variables, tokenizer and context.
    num_slots: requests that run at once (the batch).
    batching: "depth": a token that leaves the recursion is followed by the next one
      at once. "sequence": it waits for the deepest of the batch, the baseline.
    context: positions of a request at most; None is the model's.
    page_size: entries in a page of the KV pool.
    num_pages: pages of the recursion's pool, each for all layers of a step; None
      lets every slot reach the context at every step.
    num_edge_pages: the same for the layers outside the recursion.
    weight_format: "float32" (exact), "bfloat16" or "int8"; see `weights.py`.
    kv_format: "float32" (exact) or "bfloat16" (half the bytes).
    ticks: of one dispatch; None is the smallest multiple of the number of steps
      from 4 on, so that tokens that never leave early stay in phase.
    prefill_chunk: prompt tokens prefilled at most between two dispatches.
    router: router in place of that of the model; for studies of depth, which prescribe it, so no flag sets it.
    storage: "paged", or "dense": one page a row, the reference of tests and benchmarks, so no flag sets it.
    exits: where tokens may leave early, for requests with exit="trust" or "verify".
    calibrator: gives a request the threshold it does not state; learns from every exit
      where `exits.monitor`.
  """

  def submit(self, prompt: str | Sequence[int], **options: Any) -> int:
    """Queues a prompt; returns the request's number.

    Args:
      prompt: text, or token ids.
      **options: of `request.Request` and `sampling.Sampling`: max_tokens,
        temperature, top_k, top_p, min_p, repetition_penalty, seed, stop_tokens,
        stop_strings, logprobs, exit, threshold.

    Raises:
      ValueError: this request is wrong; the others go on.
    """
    return self.submit_request(self.model.request(prompt, **options))

  def submit_request(self, request: request_lib.Request) -> int:
    """`submit` of a ready request."""
    request.check(self.model.config.vocab_size, self.context)
    request = exit_host.resolve(self.decoder.exits, request, self.calibrator)
    follower = request_lib.Follower(request, self.model.tokenizer)
    job = self.scheduler.submit(request.prompt, request.limit(self.context), follower)
    self._jobs[job.id] = job
    self.meter.submitted(job.id)
    return job.id

  def abort(self, number: int) -> request_lib.Completion:
    """Ends a request, wherever it is, and forgets it; returns what it has got."""
    job = self._find(number)
    if not job.finished:
      self._end(job)
      job.payload.end("aborted")
    return self.take(number)

  def take(self, number: int) -> request_lib.Completion:
    """A request's completion so far; a finished request is forgotten then."""
    job = self._find(number)
    if job.finished:
      del self._jobs[number]
    return job.payload.completion

  def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[request_lib.Event]:
    """Yields a prompt's new tokens; other requests go on meanwhile. A closed stream aborts its request."""
    number = self.submit(prompt, **options)
    waiting = self._jobs[number].payload.events = collections.deque()
    events = self._stream(number, waiting)
    next(events)
    return events

  def _stream(self, number: int, waiting: collections.deque) -> Iterator[request_lib.Event | None]:
    try:
      yield  # entered, so that a close finds its way to the end
      while True:
        while waiting:
          yield (event := waiting.popleft())
          if event.finish:
            return
        self.step()
    finally:
      if number in self._jobs:
        self.abort(number)

  def generate(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[request_lib.Completion]:
    """Continues all prompts, and returns when the last one is done.

    Raises:
      ValueError: a prompt or an option is wrong; none is run then.
    """
    requests = [self.model.request(prompt, **options) for prompt in prompts]
    numbers = []
    try:
      for request in requests:
        numbers.append(self.submit_request(request))
    except ValueError:
      for number in numbers:
        self.abort(number)
      raise
    while not all(self._jobs[n].finished for n in numbers):
      self.step()
    return [self.take(n) for n in numbers]

  def metrics(self) -> dict[str, float]:
    """Figures since the engine was made; see `meter.py`."""
    return self.meter.figures()

  def _find(self, number: int) -> scheduler_lib.Job:
    if number not in self._jobs:
      raise ValueError(f"no request {number}; it was never submitted, or its completion was taken")
    return self._jobs[number]
