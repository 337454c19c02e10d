"""Early exit: verified requests are the full depth's, no entry is approximate, and no neighbour matters.

The quick tests of a kind share one program, whose dispatches are of one tick.
"""

import numpy as np
import pytest

from mor.decode import slots as slots_lib
from tests.helpers import exiting
from tests.helpers import serving


def engine(kind, model, num_slots=8, **fields):
  fields = dict(carry=4, first=24 if kind == "expert_choice" else 0) | fields
  return exiting.engine(model, kind, fields, num_slots=num_slots, ticks=1)


@pytest.mark.parametrize("kind, pending", exiting.quick(("plain", 3), slow=((3,), (1,))))
def test_verified_requests_are_the_full_depths(kind, pending):
  """Token for token, where all exit, some do, and none; stop tokens come from exits too."""
  model, num = exiting.model(kind), 40 if (kind, pending) == ("plain", 3) else 500
  requests = serving.requests(num, **exiting.GREEDY)
  expected = serving.reference(model, requests)
  assert {c.finish for c in expected} == {"stop", "length"}
  made, acceptance = engine(kind, model, pending=pending), []
  for threshold in (1.0, 0.0, 0.3):
    got = exiting.answers(made, [(p, o | dict(exit="verify", threshold=threshold)) for p, o in requests])
    for i, completion in enumerate(got):
      assert exiting.told(completion) == exiting.told(expected[i]), requests[i]
      assert not any(completion.early)
      np.testing.assert_allclose(completion.logprobs, expected[i].logprobs, rtol=0, atol=1e-4)
    acceptance.append(made.metrics()["acceptance"])
  assert acceptance[0] == 0 < 0.05 < acceptance[1] <= acceptance[2] < 0.95, acceptance


@pytest.mark.parametrize("kind, num_slots", exiting.quick(("plain", 8), ("expert_choice", 8), slow=((1,), (8,))))
def test_every_entry_after_a_sync_is_the_full_forwards(kind, num_slots):
  model = exiting.model(kind)
  modes = [dict(exit="trust"), dict(exit="verify")]
  requests = [(p, o | modes[i % 2]) for i, (p, o) in enumerate(serving.requests(20, **exiting.GREEDY, threshold=0.1))]
  made = engine(kind, model, num_slots)
  numbers = [made.submit(prompt, **options) for prompt, options in requests]
  seen, done = [], {}
  while not made.idle:
    for number, event in made.step():
      if event.finish:
        done[number] = requests[numbers.index(number)][0] + made.take(number).tokens
    slots = made.slots
    for slot, job in enumerate(made.scheduler.slots):
      synced = int(slots.phase_B[slot]) == slots_lib.START and int(slots.ring.count_B[slot]) == 0
      if job and job.started and synced:
        seen.append((job.id, int(slots.position_B[slot]), exiting.entries(made.decoder, slots.cache, slot)))
  figures, compared = made.metrics(), 0
  assert figures["exit_rate"] > 0 and 0 < figures["acceptance"] < 1
  for number, length, found in seen[::4 if (kind, num_slots) in (("plain", 8), ("expert_choice", 8)) else 2]:
    if length > len(done[number]):
      continue  # a stop token, which the request does not keep, and none after it
    expected = exiting.prefilled(made, done[number][:length])
    for place in expected:
      assert found[place].shape == expected[place].shape, (place, length)
      np.testing.assert_allclose(found[place], expected[place], rtol=0, atol=1e-4, err_msg=str((place, length)))
    compared += 1
  assert compared >= 10


@pytest.mark.parametrize("kind", exiting.quick(("plain",), ("expert_choice",), slow=((),)))
def test_requests_do_not_depend_on_their_neighbours(kind):
  """Trusted, verified, full and sampled ones together are what each is alone: tokens, depths and exits."""
  model = exiting.model(kind)
  modes = [dict(), dict(exit="trust", threshold=0.15), dict(exit="verify", threshold=0.1)]
  requests = [(p, o | modes[i % 3]) for i, (p, o) in enumerate(serving.requests(36))]
  made = engine(kind, model)
  expected = [exiting.answers(made, [request])[0] for request in requests]
  assert made.metrics()["crowded"] == 0
  for order in range(3):
    for i, completion in enumerate(exiting.answers(made, requests, order)):
      serving.assert_same(completion, expected[i], requests[i])
      assert completion.early == expected[i].early, requests[i]
  assert made.metrics()["crowded"] > 0 and any(any(c.early) for c in expected)
  full = serving.reference(model, exiting.without_exits(requests))
  for i in range(0, 36, 3):
    assert exiting.told(expected[i]) == exiting.told(full[i])
  quiet = exiting.answers(made, exiting.without_exits(requests))  # in slots where exits were used
  assert [exiting.told(c) for c in quiet] == [exiting.told(c) for c in full]
