"""Prompts through a decoder, a token at a time, and what the whole model says of them.

  variables = decoding.draw(config)
  logits_BTV, depth_BT = decoding.forward(config, variables, tokens_BT)
  decoded = decoding.decode(decoding.decoder(config, "paged"), variables, tokens_BT, chunks)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor.decode import cache as cache_lib
from mor.decode import decoder as decoder_lib
from mor.decode import packed
from mor.decode import prefill as prefill_lib
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.model import transformer
from mor.serve import generate
from tests.helpers import weights as parameters

CONTEXT, PAGE = 12, 4
# Tokens of each row that a prefill takes; row 2 decodes all of its own. The second
# of two chunks sees stored entries, and one program runs both.
CHUNKS = dict.fromkeys(("paged", "gather", "packed_tpu", "packed_gpu"), ((5, 3, 0, 0, 1), (3, 4, 0, 2, 0))) | {
    "dense": ((8, 7, 0, 2, 1),)}
BATCH = 5
STORAGES = {"dense": (storage_lib.Dense, CONTEXT), "paged": (storage_lib.Paged, PAGE), "gather": (storage_lib.Dense, PAGE)} | {
    f"packed_{kernel}": (functools.partial(packed.PackedPages, kernel=kernel), PAGE) for kernel in packed.KERNELS}

prefill = jax.jit(prefill_lib.run, static_argnums=(0, 6))
advance = jax.jit(generate.advance, static_argnums=0, donate_argnums=2)


def draw(config, seed: int = 1) -> dict[str, Any]:
  """Variables in which every part matters, and whose routers split the tokens."""
  params = jax.tree.map(jnp.asarray, parameters.draw(config, seed))
  if config.router.arch == "random":
    params.pop("router", None)
  if config.router.balancing != "loss_free":
    return {"params": params}
  return {"params": params, "balance": {"bias_R": jnp.linspace(0.3, -0.3, config.num_recursions)}}


def tokens(config, batch: int = BATCH, seed: int = 0) -> np.ndarray:
  """Random rows as long as the context."""
  return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, CONTEXT)).astype(np.int32)


def forward(config, variables, tokens_BT) -> tuple[np.ndarray, np.ndarray]:
  """Logits and depths of whole rows, each a batch of its own, routed causally."""
  model = transformer.Transformer(config)

  @jax.vmap
  def row(tokens_T):
    out = model.apply(variables, tokens_T[None], routing="decide")
    return transformer.unembed(variables["params"], out.hidden_BTD)[0], jnp.sum(out.keep_RBT, axis=0)[0]

  logits_BTV, depth_BT = jax.jit(row)(tokens_BT)
  return np.asarray(logits_BTV), np.asarray(depth_BT)


def decoder(config, storage: str, kv_format: str = "float32", router: Any = None) -> decoder_lib.Decoder:
  """A decoder over one of STORAGES."""
  kind, page = STORAGES[storage]
  return decoder_lib.Decoder(config, kind(page, config.num_kv_heads, config.head_dim, kv_format), router)


def make_cache(decoder: decoder_lib.Decoder, batch: int) -> Any:
  """Room for whole rows, in pages that come in no order."""
  pages = CONTEXT // decoder.tables.storage.page_size
  cache = decoder.tables.make_cache(batch, batch * decoder.tables.num_rows * pages, batch * pages, pages)
  shuffle = lambda free, seed: cache_lib.FreePages(jax.random.permutation(jax.random.key(seed), free.page_P), free.num)
  return cache.replace(free=shuffle(cache.free, 1), edge_free=shuffle(cache.edge_free, 2))


def decode(decoder: decoder_lib.Decoder, variables, tokens_BT, chunks, weight_format: str = "float32",
           live_B=None) -> tuple[np.ndarray, np.ndarray]:
  """Prefills the chunks and decodes the rest of every live row.

  Returns:
    Logits, NaN where a token was prefilled, and depths, as `forward` does.
  """
  batch, seq_len = tokens_BT.shape
  weights = weights_lib.prepare(decoder.model, variables, weight_format)
  cache, start_B = make_cache(decoder, batch), np.zeros(batch, np.int32)
  live_B = np.ones(batch, bool) if live_B is None else live_B
  logits_BTV = np.full((batch, seq_len, decoder.model.vocab_size), np.nan, np.float32)
  depth_BT = np.zeros((batch, seq_len), np.int32)
  rows = np.arange(batch)
  width = max(max(lengths) for lengths in chunks)
  for lengths in chunks:
    length_B = np.array(lengths, np.int32) * live_B
    column_BT = start_B[:, None] + np.arange(width)[None, :]
    chunk_BT = tokens_BT[rows[:, None], np.minimum(column_BT, seq_len - 1)]
    pages = CONTEXT // decoder.tables.storage.page_size if len(chunks) > 1 else 0
    cache, chunk_depth_BT, ok = prefill(decoder, weights, cache, chunk_BT, start_B, length_B, pages)
    assert ok, "the pages did not suffice"
    for b in rows:
      depth_BT[b, start_B[b]:start_B[b] + length_B[b]] = chunk_depth_BT[b, :length_B[b]]
    start_B = start_B + length_B
  while (start_B < seq_len)[live_B].any():
    run_B, at_B = live_B & (start_B < seq_len), np.minimum(start_B, seq_len - 1)
    cache, now_BV, now_B = advance(decoder, weights, cache, tokens_BT[rows, at_B], start_B, run_B)
    logits_BTV[rows[run_B], at_B[run_B]] = np.asarray(now_BV)[run_B]
    depth_BT[rows[run_B], at_B[run_B]] = np.asarray(now_B)[run_B]
    start_B = start_B + run_B
  return logits_BTV, depth_BT


def assert_same(got, expected, atol: float = 1e-4, rows=slice(None)) -> None:
  """Equal depths everywhere, and logits where a token was decoded."""
  (logits_BTV, depth_BT), (want_BTV, want_BT) = (tuple(x[rows] for x in pair) for pair in (got, expected))
  np.testing.assert_array_equal(depth_BT, want_BT)
  decoded_BT = ~np.isnan(logits_BTV[:, :, 0])
  assert decoded_BT[:, -1].all(), "nothing was decoded"
  np.testing.assert_allclose(logits_BTV[decoded_BT], want_BTV[decoded_BT], rtol=0, atol=atol)


@functools.cache
def expected(config) -> tuple[dict[str, Any], np.ndarray, tuple[np.ndarray, np.ndarray]]:
  """Variables, tokens, and the whole model's logits and depths, computed once a model."""
  variables, tokens_BT = draw(config), tokens(config)
  return variables, tokens_BT, forward(config, variables, tokens_BT)
