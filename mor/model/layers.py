"""The leaves of the decoder: norm, rotary embedding, SwiGLU.

Parameters are float32; each layer computes in `dtype`. Variances and rotations
are float32 always.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor import model_config
from mor import types
from mor.model import lora as lora_lib


def rms_norm(x_BTD: types.Activations, scale_D: jax.Array, eps: float) -> types.Activations:
  """x / rms(x) * scale, the mean of squares in float32."""
  x32_BTD = x_BTD.astype(jnp.float32)
  inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + eps)
  return (x32_BTD * inverse_BT1 * scale_D[None, None, :]).astype(x_BTD.dtype)


def rotation(position_BT: types.Positions, config: model_config.ModelConfig) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine `[B, T, 1, H / 2]` of every position's rotary angles, in float32."""
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
  """Rotary embedding in the half-split layout (RoFormer; Hugging Face Llama)."""
  cos_BT1H, sin_BT1H = rotation_BT1H
  low_BTNH, high_BTNH = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  rotated_BTNH = jnp.concatenate(
      [low_BTNH * cos_BT1H - high_BTNH * sin_BT1H, high_BTNH * cos_BT1H + low_BTNH * sin_BT1H], axis=-1)
  return rotated_BTNH.astype(x_BTNH.dtype)


class SwiGLU(nn.Module):
  """down(silu(gate(x)) * up(x)), each with its step's delta."""

  d_ff: int
  std: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTD: types.Activations, lora: Mapping[str, Any]) -> types.Activations:
    d_model = x_BTD.shape[-1]
    init = nn.initializers.normal(self.std)
    gate_DF = self.param("gate", init, (d_model, self.d_ff), jnp.float32).astype(self.dtype)
    up_DF = self.param("up", init, (d_model, self.d_ff), jnp.float32).astype(self.dtype)
    down_FD = self.param("down", init, (self.d_ff, d_model), jnp.float32).astype(self.dtype)
    gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, gate_DF) + lora_lib.delta(x_BTD, lora, "gate")
    up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, up_DF) + lora_lib.delta(x_BTD, lora, "up")
    act_BTF = jax.nn.silu(gate_BTF) * up_BTF
    return jnp.einsum("BTF,FD->BTD", act_BTF, down_FD) + lora_lib.delta(act_BTF, lora, "down")
