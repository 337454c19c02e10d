"""Accuracy on minimal pairs, under causal routing.

  log p(sentence) = sum of log p(token | tokens before), opened by the end of text

Sentences are packed into rows, each as a document. Documents do not attend to each
other, and under causal routing they do not change each other's depth. So the sums equal
those of one sentence per row, at a fraction of the cost. The end of text is not scored.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
from jax.sharding import Mesh
import numpy as np

from mor import config as config_lib
from mor import sharding
from mor.data import blimp
from mor.model import kernels
from mor.model import transformer
from mor.train import loss as loss_lib

Scorer = Callable[[Sequence[np.ndarray]], np.ndarray]


def accuracy(pairs: Sequence[blimp.Pair], encode: Callable[[str], np.ndarray], log_prob: Scorer) -> float:
  """Returns the fraction of pairs whose good sentence is more probable; a tie is wrong.

  Args:
    pairs: sentence pairs.
    encode: function from a text to its token ids.
    log_prob: function from sentences of token ids to their log-probabilities.
  """
  good = log_prob([encode(pair.good) for pair in pairs])
  bad = log_prob([encode(pair.bad) for pair in pairs])
  return float(np.mean(good > bad))


def make(config: config_lib.Config, mesh: Mesh,
         eos_id: int) -> Callable[[dict, dict, Sequence[np.ndarray]], np.ndarray]:
  """Makes `log_prob(params, balance, sentences) -> float64 array`, one value per sentence."""
  model = dataclasses.replace(config.model, cross_documents=False)

  @jax.jit
  @kernels.full_precision
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
  """Packs sentences into rows, each sentence as a segment.

  Args:
    sentences: token ids of each sentence.
    eos_id: token that opens each sentence.
    seq_len: tokens in a row.
    batch_size: divisor of the number of rows.

  Returns:
    tokens_BT, target_BT, segment_BT; and (row, start, stop) of the targets of each sentence.

  Raises:
    ValueError: a sentence has no tokens, or more than a row holds.
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
