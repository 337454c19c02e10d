"""From `DataConfig` to batches: split, tokenise, pack, cache, read.

  source -> split -> tokenizer -> rows (in the cache, written once) -> batch(step)

The name of a cache directory is a hash of everything that its content depends on: the
files of the source (name, size, time of change), the split, the tokenizer and the row
length. So a second run reads the rows at once.

A task (`data.source=task:NAME`) is no text: its rows are made as they are read (`tasks/corpus.py`).
"""

import dataclasses
import pathlib
import time

from absl import logging
import numpy as np

from mor import config as config_lib
from mor.data import cache
from mor.data import identity as identity_lib
from mor.data import rows as rows_lib
from mor.data import sources
from mor.data import split as split_lib
from mor.data import tokenizer as tokenizer_lib
from mor.data.tasks import corpus as task_corpus
from mor.data.tasks import table as task_table

_LAYOUT = 1  # raise it when the rows of the same text change
_CALL_CHARACTERS = 4_000_000  # text that is tokenised at once


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Text ready for training.

  Attributes:
    tokenizer: see `tokenizer.Tokenizer`.
    train: rows of shuffled training documents.
    validation: rows of the held-out documents.
    directory: cache directory of the rows.
    identity: the files of the text, by content.
  """

  tokenizer: tokenizer_lib.Tokenizer
  train: rows_lib.PackedRows
  validation: rows_lib.PackedRows
  directory: pathlib.Path
  identity: identity_lib.Identity

  def validation_text(self) -> str:
    """Returns the held-out documents, end to end: the text of the validation targets."""
    return (self.directory / "validation.txt").read_bytes().decode("utf-8")


AnyCorpus = Corpus | task_corpus.TaskCorpus


def load(config: config_lib.DataConfig, vocab_size: int,
         tokenizer: tokenizer_lib.Tokenizer | None = None) -> AnyCorpus:
  """Opens the corpus of a config, and tokenises it at first use.

  Args:
    config: source, split, tokenizer and row length.
    vocab_size: vocabulary size of the model.
    tokenizer: the tokenizer of a run; None is the one that the config names.

  Raises:
    FileNotFoundError: a source or tokenizer does not exist.
    ValueError: a source or tokenizer cannot be used, or the model or the batch
      does not fit it.
    OSError: the cache cannot be written.
  """
  if not 0 <= config.shuffle_seed < 2**32:
    raise ValueError(f"data.shuffle_seed={config.shuffle_seed}; use 0 to {2**32 - 1}")
  if task_table.is_task(config.source):
    return task_corpus.load(config, vocab_size, tokenizer)
  split = split_lib.make(config, cache.root(config.cache_dir))
  if tokenizer is None:
    tokenizer = tokenizer_lib.load(config, split.sample)
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(f"data.tokenizer={config.tokenizer!r} has {tokenizer.vocab_size} tokens, more "
                     f"than model.vocab_size={vocab_size}; set "
                     f"model.vocab_size={tokenizer.vocab_size} or more")
  directory = _prepare(config, split, tokenizer)
  train, validation = (_open_rows(directory / f"{name}.array_record", config, tokenizer)
                       for name in ("train", "validation"))
  if train.num_rows < config.batch_size:
    raise ValueError(f"data.source={config.source!r} gives {train.num_rows} rows of "
                     f"{config.seq_len} tokens, fewer than data.batch_size={config.batch_size}; "
                     "use a smaller data.batch_size or data.seq_len, or more text")
  return Corpus(tokenizer, train, validation, directory, _identify(config, split))


def identify(config: config_lib.DataConfig) -> identity_lib.Identity:
  """Returns the files that `load` would read, by content, or the task; raises as it does for a source."""
  if task_table.is_task(config.source):
    return task_corpus.identify(config)
  return _identify(config, split_lib.make(config, cache.root(config.cache_dir)))


def load_held_out(source: str, config: config_lib.DataConfig, tokenizer: tokenizer_lib.Tokenizer,
                  directory: pathlib.Path) -> tuple[rows_lib.PackedRows, str]:
  """Returns the rows and the text of a source that is evaluated alone, without the corpus and the cache of a run.

  Args:
    source: as in `data.source`.
    config: `text_key` and row length.
    tokenizer: the tokenizer of the run.
    directory: empty directory for the rows.

  Raises:
    FileNotFoundError: the source does not exist.
    ValueError: the source cannot be used, or holds no text.
  """
  texts = [text for text in sources.open_source(source, config.text_key, directory) if text.strip()]
  if not texts:
    raise ValueError(f"source {source!r} holds no text; give one with at least one document that is not blank")
  path = directory / "held_out.array_record"
  rows_lib.write(path, _tokenise(texts, tokenizer), tokenizer.eos_id, config.seq_len, _dtype(tokenizer))
  return _open_rows(path, config, tokenizer), "".join(texts)


def load_tokenizer(config: config_lib.DataConfig) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer; reads the corpus only if "bpe:SIZE" is not in the cache."""
  texts = None
  if tokenizer_lib.name_of(config).startswith("bpe:"):
    texts = split_lib.make(config, cache.root(config.cache_dir)).sample
  return tokenizer_lib.load(config, texts)


def _open_rows(path: pathlib.Path, config: config_lib.DataConfig,
               tokenizer: tokenizer_lib.Tokenizer) -> rows_lib.PackedRows:
  return rows_lib.PackedRows(path, eos_id=tokenizer.eos_id, seq_len=config.seq_len, batch_size=config.batch_size,
                             seed=config.shuffle_seed, dtype=_dtype(tokenizer))


def _identify(config: config_lib.DataConfig, split: split_lib.Split) -> identity_lib.Identity:
  return identity_lib.make(config, split.opened, cache.root(config.cache_dir))


def _prepare(config: config_lib.DataConfig, split: split_lib.Split,
             tokenizer: tokenizer_lib.Tokenizer) -> pathlib.Path:
  name = cache.key("rows", _LAYOUT, split.train.identity, split.held_out.identity,
                   tokenizer.identity, config.shuffle_seed, config.seq_len)

  def write(directory: pathlib.Path) -> None:
    start = time.monotonic()
    logging.info("Tokenising %s with %s ...", config.source, config.tokenizer)
    documents = _tokenise(split.train, tokenizer)
    order = split_lib.shuffle(len(documents), config.shuffle_seed, "order")
    held_out = list(split.held_out)
    (directory / "validation.txt").write_bytes("".join(held_out).encode("utf-8"))
    for part, arrays in (("train", [documents[i] for i in order]),
                         ("validation", _tokenise(held_out, tokenizer))):
      rows_lib.write(directory / f"{part}.array_record", arrays, tokenizer.eos_id, config.seq_len,
                     _dtype(tokenizer))
      logging.info("%s: %d documents, %d tokens", part, len(arrays), sum(map(len, arrays)))
    logging.info("... in %.1f s, kept in the cache", time.monotonic() - start)

  return cache.publish(cache.root(config.cache_dir) / "rows" / name, write)


def _tokenise(texts: sources.Documents | list[str],
              tokenizer: tokenizer_lib.Tokenizer) -> list[np.ndarray]:
  arrays, waiting, num_characters = [], [], 0

  def encode() -> None:
    arrays.extend(a.astype(_dtype(tokenizer)) for a in tokenizer.encode_batch(waiting))
    waiting.clear()

  for text in texts:
    waiting.append(text)
    num_characters += len(text)
    if num_characters >= _CALL_CHARACTERS:
      encode()
      num_characters = 0
  encode()
  return arrays


def _dtype(tokenizer: tokenizer_lib.Tokenizer) -> type[np.integer]:
  return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
