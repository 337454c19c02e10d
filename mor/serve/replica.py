"""A copy of the model in an engine, on one device or on several.

It has a scheduler (its slots and pages) and a runner (the programs that change them). The replicas share one queue. A
turn of the engine dispatches on all of them before it reads the results of any, so that their devices run at once. A
replica of several devices has a part of the model on each (`decode/parts.py`).
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax

from mor.decode import decoder as decoder_lib
from mor.decode import parts as parts_lib
from mor.decode import weights as weights_lib
from mor.exits import policy as exits_lib
from mor.serve import meter as meter_lib
from mor.serve import runner as runner_lib
from mor.serve import scheduler as scheduler_lib


def make(groups: Sequence[Sequence[jax.Device]] | None, model: Any, weight_format: str, decoder: decoder_lib.Decoder,
         num_slots: int, pool: scheduler_lib.Pool, pages_per_row: int, meter: meter_lib.Meter, *, ticks: int, chunk: int,
         exits: exits_lib.Exits | None, **options: Any) -> list["Replica"]:
  """Returns replicas behind one queue.

  Args:
    groups: devices of each replica; None is one replica on the default device.
    model: `serve.model.Model`.
    weight_format: as in `weights.prepare`.
    decoder: of what one device has of the model.
    num_slots, pool, pages_per_row, meter, ticks, chunk, exits, **options: those of `SlotRunner`, of each replica.
  """
  first, num_parts = exits.first if exits else 0, len(groups[0]) if groups else 1
  if num_parts > 1:
    weights = parts_lib.prepare(model.config, model.variables, weight_format, first, num_parts)
  else:
    weights = weights_lib.prepare(model.config, model.variables, weight_format, first)
  queue: collections.deque[scheduler_lib.Job] = collections.deque()
  replicas = []
  for group in groups or (None,):
    parts = parts_lib.Parts(group, decoder, model.config, weights) if num_parts > 1 else None
    placed = parts.weights if parts else weights if group is None else jax.device_put(weights, group[0])
    runner = runner_lib.SlotRunner(decoder, placed, num_slots, pool, pages_per_row, meter, ticks=ticks, chunk=chunk,
                                   exits=exits, parts=parts, **options)
    replicas.append(Replica(scheduler_lib.Scheduler(num_slots, pool, ticks, chunk, queue), runner))
  return replicas


class Replica:
  """Slots of one copy of the model; see the module docstring.

  Attributes:
    scheduler: the shared queue, this replica's slots, and what is known of its pool.
    runner: its programs, and their results that have not been read.
    starved: True if a row waits and no page is free.
  """

  def __init__(self, scheduler: scheduler_lib.Scheduler, runner: runner_lib.SlotRunner):
    self.scheduler, self.runner, self.starved = scheduler, runner, False

  @property
  def idle(self) -> bool:
    """Whether no request waits or runs here, and all results have been read."""
    return self.scheduler.idle and not self.runner.flights

  def reset(self) -> None:
    """Frees all slots and pages, whatever state they are in; their requests are not in the queue."""
    self.runner.reset()
    self.scheduler.clear()
    self.starved = False

  def admit(self) -> bool:
    """Moves the first request of the queue to a slot; returns True if there was room."""
    job = self.scheduler.admit()
    if job is not None:
      job.replica = self
    return job is not None

  def dispatch(self) -> bool:
    """Prefills prompts, and dispatches a few ticks if any request decodes; returns whether it does."""
    self.runner.prefill(self.scheduler.held)
    dispatches = not self.starved and any(job.started for job in self.scheduler.held)
    if dispatches:
      self.runner.dispatch(self.scheduler.slots)
    return dispatches

  def relieve(self) -> bool:
    """Preempts the youngest request, so that the others find pages; returns False if only one holds pages."""
    job = self.scheduler.youngest()
    if job:
      self.runner.release(self.scheduler.preempt(job))
    self.starved = False
    return job is not None

  def end(self, job: scheduler_lib.Job, freed: bool) -> None:
    """Ends a request of the queue or of these slots; `freed` says that the device has freed its slot itself."""
    slot = self.scheduler.finish(job)
    if slot is not None and not freed:
      self.runner.release(slot)
