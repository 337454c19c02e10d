"""Early exit: verified requests are the full depth's, and no entry is approximate."""

import numpy as np
import pytest

from mor.inference import slots as slots_lib
from tests import exiting
from tests import serving


@pytest.mark.parametrize("kind, pending", exiting.quick(("plain", 3), ("middle", 3), ("expert_choice", 1)))
def test_verified_requests_are_the_full_depths(kind, pending):
  """Token for token on 500 prompts, where all exit, some do, and none; stop tokens come from exits too."""
  model = exiting.model(kind)
  requests = serving.requests(500 if pending == 1 else 200, **exiting.GREEDY)
  expected = serving.reference(model, requests)
  assert {c.finish for c in expected} == {"stop", "length"}
  engine, acceptance = exiting.engine(model, kind, dict(pending=pending)), []
  for threshold in (1.0, 0.0, 0.3):
    got = exiting.answers(engine, [(p, o | dict(exit="verify", threshold=threshold)) for p, o in requests])
    for i, completion in enumerate(got):
      assert exiting.told(completion) == exiting.told(expected[i]), requests[i]
      assert not any(completion.early)
      np.testing.assert_allclose(completion.logprobs, expected[i].logprobs, rtol=0, atol=1e-4)
    acceptance.append(engine.metrics()["acceptance"])
  assert acceptance[0] == 0 < 0.05 < acceptance[1] <= acceptance[2] < 0.95, acceptance


@pytest.mark.parametrize("kind, num_slots", exiting.quick(("plain", 1), ("middle", 8), ("expert_choice", 8)))
def test_every_entry_after_a_sync_is_the_full_forwards(kind, num_slots):
  model = exiting.model(kind)
  modes = [dict(exit="trust"), dict(exit="verify")]
  requests = [(p, o | modes[i % 2]) for i, (p, o) in enumerate(serving.requests(20, **exiting.GREEDY, threshold=0.1))]
  engine = exiting.engine(model, kind, num_slots=num_slots, ticks=1)
  numbers = [engine.submit(prompt, **options) for prompt, options in requests]
  seen, done = [], {}
  while not engine.idle:
    for number, event in engine.step():
      if event.finish:
        done[number] = requests[numbers.index(number)][0] + engine.take(number).tokens
    slots = engine.slots
    for slot, job in enumerate(engine.scheduler.slots):
      synced = int(slots.phase_B[slot]) == slots_lib.START and int(slots.ring.count_B[slot]) == 0
      if job and job.started and synced:
        seen.append((job.id, int(slots.position_B[slot]), exiting.entries(engine.decoder, slots.cache, slot)))
  figures, compared = engine.metrics(), 0
  assert figures["exit_rate"] > 0 and 0 < figures["acceptance"] < 1
  for number, length, found in seen[::2]:
    if length > len(done[number]):
      continue  # a stop token, which the request does not keep, and none after it
    expected = exiting.prefilled(engine, done[number][:length])
    for place in expected:
      assert found[place].shape == expected[place].shape, (place, length)
      np.testing.assert_allclose(found[place], expected[place], rtol=0, atol=1e-4, err_msg=str((place, length)))
    compared += 1
  assert compared >= 10
