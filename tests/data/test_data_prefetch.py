"""Batches come in order, one ahead, and their errors arrive."""

import threading

import pytest

from mor.data import prefetch


def test_order():
  asked = []
  assert list(prefetch.prefetch(lambda step: asked.append(step) or step * step, 2, 6)) == [4, 9, 16, 25]
  assert asked == [2, 3, 4, 5]
  assert not list(prefetch.prefetch(lambda step: step, 3, 3))


def test_makes_one_batch_ahead_and_no_more():
  started = [threading.Event() for _ in range(4)]
  main = threading.get_ident()

  def make(step):
    assert threading.get_ident() != main
    started[step].set()
    return step

  batches = prefetch.prefetch(make, 0, 4)
  assert not started[0].is_set()
  assert next(batches) == 0
  assert started[1].wait(timeout=5)
  assert not started[2].is_set()
  batches.close()
  assert not started[2].is_set()


def test_error_arrives_at_its_step():
  def make(step):
    if step == 1:
      raise ValueError("row 1 is damaged")
    return step

  batches = prefetch.prefetch(make, 0, 3)
  assert next(batches) == 0
  with pytest.raises(ValueError, match="row 1 is damaged"):
    next(batches)
