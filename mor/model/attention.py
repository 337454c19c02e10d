"""Grouped-query attention over a `KVView`, in XLA or by the view's kernel."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor import types
from mor.model import kernels
from mor.model import layers
from mor.model import lora as lora_lib
from mor.model.kv import view as kv_view


def look(q_BTNH: types.Queries, kv: kv_view.KV, view: kv_view.KVView) -> types.Queries:
  """Attention as the view says; rows that see no key mean nothing, but are finite."""
  if view.kernel == "xla":
    return attend(q_BTNH, kv, view.mask_BTS)
  with jax.named_scope("attend"):
    if view.kernel == "splash":
      return kernels.splash(q_BTNH, kv.k_BSKH, kv.v_BSKH, view.segment_BT)
    return kernels.cudnn(q_BTNH, kv.k_BSKH, kv.v_BSKH, view.mask_BTS)


def attend(q_BTNH: types.Queries, kv: kv_view.KV, mask_BTS: types.AttentionMask) -> types.Queries:
  """Softmax attention, logits and softmax in float32.

  A query that sees no key gets the mean of the values, never NaN; such rows are
  padding, and the caller drops them.
  """
  with jax.named_scope("attend"):
    return jax.nn.dot_product_attention(
        q_BTNH, kv.k_BSKH, kv.v_BSKH, mask=mask_BTS[:, None], implementation="xla")


class Attention(nn.Module):
  """Projections around `look`."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  std: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTD: types.Activations, view: kv_view.KVView, base: kv_view.KV | None,
               own: bool, lora: Mapping[str, Any]) -> tuple[types.Activations, kv_view.KV | None]:
    """Attends from x to its own keys, to the base's, or to both.

    Args:
      x_BTD: normalised hidden states of the queries.
      view: what they see.
      base: keys written by an earlier step, if this layer reads any.
      own: whether the layer computes keys for its queries, static.
      lora: the step's deltas of this layer's projections, see `lora.py`.

    Returns:
      The output and the fresh keys (None unless `own`).
    """
    d_model = x_BTD.shape[-1]
    init = nn.initializers.normal(self.std)
    q_DNH = self.param("q", init, (d_model, self.num_heads, self.head_dim), jnp.float32)
    k_DKH = self.param("k", init, (d_model, self.num_kv_heads, self.head_dim), jnp.float32)
    v_DKH = self.param("v", init, (d_model, self.num_kv_heads, self.head_dim), jnp.float32)
    o_NHD = self.param("o", init, (self.num_heads, self.head_dim, d_model), jnp.float32)

    def project(name, w_DNH):
      y_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_DNH.astype(self.dtype))
      return y_BTNH + lora_lib.delta(x_BTD, lora, name).reshape(y_BTNH.shape) if name in lora else y_BTNH

    q_BTNH = project("q", q_DNH)
    q_BTNH = layers.rotate(q_BTNH, view.rotation)
    fresh = None
    if own:
      k_BTKH, v_BTKH = project("k", k_DKH), project("v", v_DKH)
      fresh = kv_view.KV(layers.rotate(k_BTKH, view.rotation), v_BTKH)
    if base is None:
      kv = fresh
    else:
      kv = view.overlay(base, fresh) if own else base
    out_BTNH = look(q_BTNH, kv, view)
    out_BTD = jnp.einsum("BTNH,NHD->BTD", out_BTNH, o_NHD.astype(self.dtype))
    return out_BTD + lora_lib.delta(out_BTNH.reshape(*out_BTNH.shape[:2], -1), lora, "o"), fresh
