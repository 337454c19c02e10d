"""Which request gets which slot, and when: plain Python, no arrays.

Requests are served in the order they came. One is admitted when a slot is free and
the pool has room for its whole prompt beside what the others may take until the last
chunk of it is stored.
When rows find no page, the youngest request is preempted: its pages go back, it
returns to the head of the queue with what it has generated, and is recomputed
later. The oldest request always proceeds and every request fits the pool alone, so
all finish.
"""

import bisect
import collections
import dataclasses
import itertools
from typing import Any


@dataclasses.dataclass(eq=False)
class Job:
  """A request on its way.

  Attributes:
    id: number of the request.
    prompt: its tokens.
    limit: new tokens at most.
    payload: whatever the engine keeps with it.
    tokens: prompt and output so far.
    replica: the part of the engine (`replica.py`) that admitted it last.
    slot: where it runs, None in the queue.
    stored: tokens of it that have been prefilled.
    started: whether it is being decoded.
    finished: whether its last token is known, or it was aborted.
    events: where its events go; None leaves them to `Engine.step`.
    whole: whether the payload has taken the tokens of the output, and no others.
    failed: length of `tokens` at which the payload did not take the next one.
  """

  id: int
  prompt: tuple[int, ...]
  limit: int
  payload: Any
  tokens: list[int] = dataclasses.field(default_factory=list)
  replica: Any = None
  slot: int | None = None
  stored: int = 0
  started: bool = False
  finished: bool = False
  events: collections.deque | None = None
  whole: bool = True
  failed: int | None = None


@dataclasses.dataclass(frozen=True)
class Pool:
  """Sizes of the page pools.

  Attributes:
    page_size: entries in a page.
    num_rows: rows of a sequence in the stack's pool.
    num_pages: pages of the stack's pool.
    num_edge_pages: pages of the edges' pool, 0 where the model has no edges.
    entries: of a sequence in the stack's pool, in one tick at most.
  """

  page_size: int
  num_rows: int
  num_pages: int
  num_edge_pages: int
  entries: int = 1

  def most(self, num_tokens: int) -> tuple[int, int]:
    """Pages that a sequence may take: every token at every storing step."""
    pages = -(-num_tokens // self.page_size)
    return self.num_rows * pages, pages if self.num_edge_pages else 0

  def growth(self, ticks: int) -> tuple[int, int]:
    """Pages that a sequence may take in some ticks: at most an entry a tick in the edges."""
    def pages(entries):
      return -(-entries // self.page_size) + 1

    entries = ticks * self.entries
    return min(entries, self.num_rows * pages(entries)), min(ticks, pages(ticks)) if self.num_edge_pages else 0


class Scheduler:
  """The queue, the slots and what is known of the pool.

  Several schedulers may share a queue, each with slots and a pool of its own; one of them makes all requests.
  """

  def __init__(self, num_slots: int, pool: Pool, ticks: int, chunk: int, queue: collections.deque[Job] | None = None):
    self.pool = pool
    self.ticks = ticks  # of a dispatch
    self.chunk = chunk  # prompt tokens prefilled between two dispatches, while there are any
    self.queue: collections.deque[Job] = collections.deque() if queue is None else queue
    self.slots: list[Job | None] = [None] * num_slots
    self.free = [pool.num_pages, pool.num_edge_pages]
    self.pressed = False  # a row waits for a page, so nobody is admitted beside it
    self._ids = itertools.count()
    self._order: list[Job] = []  # jobs that hold slots, oldest first

  def make_job(self, prompt: tuple[int, ...], limit: int, payload: Any) -> Job:
    """Returns a request to submit.

    Raises:
      ValueError: it would not fit the empty pool.
    """
    job = Job(next(self._ids), prompt, limit, payload, tokens=list(prompt))
    needed, has = self.pool.most(len(prompt) + limit - 1), (self.pool.num_pages, self.pool.num_edge_pages)
    if any(n > h for n, h in zip(needed, has)):
      raise ValueError(f"the request may need {needed[0]} + {needed[1]} pages of {self.pool.page_size} tokens "
                       f"({len(prompt)} prompt + {limit} new tokens at {self.pool.num_rows} steps), more than the pool "
                       f"of {has[0]} + {has[1]}; lower max_tokens, or give the engine more pages")
    return job

  def submit(self, job: Job) -> None:
    """Queues a request."""
    self.queue.append(job)

  def restart(self, jobs: list[Job]) -> None:
    """Makes the queue anew, of requests in the order in which they came."""
    for job in jobs:
      job.slot, job.stored, job.started = None, 0, False
    self.queue.clear()
    self.queue.extend(sorted(jobs, key=lambda job: job.id))

  def clear(self) -> None:
    """Makes all slots and pages free."""
    self.slots = [None] * len(self.slots)
    self.free = [self.pool.num_pages, self.pool.num_edge_pages]
    self.pressed = False
    self._order = []

  def admit(self) -> Job | None:
    """Moves the first request of the queue to a slot, if one is free and the pool has room."""
    if not self.queue or None not in self.slots or (self._order and not self._has_room(self.queue[0])):
      return None
    needed = self.pool.most(len(self.queue[0].tokens))
    job = self.queue.popleft()
    job.slot, job.stored, job.started = self.slots.index(None), 0, False
    self.slots[job.slot] = job
    bisect.insort(self._order, job, key=lambda other: other.id)  # one that another scheduler preempted may be older
    self.free = [f - n for f, n in zip(self.free, needed)]
    return job

  def youngest(self) -> Job | None:
    """Returns the request to preempt; None if only one holds pages."""
    return self._order[-1] if len(self._order) > 1 else None

  def preempt(self, job: Job) -> int:
    """Sends a request back to the head of the queue, behind older ones; returns the slot it had."""
    slot = self._vacate(job)
    self.queue.insert(next((i for i, other in enumerate(self.queue) if other.id > job.id), len(self.queue)), job)
    return slot

  def finish(self, job: Job) -> int | None:
    """Ends a request, wherever it is; returns the slot it had."""
    job.finished = True
    if job.slot is None:
      if job in self.queue:
        self.queue.remove(job)
      return None
    return self._vacate(job)

  def learn(self, free: int, edge_free: int, seen: list[Job], newer: int) -> None:
    """Takes what a dispatch says of the pools.

    Args:
      free: pages left after it.
      edge_free: the same of the edges' pool.
      seen: jobs that were decoded in it; the others' prompts may not be stored yet.
      newer: dispatches after it, whose results are not known.
    """
    known = set(seen)
    unseen = [self.pool.most(len(job.tokens)) for job in self._order if job not in known]
    grown = [newer * len(self._order) * n for n in self.pool.growth(self.ticks)]
    self.free = [f - g - sum(n) for f, g, n in zip(
        (free, edge_free), grown, list(zip(*unseen)) or [(0,), (0,)])]

  @property
  def held(self) -> list[Job]:
    """Requests in slots, oldest first."""
    return list(self._order)

  @property
  def idle(self) -> bool:
    """Nothing to do."""
    return not self.queue and not self._order

  def _has_room(self, job: Job) -> bool:
    """Returns True if the pool holds a prompt beside what the rows before it take until it is stored."""
    if self.pressed:
      return False
    unstored = len(job.tokens) + sum(len(other.tokens) - other.stored for other in self._order if not other.started)
    dispatches = -(-unstored // self.chunk)
    spare = [len(self._order) * n for n in self.pool.growth(dispatches * self.ticks)]
    return all(not n or n + s <= f for n, s, f in zip(self.pool.most(len(job.tokens)), spare, self.free))

  def _vacate(self, job: Job) -> int:
    slot, job.slot, job.started, job.stored = job.slot, None, False, 0
    self.slots[slot] = None
    self._order.remove(job)
    return slot
