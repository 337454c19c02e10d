"""Batched generation: all prompts in one batch, each token through all its steps.

The reference for the engine: a ragged prefill, then a jitted loop whose every turn
decodes one token of every row. A row that left the recursion waits in the batch for
the deepest one, so adaptive depth saves nothing here; see `engine.py`.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from mor.decode import cache as cache_lib
from mor.decode import control
from mor.decode import decoder as decoder_lib
from mor.decode import prefill
from mor.decode import sampling
from mor.decode import slots as slots_lib
from mor.decode import weights as weights_lib
from mor.model import kernels
from mor.serve import request as request_lib
from mor.serve import scheduler
from mor.serve import sizes

_TURNS = 16  # tokens a dispatch decodes


@struct.dataclass
class _State:
  """The batch between dispatches."""

  cache: cache_lib.Cache
  token_B: jax.Array
  position_B: jax.Array
  index_B: jax.Array
  left_B: jax.Array
  seen_BV: jax.Array


def check(request: request_lib.Request, vocab_size: int, context: int) -> None:
  """Refuses what `generate` cannot run; raises ValueError."""
  request.check(vocab_size, context)
  if request.exit != "none":
    raise ValueError(f"exit={request.exit!r}; generate() runs the full depth, use an Engine with exits")


def generate(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, requests: Sequence[request_lib.Request], *,
             context: int, tokenizer: Any = None, vocab_size: int | None = None,
             callback: Callable[[int, request_lib.Event], None] | None = None) -> list[request_lib.Completion]:
  """Continues every prompt.

  Args:
    decoder: of the model; its storage's page must divide the context.
    weights: of the model.
    requests: one row of the batch each.
    context: positions at most.
    tokenizer: for text and stop strings.
    vocab_size: tokens beyond it are never drawn; None is the model's.
    callback: called with the row and the event of each new token.

  Raises:
    ValueError: a request is wrong; none is run then.
  """
  vocab_size = vocab_size or decoder.model.vocab_size
  for request in requests:
    check(request, decoder.model.vocab_size, context)
  followers = [request_lib.Follower(request, tokenizer) for request in requests]
  if not requests:
    return []
  state, rows, stop_BE = _begin(decoder, weights, requests, context)
  while not all(f.completion.finish for f in followers):
    state, tokens_KB, depths_KB, logprobs_KB, finish_KB = _turns(
        decoder, weights, state, rows, stop_BE, vocab_size)
    for k, (tokens_B, depths_B, logprobs_B, finish_B) in enumerate(
        zip(*(np.asarray(x) for x in (tokens_KB, depths_KB, logprobs_KB, finish_KB)))):
      for b, follower in enumerate(followers):
        if follower.completion.finish or tokens_B[b] == -1:
          continue
        if tokens_B[b] == sampling.NOT_FINITE:
          event = follower.end("error", request_lib.NOT_FINITE)
        else:
          event = follower.add(int(tokens_B[b]), int(depths_B[b]), float(logprobs_B[b]),
                               request_lib.FINISH[finish_B[b]])
        if callback:
          callback(b, event)
    ended_B = np.array([bool(f.completion.finish) for f in followers])
    state = state.replace(left_B=jnp.where(ended_B, 0, state.left_B))  # stop strings are seen here only
  return [f.completion for f in followers]


def _begin(decoder, weights, requests, context):
  """Prefills all prompts but their last tokens."""
  length_B = np.array([len(request.prompt) for request in requests])
  width = control.ceil_power(int(length_B.max()) - 1)
  tokens_BT = np.zeros((len(requests), width), np.int32)
  for row_T, request in zip(tokens_BT, requests):
    row_T[:len(request.prompt) - 1] = request.prompt[:-1]
  size = decoder.tables.storage.page_size
  pages = -(-context // size)
  num = len(requests)
  pool = scheduler.Pool(size, decoder.tables.num_rows, num * decoder.tables.num_rows * pages, num * pages)
  sizes.check_memory(decoder, num, pool, pages, _TURNS, jax.devices()[:1])
  cache = decoder.tables.make_cache(num, pool.num_pages, pool.num_edge_pages, pages)
  if length_B.max() > 1:
    cache = _prefill(decoder, weights, cache, tokens_BT, jnp.asarray(length_B - 1, jnp.int32))
  seen_BV = np.zeros((len(requests), decoder.model.vocab_size), bool)
  stop_BE = np.full((len(requests), slots_lib.STOP_TOKENS), -1, np.int32)
  for b, request in enumerate(requests):
    seen_BV[b, list(request.prompt)] = True
    stop_BE[b, :len(request.stop_tokens)] = request.stop_tokens
  state = _State(
      cache=cache,
      token_B=jnp.asarray([request.prompt[-1] for request in requests], jnp.int32),
      position_B=jnp.asarray(length_B - 1, jnp.int32),
      index_B=jnp.zeros(len(requests), jnp.int32),
      left_B=jnp.asarray([request.limit(context) for request in requests], jnp.int32),
      seen_BV=jnp.asarray(seen_BV))
  return state, sampling.rows([request.sampling for request in requests]), jnp.asarray(stop_BE)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
@kernels.full_precision
def _prefill(decoder, weights, cache, tokens_BT, length_B):
  return prefill.run(decoder, weights, cache, tokens_BT, jnp.zeros_like(length_B), length_B, context_pages=0)[0]


def advance(decoder: decoder_lib.Decoder, weights: weights_lib.Weights, cache: cache_lib.Cache, token_B: jax.Array,
            position_B: jax.Array, live_B: jax.Array) -> tuple[cache_lib.Cache, jax.Array, jax.Array]:
  """Runs one token of every live row through the whole model.

  Returns:
    The cache, logits `[B, V]` and the depth of each token.
  """
  cache, _ = decoder.tables.reserve_edge(cache, live_B)
  tokens = cache_lib.one_each(position_B, jnp.zeros_like(token_B), live_B)
  cache, h_BD = decoder.edge("prelude", weights, cache, decoder.embed(weights, token_B), tokens)
  entry_BD, alive_B, depth_B, routed = h_BD, live_B, jnp.zeros_like(token_B), None
  for r in range(decoder.num_steps):
    step_B = jnp.full_like(token_B, r)
    routed = decoder.decide(weights, h_BD, entry_BD, alive_B, position_B, step_B, (r,), routed)
    run_B = decoder.runs(routed.keep_BT[:, 0], alive_B, step_B)
    cache, _ = decoder.tables.reserve_stack(cache, step_B, run_B)
    cache, y_BD = decoder.run_pass(
        weights, cache, h_BD, cache_lib.one_each(position_B, step_B, run_B), static_step=r)
    h_BD, alive_B = decoder.merge(h_BD, y_BD, entry_BD, routed), routed.keep_BT[:, 0]
    depth_B += alive_B.astype(jnp.int32)
  cache, h_BD = decoder.edge("coda", weights, cache, h_BD, tokens)
  return cache, decoder.head(weights, h_BD), depth_B


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
@kernels.full_precision
def _turns(decoder, weights, state, rows, stop_BE, vocab_size):
  """Decodes tokens until all rows are done, `_TURNS` at most."""
  def turn(state, _):
    live_B = state.left_B > 0
    cache, logits_BV, depth_B = advance(decoder, weights, state.cache, state.token_B, state.position_B, live_B)
    token_B = sampling.sample(logits_BV, rows, state.seen_BV, state.index_B, vocab_size)
    logprob_B = sampling.log_probability(logits_BV, token_B, vocab_size)
    finish_B = slots_lib.find_finish(token_B, stop_BE, state.left_B)
    failed_B = finish_B == slots_lib.FAILED
    one_B = live_B.astype(jnp.int32)
    state = _State(cache, jnp.where(live_B, token_B, state.token_B), state.position_B + one_B, state.index_B + one_B,
                   jnp.where(failed_B | (finish_B == slots_lib.STOPPED), 0, state.left_B - one_B),
                   state.seen_BV.at[jnp.arange(token_B.shape[0]), token_B].max(live_B))
    return state, (jnp.where(live_B, token_B, -1), depth_B, logprob_B, finish_B)

  state, (tokens_KB, depths_KB, logprobs_KB, finish_KB) = jax.lax.scan(turn, state, None, length=_TURNS)
  return state, tokens_KB, depths_KB, logprobs_KB, finish_KB
