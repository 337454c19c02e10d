"""One engine on several devices gives every request the tokens of one device, from one queue."""

import collections
import types

import jax
import pytest

from mor.serve import engine as engine_lib
from mor.serve import replica as replica_lib
from mor.serve import runner as runner_lib
from mor.serve import scheduler as scheduler_lib
from mor.serve import sizes
from tests.helpers import interrupts
from tests.helpers import serving


def pressing(num):
  """Requests that two slots of a small pool cannot hold at once."""
  requests = serving.requests(num, max_tokens=31, stop_tokens=[], temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
  return [(prompt[:1], options) for prompt, options in requests]


def test_two_devices_give_the_tokens_of_one_beside_aborts_and_preemptions():
  model, requests = serving.model(), pressing(17)
  expected = serving.reference(model, requests)
  engine = serving.engine(model, num_pages=24, devices=2)
  done, aborted = serving.serve(engine, requests, 0, abort=0.15)
  assert aborted and len(done) + len(aborted) == len(requests)
  for place, completion in done.items():
    serving.assert_same(completion, expected[place], requests[place])
  for place, completion in aborted.items():
    assert completion.tokens == expected[place].tokens[:len(completion.tokens)]
  serving.assert_all_free(engine)
  assert engine.metrics()["preemptions"] > 0 and engine.metrics()["requests"] == len(requests)
  placed = [replica.runner.slots.token_B.devices() for replica in engine.replicas]
  assert placed == [{device} for device in jax.devices()[:2]]


def test_the_queue_feeds_the_device_with_the_fewest_requests():
  queue, pool = collections.deque(), scheduler_lib.Pool(page_size=4, num_rows=3, num_pages=30, num_edge_pages=10)
  runner = object.__new__(runner_lib.SlotRunner)  # which admission does not ask
  replicas = [replica_lib.Replica(scheduler_lib.Scheduler(4, pool, 6, 16, queue), runner) for _ in range(3)]
  jobs = [replicas[0].scheduler.make_job((1,), 3, None) for _ in range(8)]
  queue.extend(jobs)
  engine_lib.Engine._admit(types.SimpleNamespace(replicas=replicas))
  assert [replica.scheduler.held for replica in replicas] == [jobs[0::3], jobs[1::3], jobs[2::3]]
  assert all(job.replica is replicas[job.id % 3] for job in jobs)


@pytest.mark.slow
def test_an_interrupt_on_two_devices_is_exact_or_final():
  model, requests = serving.model(), serving.requests(9)
  expected, outcomes = serving.reference(model, requests), []
  for at in range(40, 400, 45):
    engine = serving.engine(model, num_slots=2, devices=2)
    outcomes.append(interrupts.run(engine, requests, expected, 4, interrupts.at_line(at, interrupts.interrupt)))
  assert outcomes.count("exact") >= 6, outcomes


@pytest.mark.parametrize("devices, message", [
    (0, "devices=0; use a count >= 1"),
    (9, r"devices=9, and there are 8 devices \(cpu\); use at most 8"),
    (True, "devices=True; give a count, a list of"),
    ("cpu", "devices='cpu'; give a count, a list of"),
    ([], r"devices=\[\]; give a count, a list of"),
    ([0, 1], r"devices=\[0, 1\]; give a count, a list of"),
])
def test_what_is_no_device_is_refused(devices, message):
  with pytest.raises(ValueError, match=message):
    sizes.check_devices(devices, 1)


def test_a_device_is_given_once():
  with pytest.raises(ValueError, match=r"give each of jax.local_devices\(\) once"):
    sizes.check_devices(jax.devices()[:1] * 2, 1)


def test_several_processes_are_refused(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="an engine runs in one process, and this program has 2"):
    engine_lib.Engine(serving.model())
