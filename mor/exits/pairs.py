"""Confidence and agreement of exits on a text, for calibration.

One forward pass over rows of the text gives the state of each position at each exit
and at full depth. The head and the measure say of each state what the engine would:

  confidence   of the exit, by `Exits.measure`, over the tokens that the exit chooses from
  agreed       whether the likeliest token of the exit is the one of full depth
  looked       whether the token arrives there: its router keeps it in the next step

The text is given, not generated, so each position is independent of the threshold.
The pass is float32 like an engine of weight_format="float32".
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor import types
from mor.decode import sampling
from mor.exits import confidence
from mor.exits import policy as exits_lib
from mor.model import kernels
from mor.model import schedule as schedule_lib
from mor.model import transformer

_BLOCK = 128  # positions whose logits exist at once


def collect(model: config_lib.ModelConfig, variables: Mapping[str, Any], exits: exits_lib.Exits,
            rows: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns confidence, agreement and arrival `[E, M]` of E exits at the M tokens of the text.

  Args:
    model: config of the model.
    variables: {"params": …} and, where the model has one, {"balance": …}.
    exits: exits of the engine.
    rows: `tokens_BT` and `segment_BT` (document of each token, 0 on padding) of each batch.
    vocab_size: tokens of the tokenizer; an id beyond it is never chosen.

  Raises:
    ValueError: the model does not have these exits.
  """
  exits.check(model)
  model = dataclasses.replace(model, compute_dtype="float32")
  found = []
  for tokens_BT, segment_BT in rows:
    valid_M = np.asarray(segment_BT).reshape(-1) != 0
    told = _run(model, exits, vocab_size, variables, jnp.asarray(tokens_BT), jnp.asarray(segment_BT))
    found.append([np.asarray(a_EM)[:, valid_M] for a_EM in told])
  return tuple(np.concatenate(parts, axis=1) for parts in zip(*found))


def reduce_to_tokens(confidence_EM: np.ndarray, agreed_EM: np.ndarray,
                     looked_EM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns one pair for each token that arrives at an exit.

  With several exits and one threshold t, a token is wrong only if a wrong exit has a confidence above t. The pair of
  a token with a wrong exit is therefore that of the surest wrong one, and of the surest exit otherwise: the loss of
  the pair bounds the loss of the token at every threshold. One exit keeps its pairs as they are.
  """
  wrong_EM = looked_EM & ~agreed_EM
  any_wrong_M = wrong_EM.any(axis=0)
  chosen_EM = np.where(any_wrong_M[None, :], wrong_EM, looked_EM)
  surest_M = np.max(np.where(chosen_EM, confidence_EM, 0.0), axis=0)
  arrives_M = looked_EM.any(axis=0)
  return surest_M[arrives_M], ~any_wrong_M[arrives_M]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@kernels.full_precision
def _run(model: config_lib.ModelConfig, exits: exits_lib.Exits, vocab_size: int, variables: Mapping[str, Any],
         tokens_BT: types.Tokens, segment_BT: types.Segments) -> tuple[jax.Array, jax.Array, jax.Array]:
  params = variables["params"]
  unit = {**variables, "params": {**params, "final_norm": jnp.ones_like(params["final_norm"])}}
  out = transformer.Transformer(model).apply(
      unit, tokens_BT, segment_BT, routing="decide", key=jax.random.key(0), exits=exits.after)
  states = [out.entry_BTD, *out.exits, out.hidden_BTD]
  size = tokens_BT.size
  blocks = -(-size // _BLOCK)

  def cut(x_BTD):
    x_MD = x_BTD.reshape(size, -1).astype(jnp.float32)
    return jnp.pad(x_MD, ((0, blocks * _BLOCK - size), (0, 0))).reshape(blocks, _BLOCK, -1)

  def judge(states_MD):
    return _judge(exits, vocab_size, params, states_MD)
  sure_XEM, agreed_XEM = jax.lax.map(judge, [cut(x_BTD) for x_BTD in states])
  sure_EM, agreed_EM = (jnp.moveaxis(a_XEM, 0, 1).reshape(len(exits.after), -1)[:, :size]
                        for a_XEM in (sure_XEM, agreed_XEM))
  return sure_EM, agreed_EM, _arrivals(model, exits, out.keep_RBT).reshape(len(exits.after), size)


def _judge(exits, vocab_size, params, states_MD):
  """Returns confidence and agreement `[E, M]`; states are the entrance, the exits and the end, before the norm's scale."""
  entry_MD, *states_MD = states_MD
  end_MD = states_MD.pop()
  head_VD = transformer.head(params).astype(jnp.float32)

  def read(x_MD, few):
    rows_VD = head_VD[:few] if few else head_VD
    logits_MV = jnp.einsum("MD,VD->MV", x_MD * params["final_norm"][None, :], rows_VD)
    return sampling.mask(logits_MV, vocab_size)
  full_M = sampling.most_likely(read(end_MD, 0))
  previous_MD, previous_M, sure, agreed = entry_MD, jnp.full_like(full_M, -1), [], []
  for x_MD in states_MD:
    logits_MV = read(x_MD, exits.first)
    token_M = sampling.most_likely(logits_MV)
    sure.append(confidence.MEASURES[exits.measure](confidence.Exit(
        logits_BV=logits_MV, token_B=token_M, hidden_BD=x_MD, previous_token_B=previous_M,
        previous_hidden_BD=previous_MD)))
    agreed.append(token_M == full_M)
    previous_MD, previous_M = x_MD, token_M
  return jnp.stack(sure), jnp.stack(agreed)


def _arrivals(model, exits, keep_RBT):
  """Returns True `[E, B, T]` where a token would go on after the exit; a plain model has one step and keeps each."""
  schedule = schedule_lib.make(model)
  if schedule.num_steps == 1:
    return jnp.broadcast_to(keep_RBT[:1], (len(exits.after), *keep_RBT.shape[1:]))
  boundaries = schedule.boundaries()
  return jnp.stack([keep_RBT[boundaries.index(layer) + 1] for layer in exits.after])
