"""Confidence measures by hand and by property."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mor.exits import confidence

B, D, V = 3, 20, 61
OF_LOGITS = ("margin", "maximum", "entropy")
MEASURES = {name: jax.jit(measure) for name, measure in confidence.MEASURES.items()}


def of_logits(name, logits_BV):
  return np.asarray(MEASURES[name](confidence.Exit(logits_BV=jnp.asarray(logits_BV, jnp.float32))))


def full(seed=0, num=B, **changes):
  """An exit that every measure can look at."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  logits_BV = draw(num, V) * 3
  fields = dict(logits_BV=logits_BV, token_B=jnp.argmax(logits_BV, axis=-1), hidden_BD=draw(num, D),
                previous_token_B=jnp.asarray(rng.integers(0, V, num)), previous_hidden_BD=draw(num, D))
  return confidence.Exit(**{**fields, **changes})


def test_measures_by_hand():
  p_BV = np.array([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.6, 0.1], [0.4, 0.4, 0.1, 0.1]])
  np.testing.assert_allclose(of_logits("margin", np.log(p_BV)), [0.25, 0.4, 0.0], atol=1e-6)
  np.testing.assert_allclose(of_logits("maximum", np.log(p_BV)), [0.5, 0.6, 0.4], atol=1e-6)
  # 1.75 bits of 2; the others by the definition.
  expected_B = 1 - scipy.special.entr(p_BV).sum(axis=1) / np.log(4)
  np.testing.assert_allclose(of_logits("entropy", np.log(p_BV)), expected_B, atol=1e-6)
  assert of_logits("entropy", np.log(p_BV))[0] == pytest.approx(0.125)
  hidden_BD = jnp.array([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0], [1e30, 1e30]])
  previous_BD = jnp.array([[4.0, 3.0], [0.0, 2.0], [-5.0, -5.0], [1e-30, 0.0]])
  at = confidence.Exit(
      hidden_BD=hidden_BD, previous_hidden_BD=previous_BD, token_B=jnp.array([5, 6, 0, -1]),
      previous_token_B=jnp.array([5, 5, -1, -1]))
  np.testing.assert_allclose(MEASURES["saturation"](at), [0.96, 0, 0, np.sqrt(0.5)], atol=1e-6)
  assert list(MEASURES["agreement"](at)) == [1, 0, 0, 0]


@pytest.mark.parametrize("name", MEASURES)
def test_in_range_and_of_one_kind(name):
  for seed, scale in itertools.product(range(3), (1e-3, 1.0, 1e4)):
    at = full(seed, num=50)
    at = at.replace(logits_BV=at.logits_BV * scale, hidden_BD=at.hidden_BD * scale,
                    previous_token_B=at.token_B * jnp.asarray(np.arange(50) % 2))
    confidence_B = MEASURES[name](at)
    assert confidence_B.shape == (50,) and confidence_B.dtype == jnp.float32
    assert np.all((confidence_B >= 0) & (confidence_B <= 1))
    assert np.ptp(confidence_B) > 0 or scale != 1.0


@pytest.mark.parametrize("name", MEASURES)
def test_bfloat16_is_read_in_float32(name):
  """A bfloat16 input gives what its float32 copy gives."""
  narrow = full(num=50)
  cast = lambda at, dtype: jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, at)
  narrow = cast(narrow, jnp.bfloat16)
  wide = cast(narrow, jnp.float32)
  np.testing.assert_allclose(MEASURES[name](narrow), MEASURES[name](wide), atol=1e-6)
  assert MEASURES[name](narrow).dtype == jnp.float32


@pytest.mark.parametrize("name", OF_LOGITS)
def test_of_logits_properties(name):
  """A shift, an order or tokens that are none change nothing; sharper is surer; even is 0 or 1 / V; one token is 1."""
  logits_BV = np.random.default_rng(0).normal(size=(B, V)) * 3
  plain_B = of_logits(name, logits_BV)
  np.testing.assert_allclose(of_logits(name, logits_BV + 50), plain_B, atol=1e-5)
  np.testing.assert_allclose(of_logits(name, logits_BV[:, ::-1]), plain_B, atol=1e-6)
  padded_BV = np.insert(logits_BV, [0, 9, V], -np.inf, axis=1)
  np.testing.assert_allclose(of_logits(name, padded_BV), plain_B, atol=1e-6)
  rising = [of_logits(name, logits_BV * k) for k in (0.25, 0.5, 1.0, 2.0, 8.0)]
  assert np.all(np.diff(rising, axis=0) > 0)
  even = {"margin": 0, "maximum": 1 / V, "entropy": 0}[name]
  np.testing.assert_allclose(of_logits(name, np.full((B, V), 1.7)), even, atol=1e-6)
  np.testing.assert_allclose(of_logits(name, np.where(np.arange(V) == 4, 1.7, -np.inf)[None]), 1.0)


@pytest.mark.parametrize("name", MEASURES)
def test_dead_rows_are_unsure_and_alone(name):
  """Rows of -inf, NaN, +inf or 0 give 0, and their neighbours what they give without them."""
  bad = {"none": -np.inf, "nan": np.nan, "inf": np.inf}
  at = full(num=B + len(bad))
  at = at.replace(previous_token_B=at.token_B.at[1].set(60))
  for row, value in enumerate(bad.values(), B):
    state = np.nan if np.isinf(value) and value > 0 else value
    at = at.replace(
        logits_BV=at.logits_BV.at[row].set(value), token_B=at.token_B.at[row].set(-1),
        hidden_BD=at.hidden_BD.at[row].set(0.0 if row == B else state),
        previous_hidden_BD=at.previous_hidden_BD.at[row].set(0.0 if row == B else state))
  confidence_B = np.asarray(MEASURES[name](at))
  alone = jax.tree.map(lambda a: a[:B] if a.ndim and len(a) == B + len(bad) else a, at)
  np.testing.assert_allclose(confidence_B[:B], MEASURES[name](alone), atol=1e-6)
  assert np.all(confidence_B[B:] == 0)


def test_margin_is_exact_near_a_tie():
  """p1 - p2 of two tokens is tanh(gap / 2), to a relative 1e-5 of a small one."""
  for gap in (1e-4, 1e-2, 1.0):
    assert of_logits("margin", [[gap, 0.0]])[0] == pytest.approx(np.tanh(np.float32(gap) / 2), rel=1e-5)


@pytest.mark.parametrize("name,fields", [
    ("margin", "logits_BV"), ("maximum", "logits_BV"), ("entropy", "logits_BV"),
    ("saturation", "hidden_BD, previous_hidden_BD"), ("agreement", "token_B, previous_token_B"),
])
def test_only_what_is_named_is_needed(name, fields):
  given = {field: getattr(full(), field) for field in fields.split(", ")}
  np.testing.assert_allclose(confidence.MEASURES[name](confidence.Exit(**given)), MEASURES[name](full()), rtol=1e-5)
  with pytest.raises(ValueError, match=f"{name}' needs {fields}; "):
    confidence.MEASURES[name](confidence.Exit())
