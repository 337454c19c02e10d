"""One pre-norm decoder layer: x + attention(norm(x)), then x + swiglu(norm(x))."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import types
from mor.model import attention
from mor.model import layers
from mor.model.kv import view as kv_view


class Block(nn.Module):
  """A Llama layer. Its parameters may be one row of a stack used many times."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, x_BTD: types.Activations, view: kv_view.KVView, base: kv_view.KV | None = None,
               own: bool = True, lora: Mapping[str, Any] | None = None) -> tuple[types.Activations, kv_view.KV | None]:
    """See `attention.Attention`; returns the new hidden states and the fresh keys."""
    c, lora = self.config, lora or {}
    dtype = jnp.dtype(c.compute_dtype)
    ones = nn.initializers.ones_init()
    attention_norm_D = self.param("attention_norm", ones, (c.d_model,), jnp.float32)
    ffw_norm_D = self.param("ffw_norm", ones, (c.d_model,), jnp.float32)
    with jax.named_scope("attention"):
      out_BTD, fresh = attention.Attention(
          c.num_heads, c.num_kv_heads, c.head_dim, c.init_std, dtype, name="attention")(
              layers.rms_norm(x_BTD, attention_norm_D, c.norm_eps), view, base, own, lora.get("attention", {}))
      x_BTD = x_BTD + out_BTD
    with jax.named_scope("ffw"):
      ffw = layers.SwiGLU(c.d_ff, c.init_std, dtype, name="ffw")
      x_BTD = x_BTD + ffw(layers.rms_norm(x_BTD, ffw_norm_D, c.norm_eps), lora.get("ffw", {}))
    return x_BTD, fresh
