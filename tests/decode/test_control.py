"""Functions of the rows in use, at the widths that hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import control
from tests.helpers import platforms


@pytest.mark.parametrize("num, size", [(1, 1), (1, 8), (2, 16), (4, 32), (8, 8), (8, 36), (16, 16), (16, 48), (64, 192)])
def test_widths_are_whole_tiles_that_end_with_the_batch(num, size, tile=5):
  widths = control.list_widths(num, size)
  assert list(widths) == sorted(set(widths)) and widths[-1] == size and len(widths) <= 8
  assert all(width % tile == 0 for width in widths[:-1] if width > 1)
  assert (widths[0] == 1) == (num == 1), "one row alone is a product of its own"
  fits = min(width for width in widths if width >= num)
  assert fits - num < max(tile, num / 3), "what is in use mostly wastes little"


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_an_accelerator_computes_all_rows(platform):
  def run(on_M, x_M):
    return (control.run_some(lambda index_W: 2.0 * x_M[index_W], on_M, control.list_widths(4, 4), jnp.zeros(4)),
            control.skip_idle(jnp.any(on_M), lambda x_M: x_M + 1.0, x_M))

  on_M, x_M = jnp.array([False, True, True, False]), jnp.ones(4)
  assert set(platforms.find_branches(jax.make_jaxpr(run)(on_M, x_M))) == {"cond", "while"}
  with platforms.pretend(platform):
    assert control.list_widths(8, 36) == (36,)
    assert not platforms.find_branches(jax.make_jaxpr(run)(on_M, x_M)), "an accelerator would wait for the host"
    some_M, all_M = run(on_M, x_M)
  assert some_M.tolist() == [0, 2, 2, 0] and all_M.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("first", [0, 2, 9], ids=str)
def test_turns_that_would_change_nothing_are_not_counted(platform, first):
  def run(left):
    def turn(k, carry):
      left, seen_K = carry
      return jnp.maximum(left - 1, 0), seen_K.at[k].set(left)
    return control.repeat(4, lambda carry: carry[0] > 0, turn, (left, jnp.zeros(4, jnp.int32)))

  with platforms.pretend(platform):
    num, (left, seen_K) = jax.jit(run)(jnp.int32(first))
    branches = platforms.find_branches(jax.make_jaxpr(run)(jnp.int32(first)))
  assert num == min(first, 4) and left == max(first - 4, 0)
  assert seen_K.tolist() == [max(first - k, 0) for k in range(4)]
  assert bool(branches) == (platform == "cpu")


def test_a_function_of_the_first_rows_runs_at_the_narrowest_width_that_holds_them():
  traced = []

  @jax.jit
  def run(x_1MD, position_M, num):
    def function(x_1MD, position_M):
      traced.append(x_1MD.shape[1])
      return x_1MD * position_M[None, :, None] + x_1MD.shape[1]
    return control.run_first(function, control.Narrow(num, (2, 4, 7)), x_1MD, position_M)

  x_1MD, position_M = jnp.ones((1, 7, 3)), jnp.arange(7.0)
  for num, width in ((0, 2), (1, 2), (2, 2), (3, 4), (4, 4), (5, 7), (7, 7)):
    expected_M = np.where(np.arange(7) < width, np.arange(7) + width, 0.0)
    np.testing.assert_array_equal(run(x_1MD, position_M, jnp.int32(num))[0, :, 0], expected_M, err_msg=str(num))
  assert set(traced) == {2, 4, 7}
  np.testing.assert_array_equal(control.run_first(lambda x_1MD: x_1MD + 1, None, x_1MD), x_1MD + 1)


@pytest.mark.parametrize("on", [(), (5,), (0, 3), (1, 2, 4, 5), range(6)], ids=str)
def test_a_function_of_some_rows_leaves_the_others_results(on):
  on_M = jnp.zeros(6, bool).at[jnp.asarray(list(on), jnp.int32)].set(True)

  @jax.jit
  def run(on_M):
    others = (jnp.full(6, -1), jnp.full((6, 2), -1.0))
    return control.run_some(lambda index_W: (10 * index_W, jnp.tile(index_W[:, None], (1, 2)) + 0.5), on_M, (2, 6), others)

  number_M, pair_MX = map(np.asarray, run(on_M))
  for m in range(6):
    if m in on:
      assert number_M[m] == 10 * m and (pair_MX[m] == m + 0.5).all()
  if len(on) == 0:
    assert (number_M == -1).all() and (pair_MX == -1.0).all()
  if len(on) == 1:
    assert (number_M != -1).sum() == 2, "the width of two computes one row more"
