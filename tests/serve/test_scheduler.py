"""The queue and its arithmetic, and whole loads on a pool made of numbers."""

import collections
import random

import pytest

from mor.serve import scheduler as scheduler_lib

POOL = scheduler_lib.Pool(page_size=4, num_rows=3, num_pages=30, num_edge_pages=10)


def make(num_slots=2, pool=POOL, ticks=6, chunk=16):
  return scheduler_lib.Scheduler(num_slots, pool, ticks, chunk)


def submit(scheduler, prompt=1, limit=4):
  job = scheduler.make_job((0,) * prompt, limit, None)
  scheduler.submit(job)
  return job


def admit_all(scheduler):
  return list(iter(scheduler.admit, None))


def test_first_come_first_served():
  scheduler = make()
  assert scheduler.idle
  jobs = [submit(scheduler) for _ in range(4)]
  assert [job.id for job in jobs] == [0, 1, 2, 3] and not scheduler.idle
  assert admit_all(scheduler) == jobs[:2]
  assert [job.slot for job in jobs] == [0, 1, None, None]
  assert scheduler.finish(jobs[0]) == 0 and jobs[0].finished
  assert scheduler.admit() is jobs[2] and jobs[2].slot == 0
  assert scheduler.held == [jobs[1], jobs[2]]
  assert scheduler.finish(jobs[3]) is None and not scheduler.queue  # from the queue: it had no slot
  assert scheduler.finish(jobs[2]) == 0 and scheduler.finish(jobs[1]) == 1
  assert scheduler.finish(jobs[1]) is None and scheduler.idle


def test_the_preempted_comes_back_first_and_the_oldest_stays():
  scheduler = make()
  first, second, third = (submit(scheduler) for _ in range(3))
  admit_all(scheduler)
  second.tokens.append(7)
  second.started, second.stored = True, 1
  assert scheduler.youngest() is second
  assert scheduler.preempt(second) == 1
  assert list(scheduler.queue) == [second, third]
  assert (second.slot, second.started, second.stored, second.tokens) == (None, False, 0, [0, 7])
  assert scheduler.youngest() is None and scheduler.held == [first]
  assert scheduler.admit() is second


def test_what_never_fits_is_refused():
  scheduler = make()
  assert POOL.most(40) == (30, 10) and POOL.most(41) == (33, 11)
  submit(scheduler, prompt=20, limit=21)  # the last token is never stored
  message = (r"the request may need 33 \+ 11 pages of 4 tokens \(20 prompt \+ 22 new tokens at 3 steps\), more than the "
             r"pool of 30 \+ 10; lower max_tokens, or give the engine more pages")
  with pytest.raises(ValueError, match=message):
    submit(scheduler, prompt=20, limit=22)
  assert len(scheduler.queue) == 1
  no_edges = make(pool=scheduler_lib.Pool(page_size=4, num_rows=1, num_pages=10, num_edge_pages=0))
  submit(no_edges, prompt=40, limit=1)
  with pytest.raises(ValueError, match=r"may need 11 \+ 0 pages"):
    submit(no_edges, prompt=41, limit=1)


def test_growth_is_at_most_an_entry_a_tick():
  assert POOL.growth(1) == (1, 1)
  assert POOL.growth(6) == (6, 3)  # 6 entries of one row begin at most 3 pages
  assert POOL.growth(24) == (21, 7)


def test_a_prompt_waits_until_it_fits_beside_the_others():
  """The second needs 9 + 3 pages, and the first takes up to 6 + 3 before it is stored."""
  for free, fits in (((15, 6), True), ((14, 6), False), ((15, 5), False)):
    scheduler = make()
    first, second = submit(scheduler), submit(scheduler, prompt=12)
    assert scheduler.admit() is first and scheduler.free == [27, 9]
    first.started = True
    scheduler.learn(*free, [first], newer=0)
    assert scheduler.free == list(free)
    assert (scheduler.admit() is second) == fits


def test_chunks_that_are_not_stored_yet_take_their_time():
  """Twelve tokens after sixteen are stored after two dispatches."""
  for free, fits in (((21, 7), True), ((20, 7), False)):
    scheduler = make(num_slots=3, chunk=14)
    jobs = [submit(scheduler), submit(scheduler, prompt=16), submit(scheduler, prompt=12)]
    scheduler.free = [100, 100]
    assert [scheduler.admit(), scheduler.admit()] == jobs[:2]
    jobs[0].started = True
    jobs[0].stored = 1
    scheduler.free = [free[0] + 12, free[1] + 10]
    assert (scheduler.admit() is jobs[2]) == fits


def test_learning_counts_what_is_promised_and_under_way():
  scheduler = make()
  seen, unseen = submit(scheduler), submit(scheduler, prompt=9)
  admit_all(scheduler)
  scheduler.learn(25, 9, [seen], newer=0)
  assert scheduler.free == [25 - 9, 9 - 3]
  scheduler.learn(25, 9, [seen, unseen], newer=1)  # two rows, six ticks
  assert scheduler.free == [25 - 12, 9 - 6]


def test_nobody_is_admitted_beside_a_row_that_waits():
  scheduler = make()
  first, second = submit(scheduler), submit(scheduler)
  scheduler.admit()
  scheduler.pressed = True
  assert scheduler.admit() is None
  scheduler.finish(first)
  assert scheduler.admit() is second, "nobody is left to press"


class Device:
  """Rows and pages as numbers, run as the engine runs them: results come one dispatch late."""

  def __init__(self, seed, pool, num_slots, ticks, chunk, queue=None):
    self.rng, self.pool, self.chunk = random.Random(seed), pool, chunk
    self.scheduler = scheduler_lib.Scheduler(num_slots, pool, ticks, chunk, queue)
    self.rows, self.at, self.left, self.flights = {}, {}, {}, []  # entries, step (-1: not begun) and tokens to go
    self.preemptions, self.starved = 0, False

  def free(self):
    count = lambda lengths: sum(-(-n // self.pool.page_size) for n in lengths)
    return (self.pool.num_pages - sum(count(rows[1:]) for rows in self.rows.values()),
            self.pool.num_edge_pages - sum(count(rows[:1]) for rows in self.rows.values()))

  def add(self, job, row, entries):
    """Stores entries, where there are pages."""
    before = list(self.rows[job])
    self.rows[job][row] += entries
    if min(self.free()) < 0:
      self.rows[job] = before
      return False
    return True

  def prefill(self):
    held = self.scheduler.held
    budget = self.chunk if any(job.started for job in held) else 10**6
    for job in held:
      self.rows.setdefault(job, [0] * (1 + self.pool.num_rows))
      while not job.started and budget > 0:
        size = min(len(job.tokens) - 1 - job.stored, self.chunk)
        assert all(self.add(job, row, size) for row in range(1 + self.pool.num_rows)), "promised pages are gone"
        job.stored, budget = job.stored + size, budget - size
        if job.stored == len(job.tokens) - 1:
          job.started, self.at[job], self.left[job] = True, -1, job.limit - len(job.tokens) + len(job.prompt)

  def dispatch(self):
    stalled, new = False, collections.Counter()
    for _ in range(self.scheduler.ticks):
      running = [job for job in self.rows if job.started and self.left[job]]
      stalled = [job for job in running if not self.tick(job, new)]
    for job in [job for job in self.rows if job.started and not self.left[job]]:
      del self.rows[job]  # before the host knows
    self.flights.append(([job for job in self.scheduler.held if job.started], new, self.free(), bool(stalled)))

  def tick(self, job, new):
    """One step of a token; False where there is no page for it."""
    if self.at[job] < 0:
      if not self.add(job, 0, 1):
        return False
      self.at[job] = 0
    if not self.add(job, self.at[job] + 1, 1):
      return False
    self.at[job] += 1
    if self.at[job] == self.pool.num_rows or self.rng.random() < 0.3:
      self.at[job] = -1
      self.left[job] -= 1
      new[job] += 1
    return True

  def harvest(self):
    jobs, new, free, stalled = self.flights.pop(0)
    self.scheduler.learn(*free, jobs, len(self.flights))
    for job, count in new.items():
      job.tokens += [0] * count
      if len(job.tokens) == len(job.prompt) + job.limit:
        self.scheduler.finish(job)
    self.scheduler.pressed = stalled
    self.starved = stalled and min(free) == 0

  def step(self):
    admit_all(self.scheduler)
    self.prefill()
    dispatched = not self.starved and any(job.started for job in self.scheduler.held)
    if dispatched:
      self.dispatch()
    while len(self.flights) > dispatched:
      self.harvest()
    if self.starved and not self.flights:
      job, self.starved = self.scheduler.youngest(), False
      if job:
        self.scheduler.preempt(job)
        del self.rows[job]
        self.preemptions += 1


@pytest.mark.parametrize("num_devices", [1, 3])
def test_every_load_is_done_and_no_promise_is_broken(num_devices):
  preemptions = 0
  for seed in range(400 // num_devices**2):
    rng = random.Random(seed)
    pool = scheduler_lib.Pool(rng.choice([1, 2, 4]), 3, 3 * rng.choice([24, 40, 80]), rng.choice([24, 40, 80]))
    sizes, queue = dict(ticks=rng.choice([1, 3, 6]), chunk=rng.choice([2, 4, 16])), collections.deque()
    num_slots = rng.choice([2, 5, 9])
    devices = [Device(seed + 1000 * i, pool, num_slots, queue=queue, **sizes) for i in range(num_devices)]
    waiting, jobs = num_devices * rng.randint(1, 25), []
    for _ in range(20000):
      if len(jobs) < waiting and rng.random() < 0.5:
        prompt = rng.randint(1, 16)
        jobs.append(submit(devices[0].scheduler, prompt, rng.randint(1, 24 - prompt)))
      for device in devices:
        device.step()
      if len(jobs) == waiting and all(device.scheduler.idle and not device.flights for device in devices):
        break
    assert all(job.finished for job in jobs), seed
    assert all(device.free() == (pool.num_pages, pool.num_edge_pages) for device in devices)
    preemptions += sum(device.preemptions for device in devices)
  assert preemptions > 100 // num_devices


def test_schedulers_of_one_queue_keep_the_order_of_arrival():
  """A request that is preempted in one of them is older than those that the other one has admitted since."""
  first = make(num_slots=1)
  second = scheduler_lib.Scheduler(2, POOL, 6, 16, first.queue)
  jobs = [submit(first) for _ in range(4)]
  assert [second.admit(), first.admit(), second.admit()] == jobs[:3]
  second.finish(jobs[0])
  first.preempt(jobs[1])
  assert second.admit() is jobs[1] and second.held == jobs[1:3] and second.youngest() is jobs[2]
  second.preempt(jobs[1])
  second.preempt(jobs[2])
  assert list(first.queue) == jobs[1:]
