"""Who takes part in a pass: who waits for whom, and whose pending tokens fill its rows."""

import jax.numpy as jnp
import pytest

from mor.decode import control
from mor.decode import slots as slots_lib
from mor.exits import policy as exits_lib
from mor.exits import ring as ring_lib
from tests.helpers import exiting
from tests.helpers import serving

COSTS = exits_lib.ExitCosts(full=100.0, turn=20.0, look=5.0, draft=40.0, worth=0.0)


@pytest.fixture(scope="module")
def empty():
  return serving.engine(exiting.model("plain"), exits=exiting.exits("plain"), num_slots=16).runner.slots


def placed(empty, phases, steps, counts):
  """Slots of which the first have these phases and steps, and pending tokens that run step 1 next."""
  pad = lambda values, rest: jnp.asarray([*values, *[rest] * (16 - len(values))], jnp.int32)
  ring = empty.ring
  return empty.replace(
      phase_B=pad(phases, slots_lib.FREE), step_B=pad(steps, 0),
      ring=ring.replace(count_B=pad(counts, 0), step_BS=jnp.ones_like(ring.step_BS),
                        routed=ring.routed | {"keep_BT": jnp.ones_like(ring.routed["keep_BT"])}))


@pytest.mark.parametrize("num_left, num_wait, pending, held", [
    (1, 4, 0, True),  # 100 > 4 * 20
    (1, 5, 0, False),  # 100 = 5 * 20
    (2, 4, 1, True),  # 200 > 8 * 20: pending tokens go along
    (2, 4, 2, False),  # 200 < 12 * 20
    (0, 3, 0, False),  # nobody to wait for
    (12, 4, 3, False),  # the pass is full
])
def test_slots_wait_for_others_where_a_turn_to_the_exit_costs_less_than_their_tokens_in_this_pass(
    empty, num_left, num_wait, pending, held):
  slots = placed(empty, [slots_lib.START] * num_left + [slots_lib.RUN] * num_wait, [0] * num_left + [1] * num_wait,
                 [2] * num_left + [pending] * num_wait)
  before_B = slots.ring.count_B - (slots.phase_B == slots_lib.START)
  room = 0 if pending == 3 else 32
  assert bool(ring_lib.should_wait(slots, 1, before_B, room, COSTS)) == held


def select(slots, room, step=1):
  return ring_lib.select_tokens(slots, room, 3, step)


def test_spare_rows_of_a_pass_take_the_first_pending_tokens_of_others(empty, monkeypatch):
  monkeypatch.setattr(control, "list_widths", lambda num, size: (4, 8, size))
  phases = [slots_lib.RUN, slots_lib.START, slots_lib.FREE, slots_lib.START, slots_lib.START]
  slots = placed(empty, phases, [1, 0, 0, 0, 0], [2, 0, 3, 3, 2])  # 1 + 2 rows of 4, so one is spare
  found = select(slots, room=32)
  assert found.wants_B.nonzero()[0].tolist() == found.fits_B.nonzero()[0].tolist() == [0]
  assert found.goes_B.nonzero()[0].tolist() == [0, 3] and found.step_B[jnp.array([0, 3])].tolist() == [1, 1]
  assert found.along_BS[0].tolist() == [True, True, False] and found.along_BS[3].tolist() == [True, False, False]
  assert found.along_BS.sum() == 3, "no token of a free slot, and no more than there is room for"
  assert select(slots, room=2).along_BS.sum() == 2, "there may be a row, and no room for a pending token"
  found = select(slots, room=32, step=None)
  assert (found.goes_B == found.fits_B).all() and found.along_BS.sum() == 2, "where steps mix, each goes with its own slot"


def test_what_finds_no_room_sends_its_first_pending_tokens_ahead(empty, monkeypatch):
  monkeypatch.setattr(control, "list_widths", lambda num, size: (4, 8, size))
  slots = placed(empty, [slots_lib.RUN, slots_lib.RUN], [1, 1], [3, 3])
  found = select(slots, room=4)
  assert found.wants_B.sum() == 2 and found.fits_B.tolist()[:2] == [True, False] and found.goes_B.sum() == 1
  slots = placed(empty, [slots_lib.RUN, slots_lib.RUN], [1, 1], [2, 3])  # 3 rows of 4, and room for one more
  found = select(slots, room=4)
  assert found.fits_B.tolist()[:2] == [True, False] and found.goes_B.tolist()[:2] == [True, True]
  assert found.along_BS[1].tolist() == [True, False, False], "not its newest, which waits for all of them"


def test_move_refuses_what_the_table_of_phases_has_not(empty):
  with pytest.raises(AssertionError):
    slots_lib.move(empty, jnp.ones(16, bool), slots_lib.FREE, slots_lib.RUN)
