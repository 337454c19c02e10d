"""Variants take turns, warm-up rounds do not count, and ratios are taken round by round."""

import pytest

from benchmarks import harness


def test_variants_take_turns_and_warm_up_rounds_do_not_count(capsys):
  calls = []
  variants = [harness.Program(name, lambda name=name: calls.append(name), amount=3) for name in "ab"]
  harness.take_turns(variants, rounds=2, warm_up=1, label="batch 1, ", tell=lambda variant: "done")
  assert calls == ["a", "b"] * 3
  for variant in variants:
    assert variant.amounts == [3, 3] and len(variant.wall) == len(variant.cpu) == 2 and min(variant.wall) > 0
  assert capsys.readouterr().err.splitlines()[-1] == "batch 1, round 3 of 3: a done, b done"


def test_a_round_adds_up_what_is_timed_in_it(monkeypatch):
  clock = iter([0.0, 0.5, 10.0, 10.25, 20.0, 21.0])
  monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
  monkeypatch.setattr(harness.time, "process_time", lambda: 0.0)
  variant = harness.Timed("a")

  def play():
    for _ in range(2 if not variant.amounts[-1] and len(variant.wall) == 1 else 1):
      assert variant.time(lambda: "result") == "result"
      variant.amounts[-1] += 6

  harness.take_turns([variant], rounds=2, play=play)
  assert variant.seconds("wall") == [0.75, 1.0] and variant.seconds("cpu") == [0.0, 0.0]
  assert variant.rates("wall") == [16.0, 6.0]


def test_ratios_are_taken_round_by_round():
  assert harness.ratios([1.0, 6.0, 4.0], [2.0, 3.0, 4.0]) == {"min": 0.5, "median": 1.0, "max": 2.0}
  with pytest.raises(ValueError):
    harness.ratios([1.0], [1.0, 2.0])


def test_rates_go_by_the_processor_only_if_pinned_to_a_core_of_a_cpu(monkeypatch):
  pinned = []
  monkeypatch.setattr(harness, "pin", pinned.append)
  assert harness.choose_clock(None) == "wall" and not pinned
  assert harness.choose_clock(1) == "cpu" and pinned == [1]
  monkeypatch.setattr(harness.jax, "default_backend", lambda: "gpu")
  assert harness.choose_clock(None) == "wall"
  with pytest.raises(ValueError, match="--pin=0 judges by processor time, and the work is done on a gpu; leave it out"):
    harness.choose_clock(0)
