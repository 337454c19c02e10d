"""The engine's loop: admission, prefill, dispatches, and what their results mean for slots and pages."""

import collections
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor.decode import decoder as decoder_lib
from mor.decode import slots as slots_lib
from mor.decode import storage as storage_lib
from mor.decode import tick
from mor.decode import weights as weights_lib
from mor.exits import calibration
from mor.exits import policy as exits_lib
from mor.serve import early_exit as exit_host
from mor.serve import meter
from mor.serve import request as request_lib
from mor.serve import scheduler as scheduler_lib

_LEAST_CHUNK = 16  # tokens of the smallest prefill bucket
_STORAGES = {"paged": storage_lib.Paged, "dense": storage_lib.Dense}


@dataclasses.dataclass
class _Flight:
  """A dispatch whose results have not been read."""

  out: slots_lib.Out
  jobs: list[scheduler_lib.Job | None]  # by slot
  began: float  # when it was dispatched
  drafted: bool  # whether requests that are verified did draft
  alone: bool  # whether nothing was prefilled beside it


class Loop:
  """What runs an `engine.Engine`, whose arguments it has."""

  def __init__(self, model: Any, *, num_slots: int = 16, batching: str = "depth", context: int | None = None,
               page_size: int = 64, num_pages: int | None = None, num_edge_pages: int | None = None,
               weight_format: str = "float32", kv_format: str = "float32", ticks: int | None = None,
               prefill_chunk: int = 256, router: Any = None, storage: str = "paged",
               exits: exits_lib.Exits | None = None,
               calibrator: calibration.Calibrator | None = None):
    context = model.context if context is None else context
    for name, value, choices in (("batching", batching, ("depth", "sequence")), ("storage", storage, _STORAGES),
                                 ("kv_format", kv_format, storage_lib.FORMATS)):
      if value not in choices:
        raise ValueError(f"{name}={value!r}; use one of {', '.join(choices)}")
    for name, value in dict(num_slots=num_slots, page_size=page_size, prefill_chunk=prefill_chunk, ticks=ticks,
                            context=context, num_pages=num_pages, num_edge_pages=num_edge_pages).items():
      if value is not None and value < 1:
        raise ValueError(f"{name}={value}; use a count >= 1")
    page_size = context if storage == "dense" else page_size
    kind, config = _STORAGES[storage], model.config
    self.decoder = decoder_lib.Decoder(
        config, kind(page_size, config.num_kv_heads, config.head_dim, kv_format), router, exits)
    exit_host.check(exits, batching, calibrator)
    cyclic = self.decoder.tables.schedule.cyclic
    if not cyclic and exits is None:
      raise ValueError(f"sharing={config.sharing!r} gives each step its own layers, so tokens at different steps "
                       "cannot share a batch; use generate() (--batching=none), or train with a cyclic scheme")
    self.model, self.context, self.num_slots = model, context, num_slots
    self.weights = weights_lib.prepare(config, model.variables, weight_format, exits.first if exits else 0)
    self._together = batching == "sequence"
    steps = self.decoder.num_steps if cyclic else 1  # passes of a tick that may have something to do
    self._ticks = ticks or steps * -(-4 // steps)
    self._chunk = max(_LEAST_CHUNK, prefill_chunk)
    pages_per_row = -(-context // page_size)
    whole = num_slots * pages_per_row
    pool = scheduler_lib.Pool(
        page_size, self.decoder.tables.num_rows, num_pages or whole * self.decoder.tables.num_rows,
        (num_edge_pages or whole) if self.decoder.tables.num_edges else 0,
        max(1 + exits.pending, self.decoder.tables.num_rows) if exits else 1)
    self.scheduler = scheduler_lib.Scheduler(num_slots, pool, self._ticks, self._chunk)
    slots = slots_lib.make(self.decoder, self.weights, num_slots, pool.num_pages, pool.num_edge_pages, pages_per_row)
    self.slots = jax.device_put(slots, *self.weights.lookup_VD.devices())  # committed, as a dispatch returns it
    self._flights: collections.deque[_Flight] = collections.deque()
    self._jobs: dict[int, scheduler_lib.Job] = {}
    self._sufficed: list[jax.Array] = []  # whether each prefill found its pages
    self._starved = False  # a row waits and no page is free
    self._context = exit_host.context(config, exits, num_slots)
    self._pace = exit_host.Pace(not exits or exit_host.drafts_pay(self._context.costs, exits.pending))
    self.calibrator = calibrator
    self._mark: float | None = None  # when the last dispatch was read
    self._events: list[tuple[int, request_lib.Event]] = []  # read, and not returned yet
    self._alone = True  # whether nothing was prefilled since the last dispatch
    self.meter = meter.Meter(num_slots, pool)

  @property
  def idle(self) -> bool:
    """Whether no request waits or runs, and all results have been returned."""
    return self.scheduler.idle and not self._flights and not self._events

  def step(self) -> list[tuple[int, request_lib.Event]]:
    """Admits, prefills, dispatches, and reads the dispatch before; returns what is new."""
    with self.meter.busy():
      while self.scheduler.admit():
        pass
      self._prefill()
      dispatched = not self._starved and any(job.started for job in self.scheduler.held)
      if dispatched:
        self._dispatch()
      events, self._events = self._events, []
      while len(self._flights) > (1 if dispatched else 0):
        events += self._harvest(self._flights.popleft())
      if self._starved and not self._flights:
        self._relieve()
      return events

  def wait(self) -> None:
    """Blocks until the device has done what was dispatched; the next `step` returns what was new."""
    with self.meter.busy():
      while self._flights:
        self._events += self._harvest(self._flights.popleft())
      jax.block_until_ready(self.slots.phase_B)

  def _prefill(self) -> None:
    """Prompts into their slots, oldest first, by chunks; all of them where nobody decodes yet."""
    held = self.scheduler.held
    budget = self._chunk if any(job.started for job in held) else sum(len(job.tokens) for job in held)
    for job in held:
      while not job.started and budget > 0:
        left = len(job.tokens) - 1 - job.stored
        if left:
          size = min(left, self._chunk)
          self._store(job, size)
          budget -= size
        if job.stored == len(job.tokens) - 1:
          self._start(job)

  def _store(self, job: scheduler_lib.Job, size: int) -> None:
    width = max(_LEAST_CHUNK, 1 << (size - 1).bit_length())
    tokens_1T = np.zeros((1, width), np.int32)
    tokens_1T[0, :size] = job.tokens[job.stored:job.stored + size]
    self.slots, ok = tick.store(
        self.decoder, self.weights, self.slots, jnp.int32(job.slot), jnp.asarray(tokens_1T), jnp.int32(job.stored),
        jnp.int32(size), context=job.stored > 0)
    job.stored += size
    self._alone = False
    self.meter.prefilled(size)
    self._sufficed.append(ok)

  def _start(self, job: scheduler_lib.Job) -> None:
    left = job.limit - (len(job.tokens) - len(job.prompt))
    ring = None
    if self.decoder.exits:
      ring = exit_host.settings(self.decoder, self._context.costs.worth, job.payload.request, job.payload.completion)
    self.slots = slots_lib.admit(self.slots, slots_lib.admission(
        job.slot, job.payload.request, job.tokens, left, self.model.config.vocab_size, ring))
    job.started = True

  def _dispatch(self) -> None:
    jobs = [job if job and job.started else None for job in self.scheduler.slots]
    drafted = True
    if any(job and exit_host.drafts_greedily(job.payload.request) for job in jobs):
      drafted = self._pace.next()
      self._context = self._context.replace(draft=jnp.bool_(drafted))
    began = time.monotonic()
    self.slots, out = tick.run(
        self.decoder, self.weights, self.slots, num_ticks=self._ticks, vocab_size=self.model.vocab_size,
        together=self._together, context=self._context)
    self._flights.append(_Flight(out, jobs, began, drafted, self._alone))
    self._alone = True

  def _harvest(self, flight: _Flight) -> list[tuple[int, request_lib.Event]]:
    out, sufficed = jax.device_get((flight.out, self._sufficed))
    assert all(sufficed), "a prefill was admitted without room for it"
    self._sufficed = []
    num = int(out.num_ticks)
    self.meter.harvested(out, num)
    self._learn(flight, out, num)
    self.scheduler.learn(int(out.free), int(out.edge_free), [job for job in flight.jobs if job], len(self._flights))
    events, last = [], out.new.token_BW.shape[2] - 1
    for k in range(num):
      for slot, job in enumerate(flight.jobs):
        for i in range(last + 1):
          token = int(out.new.token_BW[k, slot, i])
          if token < 0 or job is None or job.finished or job.slot != slot:
            break
          more = i < last and out.new.token_BW[k, slot, i + 1] >= 0
          events.append((job.id, self._take_token(job, out.new, (k, slot, i), "" if more else request_lib.FINISH[
              out.new.finish_B[k, slot]])))
    self.scheduler.pressed = bool(num) and bool(out.stalled_KB[num - 1].any())
    none_left = out.free == 0 or (self.decoder.tables.num_edges and out.edge_free == 0)
    stuck = bool(num) and not out.ran_KB[num - 1].any()  # each needs more pages than are left
    self._starved = self.scheduler.pressed and bool(none_left or stuck)
    return events

  def _learn(self, flight, out, num) -> None:
    """From a dispatch: whether drafts pay, and what the exits' confidence is worth."""
    now = time.monotonic()
    if self._mark is not None and num:  # the first one compiles
      seconds = now - max(self._mark, flight.began)
      self._pace.saw(flight.drafted, int((out.new.token_BW[:num] >= 0).sum()), seconds, flight.alone)
    self._mark = now
    if self.calibrator is not None and out.new.sure_BW.size:
      known_KBW = out.new.sure_BW[:num] >= 0
      self.calibrator.update(out.new.sure_BW[:num][known_KBW], out.new.agreed_BW[:num][known_KBW])

  def _take_token(self, job, new, at, finish) -> request_lib.Event:
    token = int(new.token_BW[at])
    event = job.payload.add(token, int(new.depth_BW[at]), float(new.logprob_BW[at]), finish, bool(new.early_BW[at]))
    job.tokens.append(token)
    self.meter.token(job.id)
    if event.finish:
      self._end(job, freed=bool(finish))
    return event

  def _relieve(self) -> None:
    """Preempts the youngest request, so that the others find pages."""
    job = self.scheduler.youngest()
    if job:
      self._free(self.scheduler.preempt(job))
      self.meter.preempted()
    self._starved = False

  def _end(self, job: scheduler_lib.Job, freed: bool = False) -> None:
    """Ends a job; its slot and pages go back unless the device has freed them itself."""
    slot = self.scheduler.finish(job)
    if slot is not None and not freed:
      self._free(slot)
    self.meter.finished(job.id)

  def _free(self, slot: int) -> None:
    done_B = np.zeros(self.num_slots, bool)
    done_B[slot] = True
    self.slots = slots_lib.release(self.decoder, self.slots, jnp.asarray(done_B))
