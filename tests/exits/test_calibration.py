"""Thresholds against published values, brute force and fresh draws; what is not shown stays closed."""

import functools
import json
import pickle

import numpy as np
import pytest
import scipy.special
import scipy.stats

from mor.exits import calibration

CLOSED = {"beta_mixture": calibration.beta_mixture, "learn_then_test": calibration.learn_then_test}
ALIKE = np.linspace(0.05, 0.95, 200)  # confidences that tell nothing, where both classes have them


def draw(share, num, seed=0, right=(8, 2), wrong=(3, 4)):
  """Well separated: Betas of mean 0.80 (agreed) and 0.43 (not)."""
  rng = np.random.default_rng(seed)
  agreed_M = rng.random(num) < share
  return np.where(agreed_M, rng.beta(*right, num), rng.beta(*wrong, num)), agreed_M


@pytest.mark.parametrize("share", [0.8, 0.5])
def test_paper_threshold_ignores_the_base_rate(share):
  """The published 0.633 for both shares, on the separated Betas of `draw`."""
  for seed in range(5):
    assert calibration.beta_mixture_paper(*draw(share, 4000, seed)) == pytest.approx(0.6333, abs=1e-4)


@pytest.mark.parametrize("confidence,agreed,threshold", [
    (ALIKE, np.zeros(200), 0.3),  # only wrong ones: everything exits
    (ALIKE, np.ones(200), 0.3),
    ([0.9, 0.85, 0.8], [1, 1, 0], 0.3),
    ([0.9, 0.8, 0.6], [0, 0, 0], 0.3),
    (np.full(200, 0.7), np.arange(200) % 5 > 0, 0.9),  # NaN
    ([], [], 0.9),
])
def test_paper_threshold_fails_open(confidence, agreed, threshold):
  assert calibration.beta_mixture_paper(np.array(confidence), np.array(agreed)) == pytest.approx(threshold)


def by_moments(confidence_M, agreed_M):
  mixed = [np.where(agreed_M == k, 0.9995, 0.0005) for k in (0, 1)]
  means = [np.average(confidence_M, weights=w_M) for w_M in mixed]
  sizes = [m * (1 - m) / np.average((confidence_M - m)**2, weights=w_M) - 1 for m, w_M in zip(means, mixed)]
  grid_M = np.linspace(0.3, 0.9, 10)
  density = [scipy.stats.beta.pdf(grid_M, m * s, (1 - m) * s) for m, s in zip(means, sizes)]
  high = int(means[1] > means[0])
  num = np.sum(density[high] / (density[0] + density[1]) > 0.4)
  return grid_M[min(10 - num, 9)]


def test_paper_threshold_is_what_hard_labels_and_moments_give():
  """Written out with SciPy's moments and density, on shapes of every kind; classes take turns in being the surer."""
  rng, seen = np.random.default_rng(0), set()
  for turn in range(100):
    shapes = rng.uniform(1.5, 12, 4)
    confidence_M, agreed_M = draw(rng.uniform(0.2, 0.8), 500, int(rng.integers(1e6)), shapes[:2], shapes[2:])
    if turn % 5 == 0:
      confidence_M = np.round(confidence_M)  # 0 and 1, where moments alone have no Beta
    expected = by_moments(np.clip(confidence_M, 1e-4, 1 - 1e-4), agreed_M)
    assert calibration.beta_mixture_paper(confidence_M, agreed_M) == pytest.approx(expected)
    seen.add(round(expected, 3))
  assert len(seen) >= 8


@pytest.mark.parametrize("method", CLOSED.values(), ids=CLOSED)
@pytest.mark.parametrize("confidence,agreed", [
    (ALIKE, np.zeros(200)),
    (np.full(1000, 0.7), np.arange(1000) % 5 > 0),
    (np.full(1000, 1.0), np.arange(1000) % 5 > 0),
    (np.full(1000, 0.7) + np.arange(1000) * 1e-8, np.arange(1000) % 5 == 0),
    ([0.9, 0.85, 0.8], [1, 1, 0]),
    ([0.9, 0.85, 0.8], [1, 1, 1]),
    (np.append(draw(0.8, 4000)[0], np.nan), np.append(draw(0.8, 4000)[1], True)),
    ([], []),
], ids=["wrong", "constant", "ones", "almost_constant", "three", "three_right", "nan", "none"])
@pytest.mark.filterwarnings("error")
def test_what_is_not_shown_stays_closed(method, confidence, agreed):
  assert method(np.array(confidence), np.array(agreed)) == 1.0


@pytest.mark.parametrize("value", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("share", [0.95, 0.05])
def test_constant_confidence_closes_a_mixture_at_any_share(value, share):
  """Even where all exits would be precise enough. A bound on the risk may open then, having no use for a confidence."""
  agreed_M = np.arange(1000) < 1000 * share
  for precision in (0.9, 0.01):
    assert calibration.beta_mixture(np.full(1000, value), agreed_M, precision=precision) == 1.0
  assert calibration.learn_then_test(np.full(1000, 0.7), agreed_M) == (0.0 if share == 0.95 else 1.0)


def test_exits_are_strictly_above_the_threshold():
  """Wrong ones at 0.5, right ones at 0.9 and a grid of 1, 0.5, 0: at 0.5 only the right ones exit."""
  confidence_M, agreed_M = np.repeat([0.5, 0.9], [100, 300]), np.repeat([False, True], [100, 300])
  assert calibration.learn_then_test(confidence_M, agreed_M, num_steps=2) == 0.5
  few = np.repeat([0.5, 0.9], [300, 100]), np.repeat([True, False], [300, 100])
  assert calibration.learn_then_test(*few, delta=0.5, num_steps=1) == 0.0
  confidence_M = np.repeat([0.0, 0.9], [300, 100])  # 0 > 0 is no exit, so all that exit are wrong
  assert calibration.learn_then_test(confidence_M, few[1], delta=0.5, num_steps=1) == 1.0


@pytest.mark.parametrize("method", CLOSED.values(), ids=CLOSED)
def test_separated_confidences_open(method):
  assert 0.3 < method(*draw(0.8, 4000)) < 0.8


def test_right_ones_only():
  """A mixture needs wrong ones to fit; the risk bound does not, at 29 samples: 0.9^29 < 0.05 < 0.9^28."""
  assert calibration.beta_mixture(np.linspace(0.1, 0.9, 5000), np.ones(5000)) == 1.0
  assert calibration.learn_then_test(np.linspace(0.1, 0.9, 29), np.ones(29)) == 0.0
  assert calibration.learn_then_test(np.linspace(0.1, 0.9, 28), np.ones(28)) == 1.0


@pytest.mark.parametrize("share", [0.8, 0.3])
def test_precision_holds_where_the_base_rate_shifts(share):
  """Over 100,000 fresh pairs. 0.9 is promised of every exit, so all of them are well above; see FREE's for contrast."""
  fresh_M, right_M = draw(share, 100_000, seed=99)
  for seed in range(5):
    assert right_M[fresh_M > calibration.beta_mixture(*draw(share, 2000, seed))].mean() > 0.93
  paper = calibration.beta_mixture_paper(*draw(share, 2000))
  assert (right_M[fresh_M > paper].mean() > 0.9) == (share == 0.8)


def test_risk_holds_where_the_base_rate_shifts():
  for share in (0.8, 0.3):
    fresh_M, right_M = draw(share, 100_000, seed=99)
    assert 0.05 < np.mean((fresh_M > calibration.learn_then_test(*draw(share, 2000))) & ~right_M) < 0.1


def test_uninformative_confidence_closes_with_the_base_rate():
  """Both classes alike: all or none can exit, as the share of agreement has it."""
  for share, threshold in [(0.8, 0.0), (0.3, 1.0)]:
    agreed_M = np.arange(2000) % 10 < 10 * share
    confidence_M = np.empty(2000)
    for class_M in (agreed_M, ~agreed_M):
      confidence_M[class_M] = np.linspace(0.05, 0.95, np.sum(class_M))
    assert calibration.beta_mixture(confidence_M, agreed_M, precision=0.7) == threshold


def test_mixture_finds_the_true_crossing():
  """The threshold's standard deviation is 0.003 at 20,000 pairs."""
  true = lambda share: scipy.optimize.brentq(
      lambda x: share * scipy.stats.beta.pdf(x, 8, 2) / (
          share * scipy.stats.beta.pdf(x, 8, 2) + (1 - share) * scipy.stats.beta.pdf(x, 3, 4)) - 0.9, 0.1, 0.99)
  for share in (0.8, 0.5, 0.3):
    assert calibration.beta_mixture(*draw(share, 20_000)) == pytest.approx(true(share), abs=0.015)


def test_betas_are_the_most_likely():
  """Against SciPy's own fit, of samples so many that the prior does not count; then of few, which stay finite."""
  rng = np.random.default_rng(0)
  for shape in [(8, 2), (0.3, 0.4), (60, 25), (1.5, 0.2)]:
    sample_M = np.clip(rng.beta(*shape, 20_000), 1e-4, 1 - 1e-4)
    expected = scipy.stats.beta.fit(sample_M, floc=0, fscale=1)[:2]
    np.testing.assert_allclose(calibration._fit(sample_M), expected, rtol=0.02 if shape == (60, 25) else 2e-3)
  for sample_M in ([0.7], [0.0], [1.0, 1.0], [0.7] * 1000, [0.0, 1.0] * 50):
    alpha, beta = calibration._fit(np.array(sample_M))
    assert 0 < alpha < 1e4 and 0 < beta < 1e4


def test_fit_converges_everywhere():
  """First-order methods stop in the valley of 3 % of these. The optimum has the mean logarithms of its data."""
  rng = np.random.default_rng(0)
  for _ in range(200):
    sample_M = rng.beta(*np.exp(rng.uniform(-3, 5, 2)), int(rng.integers(1, 3000)))
    alpha, beta = calibration._fit(sample_M)
    clipped_M = np.clip(sample_M, 1e-4, 1 - 1e-4)
    digamma = scipy.special.digamma
    for shape, side_M in [(alpha, clipped_M), (beta, 1 - clipped_M)]:
      mean_log = (np.log(side_M).sum() - 2) / (len(side_M) + 2)
      assert digamma(shape) - digamma(alpha + beta) == pytest.approx(mean_log, rel=1e-4, abs=1e-4)


def test_every_higher_confidence_is_sure_too():
  """Wrong ones that outnumber the right at the top close all of it, though 0.8 is sure."""
  confidence_M, agreed_M = draw(0.9, 4000, right=(60, 15), wrong=(6, 1))
  assert np.mean(agreed_M[np.abs(confidence_M - 0.8) < 0.02]) > 0.95
  assert calibration.beta_mixture(confidence_M, agreed_M) == 1.0


def test_data_veto_a_fit():
  """200 wrong ones at 0.9 hide from a Beta whose other 2000 are at 0.2: it would open from 0.85."""
  rng = np.random.default_rng(0)
  right_M = rng.beta(20, 2, 600)  # mean 0.91
  wrong_M = np.concatenate([rng.beta(200, 800, 2000), np.full(200, 0.9)])
  confidence_M, agreed_M = np.append(right_M, wrong_M), np.arange(2800) < 600
  threshold = calibration.beta_mixture(confidence_M, agreed_M)
  assert threshold >= 0.9
  exits_M = confidence_M > threshold
  assert threshold == 1.0 or exits_M.sum() >= 20 and agreed_M[exits_M].mean() > 0.9


def test_minimum_counts():
  """Of right ones, of wrong ones, of exits."""
  few = lambda num_right, num_wrong: (np.append(np.linspace(0.8, 0.95, num_right), np.linspace(0.1, 0.4, num_wrong)),
                                      np.arange(num_right + num_wrong) < num_right)
  assert calibration.beta_mixture(*few(30, 30)) < 1
  assert calibration.beta_mixture(*few(29, 30), minimum=30) == 1
  assert calibration.beta_mixture(*few(30, 29), minimum=30) == 1
  assert calibration.beta_mixture(*few(30, 30), minimum=30) < 1
  mixed = (np.concatenate([np.linspace(0.8, 0.95, 29), np.linspace(0.1, 0.4, 300), np.full(10, 0.85)]),
           np.arange(339) < 29)
  assert calibration.beta_mixture(*mixed, precision=0.2, minimum=29) < 1  # 39 exits
  assert calibration.beta_mixture(*mixed, precision=0.2, minimum=30) == 1
  pairs = draw(0.3, 400, wrong=(4, 4))
  num_exits = int(np.sum(pairs[0] > calibration.beta_mixture(*pairs)))
  assert 20 <= num_exits < 100
  assert calibration.beta_mixture(*pairs, minimum=num_exits) == calibration.beta_mixture(*pairs)
  assert calibration.beta_mixture(*pairs, minimum=num_exits + 1) == 1


def test_p_values_by_hand():
  """No loss: 0.9^n. 5 of 100 at 0.1: exp(-100 KL(0.05 | 0.1)) = 0.188 and e P(Bin <= 5) = e 0.0576 = 0.156."""
  assert calibration.p_value(np.array([0.0]), 29, 0.1)[0] == pytest.approx(0.9**29)
  assert calibration.p_value(np.array([5.0]), 100, 0.1)[0] == pytest.approx(np.e * scipy.stats.binom.cdf(5, 100, 0.1))
  assert calibration.p_value(np.array([4.9]), 100, 0.1)[0] == pytest.approx(np.e * scipy.stats.binom.cdf(5, 100, 0.1))
  assert list(calibration.p_value(np.array([10.0, 50.0, 100.0]), 100, 0.1)) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("num,delta", [(20, 0.1), (50, 0.1), (200, 0.02), (100, 0.5)])
def test_p_values_are_valid(num, delta):
  """P(p <= u) <= u for a risk of delta, summed over all outcomes; no draws."""
  p_M = calibration.p_value(np.arange(num + 1.0), num, delta)
  mass_M = scipy.stats.binom.pmf(np.arange(num + 1), num, delta)
  for level in p_M[p_M < 1]:
    assert mass_M[p_M <= level].sum() <= level * (1 + 1e-9)


def test_risk_bound_holds_in_500_draws():
  """Risk (1 - threshold)^2 / 2 for P(agreed | c) = c of uniform c; delta = 0.1 is broken below 0.553.

  An exact enumeration breaks it in 1.2 % of draws, at 0.55, so over 5 % of 500 in 1.3e-9 of runs.
  """
  rng = np.random.default_rng(0)
  confidence_XM = rng.random((500, 400))
  agreed_XM = rng.random((500, 400)) < confidence_XM
  threshold_X = np.array([calibration.learn_then_test(*pair, delta=0.1, epsilon=0.05)
                          for pair in zip(confidence_XM, agreed_XM)])
  assert np.mean((1 - threshold_X)**2 / 2 <= 0.1) >= 0.95
  assert threshold_X.mean() < 0.68  # and not by never exiting


def test_risk_bound_of_a_real_loss():
  """1 - agreed is the loss: halved, the same exits cost half, as at twice the bound."""
  confidence_M, agreed_M = draw(0.5, 2000)
  half = calibration.learn_then_test(confidence_M, 1 - 0.5 * ~agreed_M, delta=0.1)
  assert half < calibration.learn_then_test(confidence_M, agreed_M, delta=0.1)
  assert np.mean(0.5 * ~agreed_M * (confidence_M > half)) < 0.1


def test_strictness_falls_with_the_bounds():
  pairs = draw(0.5, 2000)
  deltas = [calibration.learn_then_test(*pairs, delta=d) for d in (0.001, 0.02, 0.05, 0.2, 0.6)]
  assert deltas == sorted(deltas, reverse=True) and deltas[0] == 1 and deltas[-1] == 0 and len(set(deltas)) == 5
  epsilons = [calibration.learn_then_test(*pairs, epsilon=e) for e in (1e-9, 0.01, 0.5)]
  assert epsilons == sorted(epsilons, reverse=True) and len(set(epsilons)) == 3
  wanted = [calibration.beta_mixture(*pairs, precision=p) for p in (0.5, 0.8, 0.95, 0.99)]
  assert wanted == sorted(wanted) and len(set(wanted)) == 4
  steps = calibration.learn_then_test(*pairs, num_steps=20)
  assert steps * 20 == pytest.approx(round(steps * 20)) and steps >= calibration.learn_then_test(*pairs)


@pytest.mark.parametrize("method", calibration.METHODS)
def test_ring_keeps_the_newest(method):
  """Uneven updates across the seam give the fit of the last pairs, whatever came before."""
  wanted = calibration.METHODS[method](*draw(0.3, 700, seed=1))
  online = calibration.Calibrator(method, capacity=700, interval=1)
  for pairs in (draw(0.8, 950), draw(0.3, 700, seed=1)):
    for at in range(0, len(pairs[0]), 83):
      online.update(pairs[0][at:at + 83], pairs[1][at:at + 83])
  assert online.threshold == wanted
  offline = calibration.Calibrator(method, capacity=700)
  offline.update(*(np.append(*both) for both in zip(draw(0.8, 950), draw(0.3, 700, seed=1))))
  assert offline.threshold == wanted


def test_fits_every_interval():
  ours = calibration.Calibrator("learn_then_test", capacity=500, interval=200)
  assert ours.threshold == 1.0
  assert calibration.Calibrator("beta_mixture_paper").threshold == pytest.approx(0.9)
  confidence_M, agreed_M = np.linspace(0.1, 0.9, 199), np.ones(199)
  ours.update(confidence_M, agreed_M)
  assert ours.threshold == 1.0
  ours.update(np.array([0.5]), np.array([True]))
  assert ours.threshold == 0.0
  ours.update(confidence_M, np.zeros(199))
  assert ours.threshold == 0.0
  assert ours.refit() == ours.threshold == calibration.learn_then_test(
      np.concatenate([confidence_M, [0.5], confidence_M]), np.concatenate([agreed_M, [1], 0 * agreed_M])) > 0


def test_nan_closes_until_it_leaves_the_ring():
  ours = calibration.Calibrator("beta_mixture", capacity=2000, interval=1)
  ours.update(*draw(0.8, 2000))
  opened = ours.threshold
  ours.update(np.array([np.nan]), np.array([False]))
  assert opened < ours.threshold == 1.0
  ours.update(*draw(0.8, 2000))
  assert ours.threshold == opened


@pytest.mark.parametrize("copy", [
    lambda c: pickle.loads(pickle.dumps(c)),
    lambda c: calibration.Calibrator.restore(json.loads(json.dumps(c.state(), allow_nan=False))),
], ids=["pickle", "json"])
@pytest.mark.parametrize("num", [300, 1000])
def test_copies_go_on_alike(copy, num):
  """With a part of an interval pending, a NaN, and the ring turned over or not."""
  ours = calibration.Calibrator("beta_mixture", capacity=700, interval=256, precision=0.8)
  for at in range(0, num, 90):
    ours.update(*(v_M[at:at + 90] for v_M in draw(0.8, num)))
  ours.update(np.array([np.nan]), np.array([False]))
  theirs = copy(ours)
  assert theirs.threshold == ours.threshold and theirs.options == ours.options
  for seed in range(12):
    for one in (ours, theirs):
      one.update(*draw(0.5, 97, seed))
    assert theirs.threshold == ours.threshold and theirs.state() == ours.state()
  assert ours.threshold < 1


@pytest.mark.parametrize("call,message", [
    (lambda f: f(np.zeros(3), np.zeros(4)), "one length"),
    (lambda f: f(np.zeros((2, 2)), np.zeros((2, 2))), "two vectors"),
    (lambda f: f(np.array([0.2, 1.2]), np.zeros(2)), r"confidence 1.2 at 1; use values in \[0, 1\]"),
    (lambda f: f(np.array([0.2, -np.inf]), np.zeros(2)), "confidence -inf"),
    (lambda f: f(np.zeros(2), np.array([0, -1])), "agreed -1"),
    (lambda f: f(np.zeros(2), np.array([0, np.nan])), "agreed nan at 1"),
])
@pytest.mark.parametrize("method", calibration.METHODS)
def test_bad_pairs_are_refused(method, call, message):
  for entrance in (calibration.METHODS[method], calibration.Calibrator(method).update):
    with pytest.raises(ValueError, match=message):
      call(entrance)


@pytest.mark.parametrize("method,options,message", [
    ("beta_mixture", dict(precision=1.0), "precision=1.0"),
    ("beta_mixture", dict(minimum=1), "minimum=1"),
    ("beta_mixture", dict(num_points=100), "num_points=100"),
    ("learn_then_test", dict(delta=0.0), "delta=0.0"),
    ("learn_then_test", dict(epsilon=1.5), "epsilon=1.5"),
    ("learn_then_test", dict(epsilon=float("nan")), "epsilon=nan"),
    ("learn_then_test", dict(num_steps=0), "num_steps=0"),
    ("learn_then_test", dict(precision=0.9), "no such option"),
    ("platt", {}, "use one of"),
    ("beta_mixture", dict(capacity=10), "interval=256"),
    ("beta_mixture", dict(interval=0), "interval=0"),
])
def test_bad_settings_are_refused(method, options, message):
  with pytest.raises(ValueError, match=message):
    calibration.Calibrator(method, **options)


@pytest.mark.parametrize("method", ["beta_mixture", "beta_mixture_paper"])
def test_mixtures_refuse_losses_between(method):
  for entrance in (calibration.METHODS[method], calibration.Calibrator(method).update):
    with pytest.raises(ValueError, match="neither 0 nor 1"):
      entrance(np.array([0.5]), np.array([0.5]))
  ours = calibration.Calibrator("learn_then_test", interval=100)
  ours.update(np.full(400, 0.5), np.full(400, 0.95))
  assert ours.threshold == 0.0
