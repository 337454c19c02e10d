"""The elementary operations of a decoder layer: norm and rotary embedding.

Variances and rotations are computed in float32, whatever the type of the computation.
"""

import jax
import jax.numpy as jnp

from mor import model_config
from mor import types


def rms_norm(x_BTD: types.Activations | types.Queries, scale_D: jax.Array,
             eps: float) -> types.Activations | types.Queries:
  """Returns x / rms(x) * scale over the last axis, the mean of squares in float32.

  Args:
    x_BTD: hidden states, or the heads [B, T, N, H] of queries or keys.
    scale_D: weight of each number.
    eps: added to the mean of squares.
  """
  x32_BTD = x_BTD.astype(jnp.float32)
  inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + eps)
  scale_11D = jnp.expand_dims(scale_D, tuple(range(x_BTD.ndim - 1)))
  return (x32_BTD * inverse_BT1 * scale_11D).astype(x_BTD.dtype)


def rotation(position_BT: types.Positions, config: model_config.ModelConfig) -> tuple[jax.Array, jax.Array]:
  """Returns cosine and sine `[B, T, 1, H / 2]` of the rotary angles of every position, in float32."""
  half, scaling = config.head_dim // 2, config.rope_scaling
  frequency_H = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  if scaling.factor != 1.0:
    turns_H = scaling.original_context * frequency_H / (2 * jnp.pi)
    kept_H = (turns_H - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept_H = jnp.clip(kept_H, 0.0, 1.0)
    frequency_H = frequency_H * (kept_H + (1.0 - kept_H) / scaling.factor)
  angle_BT1H = position_BT.astype(jnp.float32)[:, :, None, None] * frequency_H[None, None, None, :]
  return jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)


def rotate(x_BTNH: types.Queries, rotation_BT1H: tuple[jax.Array, jax.Array]) -> types.Queries:
  """Turns the two halves of each head against each other (RoFormer; the layout of Hugging Face's Llama)."""
  cos_BT1H, sin_BT1H = rotation_BT1H
  low_BTNH, high_BTNH = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated_BTNH = jnp.concatenate(
      [low_BTNH * cos_BT1H - high_BTNH * sin_BT1H, high_BTNH * cos_BT1H + low_BTNH * sin_BT1H], axis=-1)
  return rotated_BTNH.astype(x_BTNH.dtype)
