"""Free pages against a plain Python model of a pool."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mor.decode import cache

ROWS, COLUMNS, SIZE, POOL = 4, 5, 3, 11

reserve = jax.jit(functools.partial(cache.reserve_pages, page_size=SIZE))
release = jax.jit(functools.partial(cache.release_pages, page_size=SIZE))


def count(entries):
  return -(-entries // SIZE)


def held(page_BP, length_B):
  return [[int(p) for p in page_BP[b, :count(length_B[b])]] for b in range(ROWS)]


def check_pool(free, page_BP, length_B):
  """Every page is free or held, and once."""
  mine = [page for row in held(page_BP, length_B) for page in row]
  others = np.asarray(free.page_P)[:int(free.num)].tolist()
  assert sorted(mine + others) == list(range(POOL))


def step(rng, free, page_BP, length_B):
  """A random reservation against its model; returns the pool and whether a row was refused."""
  count_B = np.minimum(rng.integers(0, 8, ROWS) * (rng.random(ROWS) < 0.7), COLUMNS * SIZE - length_B)
  new_free, new_page_BP, ok_B = reserve(
      free, jnp.asarray(page_BP), jnp.asarray(length_B, jnp.int32), jnp.asarray(count_B, jnp.int32))
  left, expected_B = int(free.num), []
  for entries, more in zip(length_B, count_B):
    need = count(entries + more) - count(entries)
    expected_B.append(need <= left)
    if need:
      left = left - need if need <= left else 0  # in order: who comes after a refused row gets nothing
  np.testing.assert_array_equal(ok_B, expected_B)
  assert held(new_page_BP, length_B) == held(page_BP, length_B), "a row lost pages that it had"
  return new_free, np.array(new_page_BP), np.where(expected_B, length_B + count_B, length_B), not all(expected_B)


def test_pool_against_its_model():
  rng = np.random.default_rng(0)
  free, page_BP, length_B = cache.make_free(POOL), np.zeros((ROWS, COLUMNS), np.int32), np.zeros(ROWS, int)
  refused = full = 0
  for _ in range(400):
    if rng.random() < 0.3:
      done_B = rng.random(ROWS) < 0.5
      free = release(free, jnp.asarray(page_BP), jnp.asarray(np.where(done_B, length_B, 0), jnp.int32))
      length_B = np.where(done_B, 0, length_B)
    else:
      free, page_BP, length_B, none_left = step(rng, free, page_BP, length_B)
      refused += none_left
    full += int(free.num) == 0
    check_pool(free, page_BP, length_B)
  assert refused > 20 and full > 5, "the pool was never short, so nothing was tested"
  free = release(free, jnp.asarray(page_BP), jnp.asarray(length_B, jnp.int32))
  check_pool(free, page_BP, np.zeros(ROWS, int))
  assert int(free.num) == POOL


def test_the_lowest_pages_go_first():
  free, page_BP, ok_B = reserve(cache.make_free(POOL), jnp.zeros((ROWS, COLUMNS), jnp.int32), jnp.zeros(ROWS, jnp.int32),
                                jnp.array([4, 0, 1, 0]))
  assert ok_B.all()
  assert page_BP[0, :2].tolist() == [0, 1] and page_BP[2, 0] == 2
  assert int(free.num) == POOL - 3
