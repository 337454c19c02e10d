"""Every storage against plain attention over lists of entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import storage as storage_lib
from tests.helpers import decoding

M, H, CONTEXT, PAGE = 19, 6, 16, 4  # two groups of eight rows and a rest
KINDS = {name: (kind, CONTEXT if name == "dense" else PAGE) for name, (kind, _) in decoding.STORAGES.items()}
HEADS = {"one_product": (4, 2), "product_by_head": (12, 6)}  # (N, K)
LENGTH_M = np.array([0, 1, 3, 4, 5, 16, 2, 9] + [0] * 8 + [7, 0, 12])


@pytest.fixture(params=KINDS)
def storage_of(request):
  kind, page = KINDS[request.param]
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
  """`seen(m)`: keys and values of query m; `parts` that share a buffer are those that a function returns."""
  q_MNH = np.random.default_rng(9).normal(size=(M, num_heads, H)).astype(np.float32)
  attend = (lambda q_MNH: storage.attend(q_MNH, parts())) if callable(parts) else lambda q_MNH: storage.attend(q_MNH, parts)
  out_MNH = np.asarray(jax.jit(attend)(jnp.asarray(q_MNH)))
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
def test_two_rows_of_one_buffer_and_hidden_entries(storage_of, num_heads, num_kv_heads):
  """As a hybrid plan shows a base and what overlays it; the second row may be empty, the first never is."""
  storage, rng = storage_of(num_kv_heads), np.random.default_rng(3)
  filled, other_M = Filled(storage, 1), rng.permutation(M)
  base_M = np.maximum(LENGTH_M, 1)
  own_M = np.where(LENGTH_M > 0, LENGTH_M[other_M], 0)
  hidden_MS = rng.random((M, CONTEXT)) < 0.5
  hidden_MS[5] = True  # all of the longest row
  other_M[5], own_M[5], own_M[6] = 7, 4, 0

  def seen(m):
    base, own = filled.seen(m, base_M, hidden_MS), filled.seen(other_M[m], {other_M[m]: own_M[m]})
    return tuple(np.concatenate(x) for x in zip(base, own)) if LENGTH_M[m] else ((), ())
  (buffer, base), (_, own) = filled.rows(base_M, hidden_MS), filled.rows(own_M)
  own = own.replace(page_MP=own.page_MP[other_M])
  check(storage, num_heads, lambda: [(buffer, base), (buffer, own)], seen, atol=1e-5)


@pytest.mark.parametrize("num_heads, num_kv_heads", HEADS.values(), ids=HEADS)
def test_bfloat16(storage_of, num_heads, num_kv_heads):
  storage = storage_of(num_kv_heads, "bfloat16")
  row = Filled(storage, 1)
  assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(row.buffer)} == {2}
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
  num_pages = before.num_pages
  one = jnp.ones((3, 2, H))
  page_M = jnp.array([num_pages, num_pages + 7, num_pages])
  after = storage.write(before, page_M, jnp.array([0, 1, storage.page_size - 1]), one, one)
  for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
    np.testing.assert_array_equal(old, new)


def test_a_broken_entry_reaches_the_queries_that_see_it_alone(storage_of):
  """It gives NaN to these, and nothing to others, whose rows its page belongs to later."""
  storage = storage_of(2)
  row, bad, hidden_MS = Filled(storage, 1), jnp.full((3, 2, H), jnp.nan), np.zeros((M, CONTEXT), bool)
  broken = {5: 9, 7: 2, 16: 6}  # the entry of each row
  m = list(broken)
  page_M = row.page_MP[m, [entry // storage.page_size for entry in broken.values()]]
  offset_M = np.array([entry % storage.page_size for entry in broken.values()])
  buffer = storage.write(row.buffer, jnp.asarray(page_M), jnp.asarray(offset_M), bad, bad)
  hidden_MS[7, 2] = True
  length_M = LENGTH_M.copy()
  length_M[16] = 6  # up to the broken entry
  q_MNH = jnp.asarray(np.random.default_rng(9).normal(size=(M, 4, H)), jnp.float32)
  for hidden in (None, hidden_MS):
    _, rows = row.rows(length_M, hidden)
    before_MNH, after_MNH = (np.asarray(jax.jit(lambda q, b: storage.attend(q, [(b, rows)]))(q_MNH, b))
                             for b in (row.buffer, buffer))
    sees_M = np.isin(np.arange(M), [5] if hidden is not None else [5, 7])
    assert np.isnan(after_MNH[sees_M]).all()
    np.testing.assert_array_equal(after_MNH[~sees_M], before_MNH[~sees_M])


def test_rows_do_not_see_each_other(storage_of):
  """A row's result is the same to the bit, whatever its group holds."""
  storage = storage_of(2)
  row = Filled(storage, 1)
  q_MNH = jnp.asarray(np.random.default_rng(9).normal(size=(M, 4, H)), jnp.float32)
  attend = jax.jit(storage.attend)
  alone_M = np.where(np.arange(M) == 3, LENGTH_M, 0)
  np.testing.assert_array_equal(attend(q_MNH, [row.rows()])[3], attend(q_MNH, [row.rows(alone_M)])[3])


@pytest.mark.parametrize("num, cuts", [(0, ()), (1, (1, 5)), (5, (1, 5, 10)), (8, ()), (9, (10, 15)), (17, (5,)), (M, ())])
def test_rows_in_use_are_read_as_all_are(num, cuts):
  """By groups of whatever size, the last of which overlaps the one before; the rows behind them mean nothing."""
  storage, rng = storage_lib.Paged(PAGE, 2, H, "float32"), np.random.default_rng(3)
  filled, length_M = Filled(storage, 0), np.where(np.arange(M) < num, rng.integers(1, CONTEXT, M), 0)
  q_MNH, part = jnp.asarray(rng.normal(size=(M, 4, H)), jnp.float32), filled.rows(length_M)
  got_MNH = jax.jit(lambda num: storage.attend(q_MNH, [part], cuts, num))(jnp.int32(num))
  expected_MNH = storage.attend(q_MNH, [part])
  np.testing.assert_allclose(got_MNH[:num], expected_MNH[:num], rtol=0, atol=1e-6)
