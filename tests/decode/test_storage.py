"""Both storages against plain attention over lists of entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import storage as storage_lib

M, H, CONTEXT, PAGE = 19, 6, 16, 4  # two groups of eight rows and a rest
SIZES = {"dense": (storage_lib.Dense, CONTEXT), "paged": (storage_lib.Paged, PAGE)}
HEADS = {"one_product": (4, 2), "product_by_head": (12, 6)}  # (N, K)
LENGTH_M = np.array([0, 1, 3, 4, 5, 16, 2, 9] + [0] * 8 + [7, 0, 12])


@pytest.fixture(params=SIZES)
def storage_of(request):
  kind, page = SIZES[request.param]
  return lambda num_kv_heads, kv_format="float32": kind(page, num_kv_heads, H, kv_format)


class Filled:
  """A buffer whose rows hold random entries, and the same entries as NumPy arrays."""

  def __init__(self, storage, seed):
    rng = np.random.default_rng(seed)
    pages = CONTEXT // storage.page_size
    num_pages = M * pages + 2
    shape = (M, CONTEXT, storage.num_kv_heads, H)
    self.k_MSKH, self.v_MSKH = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    self.page_MP = rng.permutation(num_pages)[:M * pages].reshape(M, pages).astype(np.int32)
    stale = jax.tree.map(lambda a: storage_lib.encode(jnp.full(a.shape, 50.0), a), storage.make(num_pages))
    row_E, entry_E = (x.reshape(-1) for x in np.mgrid[:M, :CONTEXT])
    written_E = entry_E < LENGTH_M[row_E]
    page_E = np.where(written_E, self.page_MP[row_E, entry_E // storage.page_size], num_pages)
    order = rng.permutation(len(row_E))
    self.buffer = storage.write(
        stale, jnp.asarray(page_E[order]), jnp.asarray((entry_E % storage.page_size)[order]),
        jnp.asarray(self.k_MSKH[row_E, entry_E][order]), jnp.asarray(self.v_MSKH[row_E, entry_E][order]))

  def rows(self, length_M=LENGTH_M, hidden_MS=None):
    hidden_MS = None if hidden_MS is None else jnp.asarray(hidden_MS)
    return self.buffer, storage_lib.SeenEntries(jnp.asarray(self.page_MP), jnp.asarray(length_M), hidden_MS)

  def seen(self, m, length_M=LENGTH_M, hidden_MS=None):
    index = [j for j in range(length_M[m]) if hidden_MS is None or not hidden_MS[m, j]]
    return self.k_MSKH[m, index], self.v_MSKH[m, index]


def attention(q_NH, k_SKH, v_SKH):
  """One query over its entries, in float64."""
  group = q_NH.shape[0] // k_SKH.shape[1]
  k_SNH, v_SNH = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k_SKH, v_SKH))
  score_NS = np.einsum("NH,SNH->NS", q_NH, k_SNH) / np.sqrt(H)
  weight_NS = np.exp(score_NS - score_NS.max(axis=1, keepdims=True))
  return np.einsum("NS,SNH->NH", weight_NS / weight_NS.sum(axis=1, keepdims=True), v_SNH)


def check(storage, num_heads, parts, seen, atol):
  """`seen(m)`: keys and values of query m."""
  q_MNH = np.random.default_rng(9).normal(size=(M, num_heads, H)).astype(np.float32)
  out_MNH = np.asarray(jax.jit(storage.attend)(jnp.asarray(q_MNH), parts))
  assert np.isfinite(out_MNH).all(), "a query that sees nothing"
  checked = 0
  for m in range(M):
    k_SKH, v_SKH = seen(m)
    if len(k_SKH):
      np.testing.assert_allclose(out_MNH[m], attention(q_MNH[m], k_SKH, v_SKH), rtol=0, atol=atol, err_msg=str(m))
      checked += 1
  assert checked > M // 3


@pytest.mark.parametrize("num_heads, num_kv_heads", HEADS.values(), ids=HEADS)
def test_one_row(storage_of, num_heads, num_kv_heads):
  storage = storage_of(num_kv_heads)
  row = Filled(storage, 1)
  check(storage, num_heads, [row.rows()], row.seen, atol=1e-5)


@pytest.mark.parametrize("num_heads, num_kv_heads", HEADS.values(), ids=HEADS)
def test_two_rows_of_two_buffers_and_hidden_entries(storage_of, num_heads, num_kv_heads):
  storage = storage_of(num_kv_heads)
  base, own = Filled(storage, 1), Filled(storage, 2)
  hidden_MS = np.random.default_rng(3).random((M, CONTEXT)) < 0.5
  hidden_MS[5] = True  # all of the longest row
  own_M = LENGTH_M[::-1].copy()
  own_M[:3] = 0

  def seen(m):
    pairs = base.seen(m, hidden_MS=hidden_MS), own.seen(m, np.minimum(own_M, LENGTH_M))
    return tuple(np.concatenate(x) for x in zip(*pairs))
  parts = [base.rows(hidden_MS=hidden_MS), own.rows(np.minimum(own_M, LENGTH_M))]
  check(storage, num_heads, parts, seen, atol=1e-5)


@pytest.mark.parametrize("num_heads, num_kv_heads", HEADS.values(), ids=HEADS)
def test_bfloat16(storage_of, num_heads, num_kv_heads):
  storage = storage_of(num_kv_heads, "bfloat16")
  row = Filled(storage, 1)
  assert row.buffer.k.dtype == jnp.uint16
  check(storage, num_heads, [row.rows()], row.seen, atol=2e-2)


@pytest.mark.parametrize("kv_format", storage_lib.FORMATS)
def test_entries_are_read_as_they_were_written(storage_of, kv_format):
  storage = storage_of(2, kv_format)
  row = Filled(storage, 1)
  hidden_MS = np.random.default_rng(3).random((M, CONTEXT)) < 0.5
  for hidden in (None, hidden_MS):
    k_MSKH, v_MSKH, seen_MS = storage.read(*row.rows(hidden_MS=hidden))
    written_MS = np.arange(CONTEXT)[None, :] < LENGTH_M[:, None]
    np.testing.assert_array_equal(seen_MS, written_MS if hidden is None else written_MS & ~hidden)
    for got, expected in ((k_MSKH, row.k_MSKH), (v_MSKH, row.v_MSKH)):
      assert got.dtype == jnp.float32
      if kv_format == "bfloat16":
        expected = np.asarray(jnp.asarray(expected).astype(jnp.bfloat16).astype(jnp.float32))
      np.testing.assert_array_equal(np.asarray(got)[written_MS], expected[written_MS])
      assert (np.asarray(got)[~written_MS] == 50).all(), "an entry that nobody wrote"


def test_a_write_past_the_end_is_dropped(storage_of):
  storage = storage_of(2)
  before = Filled(storage, 1).buffer
  num_pages = before.k.shape[0]
  one = jnp.ones((3, 2, H))
  page_M = jnp.array([num_pages, num_pages + 7, num_pages])
  after = storage.write(before, page_M, jnp.array([0, 1, storage.page_size - 1]), one, one)
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
    np.testing.assert_array_equal(old, new)


def test_rows_do_not_see_each_other(storage_of):
  """A row's result is the same to the bit, whatever its group holds."""
  storage = storage_of(2)
  row = Filled(storage, 1)
  q_MNH = jnp.asarray(np.random.default_rng(9).normal(size=(M, 4, H)), jnp.float32)
  attend = jax.jit(storage.attend)
  alone_M = np.where(np.arange(M) == 3, LENGTH_M, 0)
  np.testing.assert_array_equal(attend(q_MNH, [row.rows()])[3], attend(q_MNH, [row.rows(alone_M)])[3])


@pytest.mark.parametrize("num, cuts", [(0, ()), (1, (1, 5)), (5, (1, 5, 10)), (8, ()), (9, (10, 15)), (17, (5,)), (M, ())])
def test_rows_in_use_are_read_as_all_are(storage_of, num, cuts):
  """By groups of whatever size, the last of which overlaps the one before; the rows behind them mean nothing."""
  storage, rng = storage_of(2), np.random.default_rng(3)
  filled, length_M = Filled(storage, 0), np.where(np.arange(M) < num, rng.integers(1, CONTEXT, M), 0)
  q_MNH, part = jnp.asarray(rng.normal(size=(M, 4, H)), jnp.float32), filled.rows(length_M)
  got_MNH = jax.jit(lambda num: storage.attend(q_MNH, [part], cuts, num))(jnp.int32(num))
  expected_MNH = storage.attend(q_MNH, [part])
  np.testing.assert_allclose(got_MNH[:num], expected_MNH[:num], rtol=0, atol=1e-6)
