"""Drawn tokens against sorted distributions, and settings that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mor.decode import sampling
from tests.helpers import platforms

V = 13
sample = jax.jit(sampling.sample, static_argnums=(4, 5))


def draw(logits_MV, settings, index_M=None, seen_MV=None, vocab_size=None, kind=None):
  """Next tokens of rows, as NumPy."""
  logits_MV = jnp.asarray(logits_MV, jnp.float32)
  num, width = logits_MV.shape
  rows = settings if isinstance(settings, sampling.SamplingRows) else sampling.rows(settings)
  seen_MV = jnp.zeros((num, width), bool) if seen_MV is None else jnp.asarray(seen_MV)
  index_M = jnp.zeros(num, jnp.int32) if index_M is None else jnp.asarray(index_M, jnp.int32)
  return np.asarray(sample(logits_MV, rows, seen_MV, index_M, vocab_size or width, kind))


def seeded(s, num):
  """The same settings with the seeds 0, 1, …"""
  rows = jax.tree.map(lambda a: jnp.repeat(a, num), sampling.rows([s]))
  return rows.replace(seed_B=jnp.arange(num, dtype=jnp.uint32))


def softmax(logits_V):
  weight_V = np.exp(np.float64(logits_V) - np.max(logits_V))
  return weight_V / weight_V.sum()


def support(logits_V, s):
  """Tokens that may be drawn, found by sorting; None where rounding could decide."""
  p_V = softmax(logits_V / s.temperature)
  if s.top_k:
    p_V = np.where(p_V >= np.sort(p_V)[::-1][min(s.top_k, len(p_V)) - 1], p_V, 0)
  if s.top_p < 1:
    levels = np.unique(p_V)[::-1]
    mass = np.array([p_V[p_V >= level].sum() for level in levels]) / p_V.sum()
    if np.abs(mass - s.top_p).min() < 1e-4:
      return None
    p_V = np.where(p_V >= levels[np.argmax(mass > s.top_p)], p_V, 0)
  if np.abs(p_V / p_V.max() - s.min_p).min() < 1e-4 and s.min_p:
    return None
  return set(np.flatnonzero((p_V > 0) & (p_V >= s.min_p * p_V.max())))


def test_filters_leave_what_a_sort_leaves():
  """Each token of a set has 1.5 % at least, so 1500 draws miss one of them in 1e-7 of runs."""
  rng, num = np.random.default_rng(0), 1500
  cases = []
  for _ in range(60):
    logits_V = rng.choice([0.0, 0.3, 0.7, 1.2, 1.6], V)  # few values, so ties
    pick = lambda *values: float(rng.choice(values))
    s = dict(temperature=pick(1.0, 1.5), top_k=int(pick(0, 1, 3, 6, 20)), top_p=pick(1.0, 0.05, 0.5, 0.9),
             min_p=pick(0.0, 0.35, 0.8))
    allowed = support(logits_V, sampling.Sampling(**s))
    if allowed:
      cases.append((logits_V, s, allowed))
  assert len(cases) > 40 and len({len(allowed) for _, _, allowed in cases}) > 5
  logits_MV = np.repeat([c[0] for c in cases], num, axis=0)
  settings = [seeded(sampling.Sampling(**c[1]), num) for c in cases]
  rows = jax.tree.map(lambda *a: jnp.concatenate(a), *settings)
  for tokens, (_, s, allowed) in zip(draw(logits_MV, rows).reshape(len(cases), num), cases):
    assert set(tokens) == allowed, s


def test_ties_at_a_threshold_all_stay():
  logits_V = [2.0, 1.0, 1.0, 1.0, 0.0]
  for filters in (dict(top_k=2), dict(top_p=0.6)):
    rows = seeded(sampling.Sampling(temperature=1.0, **filters), 200)
    assert set(draw([logits_V] * 200, rows)) == {0, 1, 2, 3}


def chi_square(tokens, p_V):
  """Probability of tokens as far from the distribution as these."""
  return scipy.stats.chisquare(np.bincount(tokens, minlength=len(p_V)), p_V * len(tokens)).pvalue


def test_draws_follow_the_distribution():
  """Over seeds, and over the tokens of one request. Seeds are fixed; a right sampler fails for 3 in 1e6 of them."""
  logits_V, num = np.random.default_rng(1).normal(size=V), 20000
  rows, p_V = seeded(sampling.Sampling(temperature=0.7), num), softmax(logits_V / 0.7)
  assert chi_square(draw([logits_V] * num, rows), p_V) > 1e-6
  one = rows.replace(seed_B=jnp.full(num, 5, jnp.uint32))
  along = draw([logits_V] * num, one, np.arange(num))
  assert chi_square(along, p_V) > 1e-6
  likely = int(np.argmax(p_V))
  after = along[1:][along[:-1] == likely]  # a token does not depend on the one before it
  assert chi_square(after, p_V) > 1e-6
  assert chi_square(along, softmax(logits_V / 0.75)) < 1e-6, "the test tells temperatures apart"


def test_confirmed_draws_follow_the_models_distribution():
  """Whatever they were drawn from. Seeds are fixed; a right rule fails for 1 in 1e6 of them."""
  rng, num = np.random.default_rng(4), 20000
  logits_V, draft_V = rng.normal(size=V), rng.normal(size=V)
  rows, none_MV = seeded(sampling.Sampling(temperature=0.7), num), jnp.zeros((num, V), bool)
  drawn_M = draw([draft_V] * num, rows)
  logits_MV, draft_MV = (jnp.broadcast_to(jnp.asarray(x_V, jnp.float32), (num, V)) for x_V in (logits_V, draft_V))
  kept_M = sampling.confirm(logits_MV, draft_MV, jnp.asarray(drawn_M), rows, none_MV, jnp.zeros(num, jnp.int32), V)
  assert chi_square(np.asarray(kept_M), softmax(logits_V / 0.7)) > 1e-6
  assert chi_square(drawn_M, softmax(logits_V / 0.7)) < 1e-6, "the drafts are the model's: nothing was shown"
  assert 0.2 < np.mean(np.asarray(kept_M) == drawn_M) < 0.99


def test_a_row_depends_on_its_request_alone():
  rng, num = np.random.default_rng(2), 24
  logits_MV, index_M = rng.normal(size=(num, V)), rng.integers(0, 9, num)
  seen_MV = rng.random((num, V)) < 0.3
  make = lambda i: sampling.Sampling(temperature=[0.0, 1.0, 2.0][i % 3], seed=i, top_k=[0, 4][i % 2],
                                     top_p=[1.0, 0.8][i // 2 % 2], repetition_penalty=[1.0, 1.5][i // 4 % 2])
  rows = [make(i) for i in range(num)]
  together = draw(logits_MV, rows, index_M, seen_MV)
  order = rng.permutation(num)
  moved = draw(logits_MV[order], [rows[i] for i in order], index_M[order], seen_MV[order])
  np.testing.assert_array_equal(moved, together[order])
  part = [draw(logits_MV[i:i + 2], rows[i:i + 2], index_M[i:i + 2], seen_MV[i:i + 2]) for i in range(0, num, 2)]
  np.testing.assert_array_equal(np.concatenate(part), together)
  other = [sampling.Sampling(**{**vars(s), "seed": s.seed + 1000}) for s in rows]
  changed = draw(logits_MV, other, index_M, seen_MV) != together
  assert changed[1::3].any() and not changed[::3].any(), "a seed moves drawn tokens only"


def test_every_kind_that_serves_a_row_gives_its_token():
  """The program that the host picks changes no token; it is picked by what the settings do, not by what they say."""
  rng, num = np.random.default_rng(8), 30
  logits_MV, seen_MV = rng.normal(size=(num, 300)), rng.random((num, 300)) < 0.3
  logits_MV[::7, 5] = np.nan
  made = {"greedy": dict(top_k=3, top_p=0.5), "drawn": dict(temperature=0.9),
          "filtered": dict(temperature=0.9, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.2)}
  assert list(made) == list(sampling.KINDS)
  for name, fields in made.items():
    settings = [sampling.Sampling(**fields, seed=i) for i in range(num)]
    assert {s.kind for s in settings} == {name}
    free = draw(logits_MV, settings, seen_MV=seen_MV)
    assert (free[::7] == sampling.NOT_FINITE).all() and (np.delete(free, np.arange(0, num, 7)) >= 0).all()
    for kind in sampling.KINDS:
      if sampling.serves(kind, name):
        np.testing.assert_array_equal(draw(logits_MV, settings, seen_MV=seen_MV, kind=kind), free, err_msg=kind)
  assert sampling.Sampling(repetition_penalty=1.1).kind == "filtered"


@pytest.mark.parametrize("width", [V, 300])
def test_digits_find_the_thresholds_that_bits_find(width):
  """Bit for bit, for distances of every size, ties, counts and sums, and least amounts that nothing reaches."""
  rng, num = np.random.default_rng(9), 200
  behind_MV = (rng.random((num, width)) * 10.0 ** rng.integers(-30, 30, (num, 1))).astype(np.float32)
  behind_MV[::3] = rng.integers(0, 4, (len(behind_MV[::3]), width))
  behind_MV[:, 2], behind_MV[7::9, 4] = 0.0, np.inf
  bits_MV, weight_MV = jax.lax.bitcast_convert_type(behind_MV, jnp.int32), np.exp(-behind_MV)
  for amount_MV, least_M in ((np.ones((num, width), np.int32), rng.integers(1, width + 3, num, dtype=np.int32)),
                             (weight_MV, np.float32(rng.random(num) * weight_MV.sum(axis=1) * 1.01))):
    found = [np.asarray(jax.jit(find)(bits_MV, amount_MV, least_M))
             for find in (sampling._find_by_bits, sampling._find_by_digits)]
    np.testing.assert_array_equal(*found)
    assert len(set(found[0])) > 20 and found[0].max() == 2**31 - 1, "no amount was out of reach"


@pytest.mark.parametrize("width", [V, 512])
def test_an_accelerator_finds_the_first_greatest_number(width):
  """By `argmax`, with the blocks' rule for ties and for logits that are not finite."""
  logits_MV = np.random.default_rng(10).integers(0, 4, (40, width)).astype(np.float32)
  logits_MV[1, 3], logits_MV[2, 0], logits_MV[3, 5] = np.nan, np.inf, -np.inf
  on_cpu_M = np.asarray(sampling.most_likely(jnp.asarray(logits_MV)))
  with platforms.pretend("gpu"):
    np.testing.assert_array_equal(sampling.most_likely(jnp.asarray(logits_MV)), on_cpu_M)
  assert (on_cpu_M[1:4] == sampling.NOT_FINITE).all() and (on_cpu_M[4:] == logits_MV[4:].argmax(axis=1)).all()


def test_no_temperature_takes_the_first_most_likely_token():
  logits_MV = np.random.default_rng(3).integers(0, 4, (50, V))  # ties
  rows = [sampling.Sampling(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5, seed=i) for i in range(50)]
  np.testing.assert_array_equal(draw(logits_MV, rows), logits_MV.argmax(axis=1))
  rows[7] = sampling.Sampling(temperature=1.0)  # beside a row that draws
  np.testing.assert_array_equal(np.delete(draw(logits_MV, rows), 7), np.delete(logits_MV.argmax(axis=1), 7))
  cold = [sampling.Sampling(temperature=1e-4, seed=i) for i in range(50)]
  apart_MV = np.random.default_rng(3).normal(size=(50, V))
  np.testing.assert_array_equal(draw(apart_MV, cold), apart_MV.argmax(axis=1))


def test_penalty_divides_positive_logits_and_multiplies_negative_ones():
  rng = np.random.default_rng(4)
  logits_MV, seen_MV = rng.normal(size=(600, V)) - 1.7, rng.random((600, V)) < 0.5
  factor_M = rng.choice([1.0, 1.3, 2.0, 0.4], 600)
  penalised_MV = np.where(logits_MV > 0, logits_MV / factor_M[:, None], logits_MV * factor_M[:, None])
  expected_M = np.where(seen_MV, penalised_MV, logits_MV).argmax(axis=1)
  assert (expected_M != logits_MV.argmax(axis=1)).sum() > 30
  rows = [sampling.Sampling(repetition_penalty=float(f)) for f in factor_M]
  np.testing.assert_array_equal(draw(logits_MV, rows, seen_MV=seen_MV), expected_M)


def test_tokens_beyond_the_tokenizer_are_never_drawn():
  logits_MV = np.tile(np.arange(V, dtype=np.float32), (400, 1))
  rows = [sampling.Sampling(temperature=(i % 2) * 2.0, seed=i, top_p=0.9) for i in range(400)]
  tokens = draw(logits_MV, rows, vocab_size=10)
  assert tokens.max() == 9 and set(tokens[::2]) == {9} and len(set(tokens[1::2])) > 2


@pytest.mark.parametrize("vocab_size", [V, 10])
def test_log_probability(vocab_size):
  rng = np.random.default_rng(5)
  logits_MV, token_M = rng.normal(size=(20, V)).astype(np.float32) * 4, rng.integers(0, vocab_size, 20)
  got_M = sampling.log_probability(jnp.asarray(logits_MV), jnp.asarray(token_M), vocab_size)
  expected_M = [np.log(softmax(row_V[:vocab_size])[token]) for row_V, token in zip(logits_MV, token_M)]
  np.testing.assert_allclose(got_M, expected_M, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, value, remedy", [
    ("temperature", float("nan"), "a finite number"),
    ("temperature", float("inf"), "a finite number"),
    ("temperature", -0.1, "0 for the most likely token"),
    ("temperature", "1", "a finite number"),
    ("temperature", True, "a finite number"),
    ("top_k", -1, "0 for off"),
    ("top_k", 2**31, "0 for off"),
    ("top_k", 2.0, "an integer"),
    ("top_p", 0.0, r"a fraction in \(0, 1\]"),
    ("top_p", 1.1, r"a fraction in \(0, 1\]"),
    ("top_p", float("nan"), "a finite number"),
    ("min_p", -0.1, r"a fraction in \[0, 1\]"),
    ("min_p", 1.1, r"a fraction in \[0, 1\]"),
    ("repetition_penalty", 0.0, "a positive factor"),
    ("repetition_penalty", float("nan"), "a finite number"),
    ("repetition_penalty", 1e-46, "a positive factor of 1e-30 to 1e\\+30, 1 for off"),
    ("repetition_penalty", 1e-31, "a positive factor of 1e-30 to 1e\\+30, 1 for off"),
    ("seed", -1, "0 to 4294967295"),
    ("seed", 2**32, "0 to 4294967295"),
    ("seed", None, "an integer"),
])
def test_bad_settings_are_refused_with_their_remedy(name, value, remedy):
  settings = object.__new__(sampling.Sampling)  # past the tests' own check of types
  for key, default in vars(sampling.Sampling()).items():
    object.__setattr__(settings, key, value if key == name else default)
  with pytest.raises(ValueError, match=f"^{name}=.*; use {remedy}") as error:
    settings.__post_init__()
  assert repr(value) in str(error.value)


LIKELIEST = [  # settings that leave one token, if no other has the same logit
    dict(min_p=1.0), dict(min_p=1 - 1e-12), dict(top_p=1e-30), dict(top_p=1e-38), dict(top_p=1e-40), dict(top_p=1e-46),
    dict(top_p=5e-324), dict(top_k=1), dict(temperature=1e-30), dict(temperature=1e-38), dict(temperature=1e-40),
    dict(temperature=1e-46), dict(temperature=1e30, min_p=1.0, top_k=2**31 - 1, seed=2**32 - 1),
    dict(temperature=1e30, top_p=1e-38), dict(min_p=1.0, top_p=1e-38, top_k=1), dict(min_p=1.0, top_p=1 - 1e-12)]


@pytest.mark.parametrize("width", [V, 257, 300])
def test_extreme_filters_leave_the_likeliest_token(width):
  """Alone and beside other rows, with and without a penalty at its ends, for logits of every size."""
  rng = np.random.default_rng(6)
  settings, logits, seen = [], [], []
  for i, filters in enumerate(LIKELIEST * 8):
    penalty = [1.0, 1e-30, 0.7, 1.3, 1e30][i % 5]
    settings.append(sampling.Sampling(**{"temperature": 0.7, "seed": i, "repetition_penalty": penalty} | filters))
    logits.append(rng.normal(size=width) * [1.0, 30.0, 1e-3, 1e6][i // 4 % 4] - [0.0, 4.0][i % 2])
    seen.append(rng.random(width) < 0.3)
  logits_MV, seen_MV = np.float32(logits), np.array(seen)
  factor_M1 = np.float32([[s.repetition_penalty] for s in settings])
  with np.errstate(over="ignore"):
    weighed_MV = np.where(seen_MV, np.where(logits_MV > 0, logits_MV / factor_M1, logits_MV * factor_M1), logits_MV)
  together = draw(logits_MV, settings, seen_MV=seen_MV)
  assert (weighed_MV[np.arange(len(settings)), together] == weighed_MV.max(axis=1)).all()
  for at in (slice(0, 1), slice(3, 4), slice(5, 8)):
    np.testing.assert_array_equal(draw(logits_MV[at], settings[at], seen_MV=seen_MV[at]), together[at])


def test_sums_that_are_rounded_reach_a_token():
  """The greatest uniform number, and sums that fall behind the last token that has a weight."""
  weight_MV = np.zeros((300, 257), np.float32)
  weight_MV[:, 3:200] = np.random.default_rng(7).random((300, 197)) * 0.9 + 1e-6
  uniform_M = jnp.full(300, 1 - 2.0**-24, jnp.float32)
  assert (weight_MV[np.arange(300), np.asarray(sampling._invert(jnp.asarray(weight_MV), uniform_M))] > 0).all()


def test_huge_temperature_draws_from_all_that_a_filter_leaves():
  logits_V = np.arange(V, dtype=np.float32)
  for filters, left in ((dict(top_k=4), 4), (dict(top_k=1000), V), ({}, V)):
    rows = seeded(sampling.Sampling(temperature=1e30, **filters), 400)
    assert set(draw([logits_V] * 400, rows)) == set(range(V - left, V))
