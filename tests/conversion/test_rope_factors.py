"""The divisors of a file's frequencies are those of its config."""

import numpy as np
import pytest

from mor import model_config
from mor.conversion import rope_factors


def divisors(scaling: model_config.RopeScalingConfig, theta: float, half: int) -> np.ndarray:
  """As llama.cpp's converter computes them, branch by branch."""
  found = []
  for frequency in 1.0 / theta ** (np.arange(half) / half):
    wave = 2 * np.pi / frequency
    if wave < scaling.original_context / scaling.high_freq_factor:
      found.append(1.0)
    elif wave > scaling.original_context / scaling.low_freq_factor:
      found.append(scaling.factor)
    else:
      smooth = ((scaling.original_context / wave - scaling.low_freq_factor)
                / (scaling.high_freq_factor - scaling.low_freq_factor))
      found.append(1 / ((1 - smooth) / scaling.factor + smooth))
  return np.array(found, np.float32)


@pytest.mark.parametrize("half", [32, 64])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_comes_back_as_it_was(factor, half):
  scaling = model_config.RopeScalingConfig(factor, 1.0, 4.0, 8192)
  assert rope_factors.scaling(divisors(scaling, 500000.0, half), 500000.0, 8192) == scaling


def test_any_scaling_divides_alike():
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(300):
    low = rng.uniform(0.2, 3.0)
    given = model_config.RopeScalingConfig(float(rng.choice([2.0, 4.0, 8.5])), low, low * rng.uniform(1.05, 5.0),
                                           int(rng.integers(5, 9000)))
    theta, half = float(rng.choice([100.0, 10000.0, 5e5])), int(rng.integers(2, 20))
    wanted_H = divisors(given, theta, half)
    np.testing.assert_allclose(rope_factors.divisors(given, theta, half), wanted_H, rtol=1e-6)
    found = rope_factors.scaling(wanted_H, theta, 8192)
    np.testing.assert_allclose(divisors(found, theta, half) if found.factor > 1 else np.ones(half), wanted_H, rtol=2e-5)
    seen.add(min(int(((wanted_H > 1.001) & (wanted_H < given.factor - 0.001)).sum()), 2))
  assert seen == {0, 1, 2}, "none, one and several frequencies between"


@pytest.mark.parametrize("bad", [
    [1.0, 4.0, 1.0, 4.0], [4.0, 4.0, 1.0, 1.0], [1.0, 2.0, 2.0, 8.0], [0.5, 1.0, 1.0, 4.0], [0.0, 1.0, 2.0, 4.0]])
def test_other_divisors_are_refused(bad):
  with pytest.raises(ValueError, match="Llama 3"):
    rope_factors.scaling(np.array(bad), 10000.0, 8192)
  with pytest.raises(ValueError, match="does not fit rope.freq_base"):
    rope_factors.scaling(np.array([1.0, 4.0]), 1.0, 8192)
