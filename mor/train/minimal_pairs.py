"""Accuracy on minimal pairs, under causal routing.

  log p(sentence) = sum of log p(token | tokens before), opened by the end of text

Sentences are packed into rows as documents of their own, which neither see each
other nor, under causal routing, influence each other's depth: the sums are those
of one sentence a row, at a fraction of the cost. No end of text is scored.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
from jax.sharding import Mesh
import numpy as np

from mor import config as config_lib
from mor import sharding
from mor.data import blimp
from mor.model import transformer
from mor.train import loss as loss_lib

Scorer = Callable[[Sequence[np.ndarray]], np.ndarray]


def accuracy(pairs: Sequence[blimp.Pair], encode: Callable[[str], np.ndarray], log_prob: Scorer) -> float:
  """Fraction of pairs whose good sentence is the more probable; a tie is wrong.

  Args:
    pairs: what to judge.
    encode: text to token ids.
    log_prob: log-probabilities of sentences of token ids.
  """
  good = log_prob([encode(pair.good) for pair in pairs])
  bad = log_prob([encode(pair.bad) for pair in pairs])
  return float(np.mean(good > bad))


def make(config: config_lib.Config, mesh: Mesh, eos_id: int) -> Callable[[dict, dict, Sequence[np.ndarray]], np.ndarray]:
  """`log_prob(params, balance, sentences) -> float64 array`, one value a sentence."""
  model = dataclasses.replace(config.model, cross_documents=False)

  @jax.jit
  def nll(params, balance, batch):
    out = transformer.Transformer(model).apply(
        {"params": params, "balance": balance}, batch["tokens_BT"], batch["segment_BT"], routing="decide",
        key=jax.random.key(config.seed))
    return loss_lib.token_nll(transformer.head(params), out.hidden_BTD, batch["target_BT"], config.train.loss_block)

  def log_prob(params: dict, balance: dict, sentences: Sequence[np.ndarray]) -> np.ndarray:
    batch, places = pack(sentences, eos_id, config.data.seq_len, config.data.batch_size)
    rows = []
    for start in range(0, len(batch["tokens_BT"]), config.data.batch_size):
      part = {name: value[start:start + config.data.batch_size] for name, value in batch.items()}
      with jax.set_mesh(mesh):
        rows.append(np.asarray(nll(params, balance, sharding.put_whole(mesh, part)), np.float64))
    nll_BT = np.concatenate(rows)
    return np.array([-nll_BT[row, start:stop].sum() for row, start, stop in places])

  return log_prob


def pack(sentences: Sequence[np.ndarray], eos_id: int, seq_len: int,
         batch_size: int) -> tuple[dict[str, np.ndarray], list[tuple[int, int, int]]]:
  """Rows of sentences, each a segment, and where each sentence's targets lie.

  Args:
    sentences: token ids of each.
    eos_id: what the first token follows.
    seq_len: of a row.
    batch_size: the number of rows is a multiple of it.

  Returns:
    tokens_BT, target_BT, segment_BT; and (row, start, stop) of each sentence.

  Raises:
    ValueError: a sentence has no tokens, or more than a row.
  """
  places, row, at = [], 0, 0
  for index, ids in enumerate(sentences):
    if not 0 < len(ids) <= seq_len:
      raise ValueError(f"sentence {index} has {len(ids)} tokens; use sentences of 1 to data.seq_len={seq_len}")
    if at + len(ids) > seq_len:
      row, at = row + 1, 0
    places.append((row, at, at + len(ids)))
    at += len(ids)
  num_rows = -(-(row + 1) // batch_size) * batch_size
  batch = {name: np.zeros((num_rows, seq_len), np.int32) for name in ("tokens_BT", "target_BT", "segment_BT")}
  for ids, (row, start, stop) in zip(sentences, places):
    batch["tokens_BT"][row, start:stop] = [eos_id, *ids[:-1]]
    batch["target_BT"][row, start:stop] = ids
    batch["segment_BT"][row, start:stop] = batch["segment_BT"][row, start - 1] + 1 if start else 1
  return batch, places
