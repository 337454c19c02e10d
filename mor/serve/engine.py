"""The serving engine: continuous depth-wise batching behind submit, stream and abort.

  engine = Engine(model, num_slots=16)
  for event in engine.stream("Once upon a time", max_tokens=100):
    print(event.text, end="")

A call of `step` admits requests, prefills a bounded number of prompt tokens,
dispatches a few ticks (`tick.py`) and reads the results of the dispatch *before*, so
that the device never waits for the host. The tokens of a request depend on the
request alone: not on its neighbours, the order of arrival, or a preemption.

An exception may end a call at any moment (Ctrl-C, a signal handler, a timeout). What is certain then is each
request's prompt and the tokens that it was given. So if an exception ends a change of slots and queue, the next
call makes them anew and computes the requests again, as after a preemption. An exception in a wait for the
device leaves nothing in doubt. `guard.py` says what happens in the moment in which a token is handed out.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from mor import fields
from mor.decode import decoder as decoder_lib
from mor.decode import parts as parts_lib
from mor.decode import sampling
from mor.decode import storage as storage_lib
from mor.decode import storages
from mor.decode import tick as tick_lib
from mor.decode import weights as weights_lib
from mor.exits import calibration
from mor.exits import policy as exits_lib
from mor.serve import early_exit as exit_host
from mor.serve import guard as guard_lib
from mor.serve import meter as meter_lib
from mor.serve import replica as replica_lib
from mor.serve import request as request_lib
from mor.serve import runner as runner_lib
from mor.serve import scheduler as scheduler_lib
from mor.serve import sizes


class Engine:
  """Serves one model; see the module docstring.

  Threads may share an engine: one call runs at a time, and the others wait for its lock. A call from inside
  another call of the same thread is refused, but `abort`, which takes effect when the outer call ends. A
  RuntimeError of any call says that the engine can no longer be used.

  Args:
    model: `serve.model.Model`: config, variables, tokenizer and context.
    num_slots: requests that run at once on each device (the batch).
    batching: "depth": a token that leaves the recursion is followed by the next one
      at once. "sequence": it waits for the deepest of the batch, the baseline.
    context: positions of a request at most; None is the model's.
    page_size: entries in a page of the KV pool.
    num_pages: pages of the recursion's pool, each for all layers of a step; None
      lets every slot reach the context at every step.
    num_edge_pages: the same for the layers outside the recursion.
    weight_format: "float32" (exact), "bfloat16" or "int8"; see `weights.py`.
    kv_format: "float32" (exact) or "bfloat16" (half the bytes).
    ticks: ticks of one dispatch; None is the smallest multiple of the number of steps from 4 on, and from 12 on an
      accelerator (`tick.count_ticks`). Fewer show tokens earlier, more have less overhead.
    prefill_chunk: prompt tokens prefilled at most between two dispatches; None is 256, and 1,024 on an accelerator,
      where one call stores chunks of several prompts.
    router: router in place of that of the model; for studies of depth, which prescribe it, so no flag sets it.
    storage: of keys and values, one of `storages.NAMES`; None is what suits the platform. The others are for tests and
      benchmarks, so no flag sets it.
    exits: where tokens may leave early, for requests with exit="trust" or "verify".
    calibrator: gives a request the threshold it does not state, and learns from exits if
      `exits.monitor`; without a flag, as `--mode=calibrate` stores a threshold instead.
    devices: one replica of the model on each, with slots and a pool of its own, all behind one queue: a count, or a
      sequence of devices; None is as few as `tensor` needs.
    tensor: devices that share a replica, each with a part of its heads, feed-forward width and vocabulary.
  """

  def __init__(self, model: Any, *, num_slots: int = 16, batching: str = "depth", context: int | None = None,
               page_size: int = 64, num_pages: int | None = None, num_edge_pages: int | None = None,
               weight_format: str = "float32", kv_format: str = "float32", ticks: int | None = None,
               prefill_chunk: int | None = None, router: Any = None, storage: str | None = None,
               exits: exits_lib.Exits | None = None, calibrator: calibration.Calibrator | None = None,
               devices: int | Sequence[jax.Device] | None = None, tensor: int = 1):
    sizes.check_model(model, router)
    groups = sizes.check_devices(devices, tensor)
    for name, value, choices in (("batching", batching, ("depth", "sequence")),
                                 ("storage", storages.NAMES[0] if storage is None else storage, storages.NAMES),
                                 ("kv_format", kv_format, storage_lib.FORMATS),
                                 ("weight_format", weight_format, weights_lib.FORMATS)):
      sizes.check_choice(name, value, choices)
    num_slots, page_size, num_pages, num_edge_pages, ticks, prefill_chunk, context = sizes.check_counts(
        num_slots=num_slots, page_size=page_size, num_pages=num_pages, num_edge_pages=num_edge_pages, ticks=ticks,
        prefill_chunk=prefill_chunk, context=model.context if context is None else context)
    config = model.config
    exit_host.check(exits, config, batching, calibrator)
    part = parts_lib.cut(config, tensor)
    entries = storages.make(storage, part.num_kv_heads, part.head_dim, kv_format, page_size, context)
    page_size = entries.page_size
    decoder = decoder_lib.Decoder(part, entries, router, exits.after if exits else ())
    self.exits, self.calibrator = exits, calibrator
    tables = decoder.tables
    cyclic = tables.schedule.cyclic
    if not cyclic and exits is None:
      raise ValueError(f"sharing={config.sharing!r} gives each step its own layers, so tokens at different steps "
                       "cannot share a batch; use generate() (--batching=none), or train with a cyclic scheme")
    self.model, self.context, self.num_slots = model, context, num_slots
    ticks = ticks or tick_lib.count_ticks(decoder)
    chunk = max(runner_lib.LEAST_CHUNK, prefill_chunk or runner_lib.count_chunk())
    pages_per_row = -(-context // page_size)
    whole = num_slots * pages_per_row
    pool = scheduler_lib.Pool(
        page_size, tables.num_rows, num_pages or whole * tables.num_rows, (num_edge_pages or whole) if tables.num_edges else 0,
        max(1 + exits.pending, tables.num_rows) if exits else 1)
    sizes.check_memory(decoder, num_slots, pool, pages_per_row, ticks, sum(groups or [], []) or jax.devices()[:1])
    self.meter = meter_lib.Meter(num_slots, pool)
    self.replicas = replica_lib.make(
        groups, model, weight_format, decoder, num_slots, pool, pages_per_row, self.meter, ticks=ticks, chunk=chunk,
        vocab_size=model.vocab_size, together=batching == "sequence", exits=exits, calibrator=calibrator)
    self._jobs: dict[int, scheduler_lib.Job] = {}
    self._events: list[tuple[int, request_lib.Event]] = []  # of requests without a stream, and not returned yet
    self._in_doubt = False  # whether slots and queue are being changed, or an exception has ended that
    self.guard = guard_lib.Guard()

  def submit(self, prompt: Any, /, **options: Any) -> int:
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
    """Queues a ready request; returns its number."""
    return self._queue([request])[0]

  def _queue(self, requests: Sequence[request_lib.Request], events: collections.deque | None = None) -> list[int]:
    """Queues requests, or none of them; returns their numbers."""
    numbers: list[int] = []
    try:
      for request in requests:
        self._queue_one(request, events, numbers)
      return numbers
    except BaseException:
      self._forget(numbers)
      raise

  @guard_lib.alone
  def _queue_one(self, request, events, numbers) -> None:
    request.check(self.model.config.vocab_size, self.context)
    request = exit_host.resolve(self.exits, request, self.calibrator, self.model.stored_exits)
    follower = request_lib.Follower(request, self.model.tokenizer)
    job = self.scheduler.make_job(request.prompt, request.limit(self.context), follower)
    job.events = events
    numbers.append(job.id)  # first, so that `_queue` can take back the rest
    self._jobs[job.id] = job
    self.meter.submitted(job.id)
    self.scheduler.submit(job)

  def abort(self, number: int) -> request_lib.Completion:
    """Ends a request, wherever it is, and forgets it; returns what it has got.

    From inside another call of the engine, it takes effect when that call ends.
    """
    if not self.guard.is_nested():
      return self._abort(number)
    job = self._find(number)
    self.guard.noted.append(job.id)
    return job.payload.completion

  @guard_lib.alone
  def _abort(self, number: int) -> request_lib.Completion:
    job = self._find(number)
    self._drop(job.id)
    return job.payload.completion

  @guard_lib.alone
  def take(self, number: int) -> request_lib.Completion:
    """Returns a request's completion so far; a finished request is forgotten then, and its events with it."""
    job = self._find(number)
    if job.finished:
      self._drop(job.id)
    return self._follow(job).completion

  def stream(self, prompt: Any, /, **options: Any) -> Iterator[request_lib.Event]:
    """Yields a prompt's new tokens; other requests go on meanwhile. A closed stream aborts its request."""
    waiting: collections.deque = collections.deque()
    numbers = self._queue([self.model.request(prompt, **options)], waiting)
    try:
      events = self._stream(numbers[0], waiting)
      next(events)
      return events
    except BaseException:
      self._forget(numbers)
      raise

  def _stream(self, number: int, waiting: collections.deque) -> Iterator[request_lib.Event | None]:
    try:
      yield  # entered, so that a close finds its way to the end
      while True:
        while waiting:
          yield (event := waiting.popleft())
          if event.finish:
            return
        self._turn()
    finally:
      self._forget([number])

  def generate(self, prompts: Any, /, **options: Any) -> list[request_lib.Completion]:
    """Continues all prompts, and returns when the last one is done; an exception aborts all of them.

    Raises:
      ValueError: a prompt or an option is wrong; none is run then.
    """
    request_lib.check_prompts(prompts)
    nowhere: collections.deque = collections.deque(maxlen=0)
    numbers = self._queue([self.model.request(prompt, **options) for prompt in prompts], nowhere)
    try:
      while not all(self._jobs[n].finished for n in numbers):
        self._turn()
      return [self.take(n) for n in numbers]
    finally:
      self._forget(numbers)

  def _forget(self, numbers: Sequence[int]) -> None:
    """Ends and forgets the requests that are known: now, or when the call that is inside ends."""
    self.guard.noted.extend(numbers)
    self.guard.settle(self._drop)

  def _drop(self, number: int) -> None:
    """Ends and forgets a request, if it is known."""
    job = self._jobs.get(number)
    if job is None:
      return
    if not job.finished:
      if self._in_doubt:
        self._recover()
      event = self._follow(job).end("aborted")
      if job.events is not None:
        job.events.append(event)
      self._in_doubt = True
      self._end(job)
      self._in_doubt = False
    self.meter.finished(number, len(job.tokens) - len(job.prompt))
    events = self._events
    kept = [(n, event) for n, event in events if n != number]
    if self._events is events:  # else another thread's `step` returns them
      self._events = kept
    self._jobs.pop(number, None)

  def metrics(self) -> dict[str, float]:
    """Returns figures since the engine was made; see `meter.py`."""
    with self.guard.lock:
      return self.meter.figures()

  def _find(self, number: Any) -> scheduler_lib.Job:
    if not sizes.is_index(number) or int(number) not in self._jobs:
      raise ValueError(f"no request {fields.show(number)}; it was never submitted, or its completion was taken")
    return self._jobs[int(number)]

  @property
  def scheduler(self) -> scheduler_lib.Scheduler:
    """The shared queue, and the slots of the first replica."""
    return self.replicas[0].scheduler

  @property
  def runner(self) -> runner_lib.SlotRunner:
    """The programs of the first replica."""
    return self.replicas[0].runner

  @property
  def idle(self) -> bool:
    """Whether no request waits or runs, and all results have been returned."""
    return all(replica.idle for replica in self.replicas) and not self._events

  def step(self) -> list[tuple[int, request_lib.Event]]:
    """Admits, prefills, dispatches, and reads the dispatch before; returns the events that no `step` has returned yet.

    Events of a stream, and of `generate`, are its own. Any call may read those of other requests: they are kept
    until `step` returns them, or the request is taken or aborted.
    """
    self._turn()
    events, self._events = self._events, []
    return events

  @guard_lib.alone
  def _turn(self) -> None:
    with self.meter.busy():
      if self._in_doubt:
        self._recover()
      self._in_doubt = True
      self._admit()
      dispatched = [replica.dispatch() for replica in self.replicas]
      self._in_doubt = False
      for replica, newer in zip(self.replicas, dispatched):
        while len(replica.runner.flights) > newer:
          self._harvest(replica)
      for replica in self.replicas:
        if replica.starved and not replica.runner.flights:
          self._in_doubt = True
          if replica.relieve():
            self.meter.preempted()
          self._in_doubt = False

  def _admit(self) -> None:
    """Moves requests of the queue to slots, in order, each to the replica with the fewest requests that has room."""
    while any(replica.admit() for replica in sorted(self.replicas, key=lambda replica: len(replica.scheduler.held))):
      pass

  @guard_lib.alone
  def wait(self) -> None:
    """Blocks until the device has done what was dispatched; the next `step` returns what was new."""
    with self.meter.busy():
      if self._in_doubt:
        self._recover()
      for replica in self.replicas:
        while replica.runner.flights:
          self._harvest(replica)
        replica.runner.wait()

  def _recover(self) -> None:
    """Makes slots and queue anew, after an exception that has ended a change of them."""
    for replica in self.replicas:
      replica.reset()
    unfinished = [job for job in self._jobs.values() if not job.finished]
    for job in unfinished:
      self._follow(job)
    self.scheduler.restart(unfinished)
    self._in_doubt = False

  def _follow(self, job: scheduler_lib.Job) -> request_lib.Follower:
    """Returns the follower of a request, made anew if an exception has ended a change of it."""
    if not job.whole:
      job.payload = job.payload.replay(len(job.tokens) - len(job.prompt))
      job.whole = True
    return job.payload

  def _harvest(self, replica: replica_lib.Replica) -> None:
    """Reads the oldest dispatch of a replica, and hands out its tokens."""
    scheduler, runner = replica.scheduler, replica.runner
    out = runner.wait_oldest()  # an exception here leaves nothing in doubt
    self._in_doubt = True
    jobs, tables = runner.pop_oldest(out), runner.decoder.tables
    num = int(out.num_ticks)
    scheduler.learn(int(out.free), int(out.edge_free), [job for job in jobs if job], len(runner.flights))
    for slot, token, depth, logprob, early, finish in runner_lib.list_tokens(out):
      job = jobs[slot]
      if job is not None and not job.finished and job.slot == slot:
        self._hand_out(job, token, depth, logprob, early, request_lib.FINISH[finish])
    scheduler.pressed = bool(num) and bool(out.ticks.stalled_B[num - 1].any())
    none_left = out.free == 0 or (tables.num_edges and out.edge_free == 0)
    stuck = bool(num) and not out.ticks.ran_B[num - 1].any()  # each needs more pages than are left
    replica.starved = scheduler.pressed and bool(none_left or stuck)
    self._in_doubt = False

  def _hand_out(self, job, token, depth, logprob, early, finish) -> None:
    """Gives a request its next token, or the reason why there is none."""
    event, tokens = self._follow_token(job, token, depth, logprob, early, finish)
    self.guard.torn = True
    if job.events is None:
      self._events.append((job.id, event))
    else:
      job.events.append(event)
    job.tokens.extend(tokens)
    job.whole, job.finished = True, bool(event.finish)
    self.guard.torn = False
    if len(job.tokens) == len(job.prompt) + 1:
      self.meter.began(job.id)
    if event.finish:
      self._end(job, freed=bool(finish))

  def _follow_token(self, job, token, depth, logprob, early, finish) -> tuple[request_lib.Event, list[int]]:
    """Returns the event of a request's next token, and the token, if there is one."""
    follower = job.payload if job.whole else self._follow(job)
    job.whole = False
    if token == sampling.NOT_FINITE:
      return follower.end("error", request_lib.NOT_FINITE), []
    try:
      return follower.add(token, depth, logprob, finish, early), [token]
    except Exception as error:
      if job.failed != len(job.tokens):  # a signal handler's, perhaps: the next call tries it again
        job.failed = len(job.tokens)
        raise
      return self._follow(job).end("error", f"token {token} cannot be made text: {error!r}"), []

  def _end(self, job: scheduler_lib.Job, freed: bool = False) -> None:
    """Ends a job; its slot and pages go back unless the device has freed them itself."""
    (job.replica or self.replicas[0]).end(job, freed)
    self.meter.finished(job.id, len(job.tokens) - len(job.prompt))
