"""Grouped-query attention over a `KVView`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mor import types
from mor.model import layers
from mor.model.kv import base as kv_base


def attend(q_BTNH: types.Queries, kv: kv_base.KV, mask_BTS: types.AttentionMask) -> types.Queries:
  """Softmax attention, logits and softmax in float32.

  A query that sees no key gets the mean of the values, never NaN; such rows are
  padding, and the caller drops them.
  """
  with jax.named_scope("attend"):
    return jax.nn.dot_product_attention(
        q_BTNH, kv.k_BSKH, kv.v_BSKH, mask=mask_BTS[:, None], implementation="xla")


class Attention(nn.Module):
  """Projections around `attend`."""

  num_heads: int
  num_kv_heads: int
  head_dim: int
  std: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BTD: types.Activations, view: kv_base.KVView, base: kv_base.KV | None,
               own: bool) -> tuple[types.Activations, kv_base.KV | None]:
    """Attends from x to its own keys, to the base's, or to both.

    Args:
      x_BTD: normalised hidden states of the queries.
      view: what they see.
      base: keys written by an earlier step, if this layer reads any.
      own: whether the layer computes keys for its queries, static.

    Returns:
      The output and the fresh keys (None unless `own`).
    """
    d_model = x_BTD.shape[-1]
    init = nn.initializers.normal(self.std)
    q_DNH = self.param("q", init, (d_model, self.num_heads, self.head_dim), jnp.float32)
    k_DKH = self.param("k", init, (d_model, self.num_kv_heads, self.head_dim), jnp.float32)
    v_DKH = self.param("v", init, (d_model, self.num_kv_heads, self.head_dim), jnp.float32)
    o_NHD = self.param("o", init, (self.num_heads, self.head_dim, d_model), jnp.float32)

    q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, q_DNH.astype(self.dtype))
    q_BTNH = layers.rotate(q_BTNH, view.rotation)
    fresh = None
    if own:
      k_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, k_DKH.astype(self.dtype))
      v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, v_DKH.astype(self.dtype))
      fresh = kv_base.KV(layers.rotate(k_BTKH, view.rotation), v_BTKH)
    if base is None:
      kv = fresh
    else:
      kv = view.overlay(base, fresh) if own else base
    out_BTNH = attend(q_BTNH, kv, view.mask_BTS)
    return jnp.einsum("BTNH,NHD->BTD", out_BTNH, o_NHD.astype(self.dtype)), fresh
