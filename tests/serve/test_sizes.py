"""Arguments of an engine that are of another kind, or too large, are refused with their remedy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.serve import engine as engine_lib
from mor.serve import sizes
from tests.helpers import serving


@pytest.mark.parametrize("value", ["3", 3.0, True, np.bool_(True), b"3", [3], np.array([3]), np.float32(3), 0, -1, np.int64(0)])
def test_what_is_no_count_is_refused(value):
  with pytest.raises(ValueError, match="num_slots=.*; use a count >= 1"):
    sizes.check_counts(ticks=None, num_slots=value)


@pytest.mark.parametrize("value", [2**31, 10**400])
def test_a_count_is_below_the_devices(value):
  with pytest.raises(ValueError, match=r"context is a number of \d+ bits; use a count <= 2147483647"):
    sizes.check_counts(context=value)


def test_integers_of_all_kinds_are_counts():
  got = sizes.check_counts(a=3, b=np.int64(4), c=np.array(5), d=jnp.int32(6), e=None)
  assert got == [3, 4, 5, 6, None] and [type(x) for x in got[:4]] == [int] * 4


@pytest.mark.parametrize("options", [dict(context=10**9), dict(num_slots=10**6), dict(num_pages=10**9), dict(page_size=10**9),
                                     dict(num_edge_pages=10**9), dict(ticks=10**9), dict(context=10**9, storage="dense")],
                         ids=str)
def test_what_does_not_fit_the_memory_is_refused_at_once(options):
  with pytest.raises(ValueError, match=r"needs .* GiB .* are free; use a smaller context"):
    engine_lib.Engine(serving.model(), **options)


def test_a_batch_that_does_not_fit_is_refused_at_once():
  with pytest.raises(ValueError, match=r"needs .* GiB .* are free; use a smaller context"):
    serving.model().generate([[1, 2]], context=10**9)


def test_bytes_are_those_that_are_allocated():
  """What grows with no argument is a few percent here."""
  engine = serving.engine(serving.model(), num_pages=2000, num_edge_pages=1000)
  pool, runner = engine.scheduler.pool, engine.runner
  counted = sizes.count_bytes(runner.decoder, 5, pool, serving.CONTEXT // 4, 6)
  allocated = sum(leaf.nbytes for leaf in jax.tree.leaves(runner.slots))
  assert counted == pytest.approx(allocated, rel=0.03)


@pytest.mark.parametrize("check, message", [
    (lambda: sizes.check_choice("storage", ["paged"], ("paged", "dense")), r"storage=\['paged'\]; use one of paged, dense"),
    (lambda: sizes.check_model("runs/quickstart", None), "model='runs/quickstart'; give what mor.load"),
    (lambda: sizes.check_model(serving.model(), "fixed"), "router='fixed'; give a router"),
], ids=["storage", "model", "router"])
def test_other_kinds_are_refused(check, message):
  with pytest.raises(ValueError, match=message):
    check()


@pytest.mark.parametrize("number", ["0", None, [0], 0.0, True, np.zeros((200, 2))])
def test_a_number_that_is_none_is_no_request(number):
  engine = serving.engine(serving.model())
  with pytest.raises(ValueError, match="no request .*; it was never submitted") as error:
    engine._find(number)
  assert "\n" not in str(error.value)
