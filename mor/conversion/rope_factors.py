"""The divisors of rotary frequencies that a scaling of Llama 3 means, and the scaling from its divisors.

A GGUF file of Llama 3 says what each frequency is divided by (`rope_freqs.weight`), not
the four numbers of the config that it was made from. With x_i turns per position of frequency i,
1 / divisor_i = s_i + (1 - s_i) / factor (as `layers.rotation` multiplies it), where

  s_i = clip((original_context * x_i - low) / (high - low), 0, 1)

is a line in x_i between 0 and 1. The line is found from the divisors, and then any original context
gives low and high; the one of the file, or 8192, gives those of the config.

Source: llama.cpp convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors.
"""

import numpy as np

from mor import model_config

_TOLERANCE = 1e-5  # of a divisor


def divisors(given: model_config.RopeScalingConfig, rope_theta: float, num: int) -> np.ndarray:
  """Returns what a scaling divides each of `num` frequencies by, highest frequency first."""
  turns_H = given.original_context * rope_theta ** (-np.arange(num) / num) / (2 * np.pi)
  kept_H = np.clip((turns_H - given.low_freq_factor) / (given.high_freq_factor - given.low_freq_factor), 0.0, 1.0)
  return 1.0 / (kept_H + (1.0 - kept_H) / given.factor)


def scaling(divisors_H: np.ndarray, rope_theta: float, context: int) -> model_config.RopeScalingConfig:
  """Returns the scaling that divides the frequencies so.

  Args:
    divisors_H: divisor of each frequency, highest frequency first.
    rope_theta: base of the frequencies.
    context: positions that the model was trained on before, as far as known.

  Raises:
    ValueError: no scaling of Llama 3 does.
  """
  divisors_H = np.asarray(divisors_H, np.float64)
  turns_H = max(rope_theta, 0.0) ** (-np.arange(len(divisors_H)) / len(divisors_H)) / (2 * np.pi)
  if not (np.diff(turns_H) < 0).all():
    raise ValueError(f"it does not fit rope.freq_base={rope_theta}")
  factor = _round(divisors_H.max())
  if np.allclose(divisors_H, 1.0, rtol=0, atol=_TOLERANCE):
    return model_config.RopeScalingConfig()
  if not divisors_H.min() > 1 - _TOLERANCE:
    raise ValueError("a frequency is raised, which no Llama 3 does")
  kept_H = np.clip((1 / divisors_H - 1 / factor) / (1 - 1 / factor), 0.0, 1.0)
  slope, offset = _line(turns_H, kept_H)
  if not (slope > 0 and offset > 0):
    raise ValueError("its divisors are not those of a Llama 3")
  low, high = (_round(context * (s + offset) / slope) for s in (0.0, 1.0))
  found = model_config.RopeScalingConfig(factor=factor, low_freq_factor=low, high_freq_factor=high,
                                         original_context=context)
  if not np.allclose(divisors(found, rope_theta, len(divisors_H)), divisors_H, rtol=_TOLERANCE, atol=0):
    raise ValueError("its divisors are not those of a Llama 3")
  return found


def _line(turns_H: np.ndarray, kept_H: np.ndarray) -> tuple[float, float]:
  """Returns slope and offset of s = slope * x - offset, offset > 0, that is clipped to `kept_H`."""
  between_H = (kept_H > 1e-4) & (kept_H < 1 - 1e-4)
  whole = turns_H[kept_H >= 1 - 1e-4].min(initial=np.inf)  # the slowest that stays
  none = turns_H[kept_H <= 1e-4].max(initial=0.0)  # the fastest that is divided by all of the factor
  if between_H.sum() > 1:
    ends = np.flatnonzero(between_H)[[0, -1]]
    slope = float(np.diff(kept_H[ends])[0] / np.diff(turns_H[ends])[0])
    return slope, slope * turns_H[ends[0]] - kept_H[ends[0]]
  if between_H.any():
    x, s = float(turns_H[between_H][0]), float(kept_H[between_H][0])
    slope = 1.5 * max(s / (x - none), (1 - s) / (whole - x))
    return slope, slope * x - s
  start = none * 1.01 if np.isinf(whole) else none + (whole - none) / 3
  end = 2 * start if np.isinf(whole) else none + (whole - none) * 2 / 3
  return 1 / (end - start), start / (end - start)


def _round(number: float) -> float:
  """Returns the number of five digits that a float32 of it comes from, or the number."""
  short = float(f"{number:.5g}")
  return short if abs(short - number) < 1e-6 * abs(number) else float(number)
