"""What an engine accepts of exits, whether drafts pay, and who finds room in a pass."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from mor.exits import calibration
from mor.exits import policy as exits_lib
from mor.exits import ring
from mor.serve import early_exit as exit_host
from mor.serve import request as request_lib
from tests.helpers import exiting
from tests.helpers import serving


def paced(pace, num, seconds, slow=()):
  """Whether each dispatch drafted; a dispatch gives 10 tokens in `seconds` of its side, or in 50 where it is slow."""
  drafted = []
  for i in range(num):
    drafted.append(pace.next())
    pace.saw(drafted[-1], 10, 50.0 if i in slow else seconds[drafted[-1]])
  return np.array(drafted)


def test_drafts_that_pay_are_kept():
  drafted = paced(exit_host.Pace(), 2000, {True: 1.0, False: 1.2})
  assert drafted[:5].all(), "so that a short session has them, too"
  assert drafted[100:].mean() > 0.98 and not drafted[:13].all()


@pytest.mark.parametrize("seed", range(5))
def test_drafts_that_pay_are_kept_though_each_dispatch_says_little(seed):
  """A draft takes 1, a full pass 3; six of ten drafts are right: 1.2 times as fast."""
  rng, pace, drafted = np.random.default_rng(seed), exit_host.Pace(), []
  for _ in range(1000):
    drafted.append(pace.next())
    passes = int(rng.integers(1, 4)) if drafted[-1] else 4
    right = int(rng.binomial(passes, 0.6)) if drafted[-1] else 0
    pace.saw(drafted[-1], passes + right, (3 + drafted[-1]) * passes * rng.uniform(0.9, 1.4))
  assert np.mean(drafted) > 0.9


def test_drafts_that_cost_twice_as_much_take_a_hundredth_of_the_time():
  drafted = paced(exit_host.Pace(), 2000, {True: 2.0, False: 1.0})
  assert 5 <= drafted.sum() <= 12


def test_the_other_side_is_chosen_when_it_is_the_faster_one_again():
  pace = exit_host.Pace()
  assert not paced(pace, 500, {True: 1.5, False: 1.0})[-100:].any()
  assert paced(pace, 3000, {True: 0.8, False: 1.0})[-1000:].mean() > 0.98


def test_a_dispatch_that_compiles_decides_nothing():
  drafted = paced(exit_host.Pace(), 400, {True: 1.0, False: 1.2}, slow=(0, 1))
  assert drafted[13:].mean() > 0.9


def test_where_drafts_are_not_expected_to_pay_it_begins_without_and_learns_that_they_do():
  pace = exit_host.Pace(drafts=False)
  drafted = paced(pace, 2000, {True: 0.8, False: 1.0})
  assert not drafted[:5].any() and drafted[100:].mean() > 0.98


@pytest.mark.parametrize("draft, full", [(1.2, 1.0), (1.0, 1.2)])
def test_what_pays_is_learnt_though_a_prompt_is_read_beside_every_dispatch(draft, full):
  rng, pace, drafted = np.random.default_rng(0), exit_host.Pace(), []
  for _ in range(1000):
    drafted.append(pace.next())
    pace.saw(drafted[-1], 10, (draft if drafted[-1] else full) + rng.uniform(0.1, 0.2), alone=False)
  assert np.mean(drafted) < 0.1 if draft > full else np.mean(drafted) > 0.9


def test_a_prompt_beside_a_dispatch_counts_for_nothing_where_there_are_others():
  """Prompts are read beside drafts only, which are the faster ones without."""
  pace, drafted = exit_host.Pace(), []
  for i in range(1000):
    drafted.append(pace.next())
    beside = drafted[-1] and i % 2 == 0
    pace.saw(drafted[-1], 10, 3.0 if beside else 1.0 if drafted[-1] else 1.5, alone=not beside)
  assert np.mean(drafted) > 0.9


def test_drafts_are_not_expected_to_pay_where_each_row_is_paid_for():
  model, exits = exiting.model("plain").config, exits_lib.Exits(after=(2,))
  pays = lambda num_slots: exit_host.drafts_pay(exits_lib.estimate_costs(model, exits, num_slots), exits.pending)
  assert pays(1) and not pays(64)


def test_who_has_waited_longest_finds_room_first():
  fits = ring.fit(jnp.array([3, 3, 2, 0, 3]), jnp.array([True, True, True, True, False]), jnp.array([0, 2, 1, 0, 9]), 5)
  assert fits.tolist() == [False, True, True, True, False]  # 3 and 2 of 5; 0 always fits; the last does not ask


def test_packed_tokens_stand_in_order_and_come_back():
  on_BS = jnp.array([[False, True], [True, True], [False, False]])
  packed = ring.pack(on_BS, 4)
  a_BS = jnp.arange(6).reshape(3, 2)
  assert packed.run_P.tolist() == [True, True, True, False]
  assert packed.take(a_BS)[:3].tolist() == [1, 2, 3]
  assert packed.put(a_BS, jnp.array([10, 20, 30, 40])).tolist() == [[0, 10], [20, 30], [4, 5]]


@pytest.mark.parametrize("options, said", [
    (dict(exit="trust"), "exit='trust' without a threshold"),
    (dict(exit="sure"), "exit='sure'"),
    (dict(exit="trust", threshold=float("nan")), "threshold=nan"),
    (dict(threshold=0.5), "threshold"),
])
def test_wrong_requests_are_refused(options, said):
  engine = serving.engine(exiting.model("cycle"), exits=exiting.exits("cycle"))
  with pytest.raises(ValueError, match=said):
    engine.submit([1, 2], **options)
  assert engine.idle


@pytest.mark.parametrize("exits, options, said", [
    (None, dict(calibrator=calibration.Calibrator("learn_then_test")), "calibrator is given but exits=None"),
    (dict(), dict(batching="sequence"), "batching='sequence' with exits"),
    (dict(after=(3,)), dict(), r"exits.after=\(3,\): this model has exits after layers 2, 4"),
    (dict(first=1000), dict(), "exits.first=1000: this model has"),
])
def test_wrong_engines_are_refused(exits, options, said):
  with pytest.raises(ValueError, match=said):
    serving.engine(exiting.model("cycle"), exits=exits if exits is None else exiting.exits("cycle", **exits), **options)


@pytest.mark.parametrize("given, said", [((np.zeros((200, 2)), None), "exits=.*; give "),
                                         ((exiting.exits("cycle"), np.zeros((200, 2))), "calibrator=.*; give ")])
def test_things_in_place_of_exits_are_refused_in_one_line(given, said):
  check = inspect.unwrap(exit_host.check)  # without the type checker of the tests
  with pytest.raises(ValueError, match=said) as error:
    check(given[0], exiting.model("cycle").config, "depth", given[1])
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields, said", [
    (dict(after=()), "exits.after"),
    (dict(after=(4, 2)), "exits.after"),
    (dict(measure="luck"), "exits.measure='luck'"),
    (dict(measure="agreement"), "two or more for the measure 'agreement'"),
    (dict(pending=0), "exits.pending=0"),
    (dict(carry=3), "exits.carry=3; use 0, or a count >= pending=7"),
    (dict(first=1), "exits.first=1"),
    (dict(kv="copied", monitor=True), "exits.monitor=True"),
    (dict(worth=2.0), "exits.worth=2.0"),
])
def test_wrong_exits_are_refused(fields, said):
  with pytest.raises(ValueError, match=said):
    exits_lib.Exits(**dict(after=(2,)) | fields)


def test_approximate_entries_cannot_verify():
  with pytest.raises(ValueError, match="exit='verify' with exits.kv='copied'"):
    exit_host.resolve(exits_lib.Exits(after=(2,), kv="copied"), request_lib.make([1], exit="verify"), None)
