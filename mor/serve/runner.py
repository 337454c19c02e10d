"""The device's side of an engine: slots, the programs that change them, and dispatches that have not been read.

  prefill                  stores chunks of prompts, and starts the requests whose prompt is stored
  dispatch                 runs a few ticks for all slots
  wait_oldest, pop_oldest  read the oldest dispatch
  release                  frees a slot
  reset                    frees all of them, whatever state they are in
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import packing
from mor.decode import parts as parts_lib
from mor.decode import prefill
from mor.decode import slots as slots_lib
from mor.decode import tick
from mor.decode import variant as variant_lib
from mor.decode import weights as weights_lib
from mor.exits import calibration
from mor.exits import policy as exits_lib
from mor.exits import ring as ring_lib
from mor.exits import tick as exit_tick
from mor.serve import early_exit as exit_host
from mor.serve import meter as meter_lib
from mor.serve import scheduler as scheduler_lib

LEAST_CHUNK = 16  # tokens of the smallest prefill bucket
_STARTS = 8  # requests that a call starts at most


@dataclasses.dataclass
class Flight:
  """A dispatch whose results have not been read."""

  out: packing.Words  # slots_lib.Out
  jobs: list[scheduler_lib.Job | None]  # by slot
  began: float  # when it was dispatched
  drafted: bool  # whether requests that are verified did draft
  alone: bool  # whether nothing was prefilled beside it


@dataclasses.dataclass(frozen=True)
class _NextTokens:
  """The next tokens of a prompt.

  Attributes:
    job: the request.
    size: number of tokens.
    width: the same with padding.
    context_pages: as in `prefill.run`.
  """

  job: scheduler_lib.Job
  size: int
  width: int
  context_pages: int

  @property
  def shape(self) -> tuple[int, int]:
    """Chunks of one shape may share a call."""
    return self.width, self.context_pages


def count_chunk() -> int:
  """Returns the prompt tokens between two dispatches where no number is asked for.

  An accelerator needs the tokens of a few prompts at once to be compute-bound, as it reads all weights for each call.
  """
  return 256 if control.adapts() else 1024


def list_tokens(out: slots_lib.Out) -> Iterator[tuple[int, int, int, float, bool, int]]:
  """Returns what a dispatch gave, in the order of ticks, slots and places.

  Args:
    out: results of a dispatch, NumPy arrays.

  Returns:
    Slot, token, depth, log-probability, whether an exit chose it, and why it ended its request, of each token.
  """
  new, num = out.ticks.new, int(out.num_ticks)
  given_KBW = new.token_BW[:num] != -1
  at = tick_N, slot_N, place_N = np.nonzero(given_KBW)
  last_N = place_N + 1 == given_KBW.sum(axis=2)[tick_N, slot_N]  # a slot's tokens of a tick have no gaps
  finish_N = np.where(last_N, new.finish_B[tick_N, slot_N], slots_lib.GOES_ON)
  early_N = np.zeros(len(slot_N), bool) if new.exits is None else new.exits.early_BW[at]
  columns = slot_N, new.token_BW[at], new.depth_BW[at], new.logprob_BW[at], early_N, finish_N
  return zip(*(column_N.tolist() for column_N in columns))


def _make_start(job: scheduler_lib.Job) -> slots_lib.Start:
  request, generated = job.payload.request, len(job.tokens) - len(job.prompt)
  return slots_lib.Start(job.slot, job.tokens, generated, job.limit - generated, request.sampling, request.stop_tokens,
                         request.logprobs)


class SlotRunner:
  """Runs requests in slots; see the module docstring.

  Args:
    decoder: tables of the model.
    weights: weights of the model.
    num_slots: number of slots.
    pool: sizes of the page pools.
    pages_per_row: pages of a request's row at most.
    meter: counts what is done.
    ticks: ticks of a dispatch.
    chunk: prompt tokens prefilled at most between two dispatches.
    vocab_size: tokens beyond it are never drawn.
    together: whether a token that is done waits for the deepest of the batch.
    exits: where tokens may leave early.
    calibrator: learns from exits if `exits.monitor`.
    parts: the parts of the model on several devices, of which `decoder` and `weights` are; None is one device.
  """

  def __init__(self, decoder: decoder_lib.Decoder, weights: weights_lib.Weights, num_slots: int,
               pool: scheduler_lib.Pool, pages_per_row: int, meter: meter_lib.Meter, *, ticks: int, chunk: int,
               vocab_size: int, together: bool, exits: exits_lib.Exits | None,
               calibrator: calibration.Calibrator | None, parts: parts_lib.Parts | None = None):
    self.decoder, self.weights, self.exits, self._parts = decoder, weights, exits, parts
    self._num_slots, self._pool, self._pages_per_row, self._meter = num_slots, pool, pages_per_row, meter
    self._ticks, self._chunk, self._vocab_size, self._together = ticks, chunk, vocab_size, together
    self._calibrator = calibrator
    self.setup, self.pace = None, exit_host.Pace()
    if exits:
      self.setup = exits_lib.set_up(parts.model if parts else decoder.model, exits, decoder.tables.schedule, num_slots)
      self.pace = exit_host.Pace(exit_host.drafts_pay(self.setup.costs, exits.pending))
    self.reset()

  def reset(self) -> None:
    """Makes all slots anew, and forgets the dispatches that have not been read."""
    self.slots: slots_lib.Slots | None = None  # old ones make room
    self.slots = self._make_slots()
    self.flights: collections.deque[Flight] = collections.deque()
    self._mark: float | None = None  # when the last dispatch was read
    self._alone = True  # whether nothing was prefilled since the last dispatch

  def _make_slots(self) -> slots_lib.Slots:
    def make(weights):
      slots = slots_lib.make(self.decoder, weights, self._num_slots, self._pool.num_pages,
                             self._pool.num_edge_pages, self._pages_per_row)
      return ring_lib.attach(self.decoder, slots, self.exits) if self.exits else slots

    if self._parts is not None:
      return self._parts.make(make)
    device, = self.weights.devices()
    with jax.default_device(device):
      return jax.device_put(make(self.weights), device)  # committed, as a dispatch returns it

  def _run(self, program: Callable, *args: Any, **options: Any) -> Any:
    """Runs a program of (decoder, weights, slots, …) for the slots; returns what it tells."""
    if self._parts is not None:
      self.slots, told = self._parts.run(program, self.slots, *args, **options)
    else:
      self.slots, told = program(self.decoder, self.weights, self.slots, *args, **options)
    return told

  def prefill(self, held: Sequence[scheduler_lib.Job]) -> None:
    """Prefills prompts by chunks, the oldest first, and all of them if no slot decodes yet."""
    waiting = [job for job in held if not job.started]
    budget = self._chunk if len(waiting) < len(held) else sum(len(job.tokens) for job in held)
    stored: list[scheduler_lib.Job] = []
    while waiting and budget > 0:
      chunks = self._choose_chunks(waiting, budget)
      if chunks:
        self._store(chunks)
        budget -= sum(chunk.size for chunk in chunks)
      stored += [job for job in waiting if job.stored == len(job.tokens) - 1]
      waiting = [job for job in waiting if job.stored < len(job.tokens) - 1]
    for first in range(0, len(stored), _STARTS):
      self._start(stored[first:first + _STARTS])

  def _choose_chunks(self, waiting: Sequence[scheduler_lib.Job], budget: int) -> list[_NextTokens]:
    """Returns the next chunks of prompts that one call stores: that of the oldest, and others of its shape."""
    chosen: list[_NextTokens] = []
    for job in waiting:
      size = min(len(job.tokens) - 1 - job.stored, self._chunk)
      if not size:
        continue
      chunk = _NextTokens(job, size, max(LEAST_CHUNK, control.ceil_power(size)), self._count_context_pages(job.stored))
      if not chosen or (chunk.shape == chosen[0].shape and budget > 0 and len(chosen) < self._count_rows(chunk.width)):
        chosen.append(chunk)
        budget -= size
    return chosen

  def _count_rows(self, width: int) -> int:
    """Returns the chunks of a call, which depend on the width alone: a prompt's numbers depend on no other prompt.

    A CPU takes as long for padding as for tokens, and gains nothing by a larger batch, so a call stores one chunk there.
    """
    return 1 if control.adapts() else min(self._num_slots, max(1, self._chunk // width))

  def _count_context_pages(self, stored: int) -> int:
    """Returns the pages that a chunk behind `stored` tokens reads: on a CPU all of a row, elsewhere a power of two."""
    if not stored:
      return 0
    if control.adapts():
      return self._pages_per_row
    return min(self._pages_per_row, control.ceil_power(-(-stored // self._pool.page_size)))

  def _store(self, chunks: Sequence[_NextTokens]) -> None:
    width, context_pages = chunks[0].shape
    num = self._count_rows(width)
    tokens_GT, placed_G3 = np.zeros((num, width), np.int32), np.zeros((num, 3), np.int32)
    placed_G3[:, 0] = self._num_slots
    for g, chunk in enumerate(chunks):
      job = chunk.job
      tokens_GT[g, :chunk.size] = job.tokens[job.stored:job.stored + chunk.size]
      placed_G3[g] = job.slot, job.stored, chunk.size
    slot_G, start_G, length_G = placed_G3.T
    self._run(prefill.store, slot_G, tokens_GT, start_G, length_G, context_pages=context_pages)
    for chunk in chunks:
      chunk.job.stored += chunk.size
    self._alone = False
    self._meter.prefilled(sum(chunk.size for chunk in chunks))

  def _start(self, jobs: Sequence[scheduler_lib.Job]) -> None:
    """Starts `_STARTS` requests at most, whose prompts are stored."""
    starts, num_rows = [_make_start(job) for job in jobs], min(_STARTS, self._num_slots)
    admission = slots_lib.make_admission(starts, num_rows, self._num_slots, self.decoder.model.vocab_size)
    if self.setup is None:
      self.slots = slots_lib.admit(self.slots, packing.pack(admission))
    else:
      fields = exit_host.set_fields(self.setup, [job.payload for job in jobs], num_rows)
      self.slots = ring_lib.admit(self.slots, packing.pack((admission, fields)))
    for job in jobs:
      job.started = True

  def dispatch(self, slots: Sequence[scheduler_lib.Job | None]) -> None:
    """Runs a few ticks for the requests in slots that have started."""
    jobs = [job if job and job.started else None for job in slots]
    drafted = True
    if any(job and exit_host.drafts_greedily(job.payload.request) for job in jobs):
      drafted = self.pace.next()
      self.setup = self.setup.replace(draft=jnp.bool_(drafted))
    began, static = time.monotonic(), dict(num_ticks=self._ticks, vocab_size=self._vocab_size, variant=_pick(jobs))
    if self.setup is None:
      out = self._run(tick.run, together=self._together, **static)
    else:
      out = self._run(exit_tick.run, setup=self.setup, **static)
    out.word_N.copy_to_host_async()
    self.flights.append(Flight(out, jobs, began, drafted, self._alone))
    self._alone = True

  def wait_oldest(self) -> slots_lib.Out:
    """Waits for the oldest dispatch; returns its results as NumPy arrays, and changes nothing."""
    out = packing.unpack(jax.device_get(self.flights[0].out))
    assert out.sufficed, "a prefill was admitted without room for it"
    return out

  def pop_oldest(self, out: slots_lib.Out) -> list[scheduler_lib.Job | None]:
    """Takes the oldest dispatch off, whose results are known; returns the requests that were in its slots."""
    flight, num = self.flights.popleft(), int(out.num_ticks)
    self._meter.harvested(out, num)
    self._learn(flight, out, num)
    return flight.jobs

  def _learn(self, flight, out, num) -> None:
    """Learns from a dispatch whether drafts pay, and what the exits' confidence is worth."""
    now = time.monotonic()
    if self._mark is not None and num:  # the first one compiles
      seconds = now - max(self._mark, flight.began)
      self.pace.saw(flight.drafted, int((out.ticks.new.token_BW[:num] >= 0).sum()), seconds, flight.alone)
    self._mark = now
    if self._calibrator is not None and self.exits.monitor:
      report = out.ticks.new.exits
      known_KBW = report.sure_BW[:num] >= 0
      self._calibrator.update(report.sure_BW[:num][known_KBW], report.agreed_BW[:num][known_KBW])

  def release(self, slot: int) -> None:
    """Frees a slot and its pages."""
    done_B = np.zeros(self._num_slots, bool)
    done_B[slot] = True
    self.slots = slots_lib.release(self.decoder, self.slots, done_B)

  def wait(self) -> None:
    """Blocks until the device has done what was dispatched."""
    jax.block_until_ready(self.slots.phase_B)


def _pick(jobs: Sequence[scheduler_lib.Job | None]) -> variant_lib.Variant:
  """Returns the program of a tick that serves all requests in slots."""
  requests = [job.payload.request for job in jobs if job]
  return variant_lib.pick([request.sampling for request in requests], any(request.logprobs for request in requests),
                          any(request.exit != "none" for request in requests))
