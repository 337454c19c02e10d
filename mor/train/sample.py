"""A plain sampler: the whole window again for every token.

The reference for cached decoding: no cache, one jitted forward pass with causal
routing per token, over a buffer of `seq_len` positions. A text longer than the
buffer is continued from its last `seq_len` tokens (positions restart at 0), so
the cost of a token is that of a window.
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


def generate(config: config_lib.Config, variables: Mapping[str, Any], tokenizer: Any, prompt: str, max_tokens: int,
             temperature: float, seed: int) -> np.ndarray:
  """Continues `prompt` and returns the ids of all of it.

  Args:
    config: the experiment.
    variables: {"params": …} and, where the model has one, {"balance": …}.
    tokenizer: of the training data.
    prompt: text; it opens a document.
    max_tokens: new tokens at most; the end of the document stops earlier.
    temperature: 0 takes the most likely token.
    seed: of the draws.

  Returns:
    Ids: the document's opening token, the prompt, the new tokens.

  Raises:
    ValueError: `max_tokens` or `temperature` is negative.
  """
  if max_tokens < 0 or temperature < 0:
    raise ValueError(f"max_tokens={max_tokens}, temperature={temperature}; use values >= 0")
  seq_len, key = config.data.seq_len, jax.random.key(seed)
  ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
  for i in range(max_tokens):
    window = ids[-seq_len:]
    tokens_1T = np.zeros((1, seq_len), np.int32)
    tokens_1T[0, :len(window)] = window
    token = int(_next(config.model, tokenizer.vocab_size, variables, jnp.asarray(tokens_1T),
                      jnp.int32(len(window)), jnp.float32(temperature), jax.random.fold_in(key, i)))
    if token == tokenizer.eos_id:
      break
    ids.append(token)
  return np.asarray(ids, np.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next(model: config_lib.ModelConfig, vocab_size: int, variables: Mapping[str, Any], tokens_1T: types.Tokens,
          length: jax.Array, temperature: jax.Array, key: jax.Array) -> jax.Array:
  """The token after the first `length` ones."""
  segment_1T = (jnp.arange(tokens_1T.shape[1]) < length).astype(jnp.int32)[None]
  out = transformer.Transformer(model).apply(
      variables, tokens_1T, segment_1T, routing="decide", key=jax.random.key(0))
  last_11D = jax.lax.dynamic_slice_in_dim(out.hidden_BTD, length - 1, 1, axis=1)
  logits_V = transformer.unembed(variables["params"], last_11D)[0, 0]
  # The model's vocabulary may be rounded up beyond the tokenizer's.
  logits_V = jnp.where(jnp.arange(model.vocab_size) < vocab_size, logits_V, -jnp.inf)
  drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)
