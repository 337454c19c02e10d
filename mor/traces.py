"""How deep each token goes: the number of recursion steps that process it.

Depth belongs to the token that is read, on the way to predicting the next one,
and is decided causally, as in generation.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor import types
from mor.model import transformer


@functools.partial(jax.jit, static_argnums=0)
def depth(model: config_lib.ModelConfig, variables: Mapping[str, Any], tokens_BT: types.Tokens,
          segment_BT: types.Segments) -> jax.Array:
  """Recursion steps `[B, T]` of each token; 0 on padding."""
  out = transformer.Transformer(model).apply(
      variables, tokens_BT, segment_BT, routing="decide", key=jax.random.key(0))
  return jnp.sum(out.keep_RBT, axis=0, dtype=jnp.int32) * (segment_BT != 0)


def depth_of_ids(model: config_lib.ModelConfig, variables: Mapping[str, Any], ids: np.ndarray,
                 seq_len: int) -> np.ndarray:
  """Depths of one text of any length; every `seq_len` tokens are read afresh."""
  num_rows = max(1, -(-len(ids) // seq_len))
  padded = np.zeros(num_rows * seq_len, np.int32)
  padded[:len(ids)] = ids
  valid = np.arange(len(padded)) < len(ids)
  depths = [depth(model, variables, jnp.asarray(row_1T), jnp.asarray(valid_1T, jnp.int32))
            for row_1T, valid_1T in zip(padded.reshape(-1, 1, seq_len), valid.reshape(-1, 1, seq_len))]
  return np.concatenate([np.asarray(d)[0] for d in depths])[:len(ids)]
