"""The split of documents into training and held-out text.

Documents are numbered in the order of the source, without blank ones. `shuffle` permutes
the numbers, and the first `validation_fraction` of them, at least one, is held out. If
the source is a single document, it is cut near its end, at a line break if possible. With
`data.validation_source`, all documents of `data.source` are training text.

Permutations come from a hash of (seed, number), so they are the same on every machine
and with every version of NumPy.
"""

from collections.abc import Iterator
import dataclasses
import functools
import hashlib
import pathlib

from mor import config as config_lib
from mor.data import sources

SAMPLE_BYTES = 16_000_000  # of training text, for training a tokenizer


def shuffle(num: int, seed: int, purpose: str) -> list[int]:
  """Returns a permutation of range(num); different values of `purpose` give independent ones."""
  return sorted(range(num), key=lambda i: hashlib.sha256(f"{purpose} {seed} {i}".encode()).digest())


@dataclasses.dataclass(frozen=True)
class Split:
  """Documents by use; nothing is read before the first iteration.

  Attributes:
    train: training documents, in the order of the source.
    held_out: held-out documents, in the order of their source.
    sample: random selection from `train`, `SAMPLE_BYTES` at most.
    opened: `data.source` and, if it is given, `data.validation_source`, whole.
  """

  train: sources.Documents
  held_out: sources.Documents
  sample: sources.Documents
  opened: tuple[sources.Documents, ...]


def make(config: config_lib.DataConfig, cache_root: pathlib.Path) -> Split:
  """Splits `data.source`, or combines it with `data.validation_source`.

  Raises:
    FileNotFoundError: a source does not exist.
    ValueError: a source cannot be used, or a file is in both sources. An empty source
      raises when it is read.
  """
  source = sources.open_source(config.source, config.text_key, cache_root)
  selection = _Selection(config, source)
  opened = [source]
  parts = (*source.parts, config.text_key, str(config.max_bytes))
  if config.validation_source:
    held_out = sources.open_source(config.validation_source, config.text_key, cache_root)
    opened.append(held_out)
    both = sorted(set(source.parts) & set(held_out.parts))
    if both:
      raise ValueError(f"data.validation_source={config.validation_source!r} shares "
                       f"{both[0].split(' ')[0]} with data.source={config.source!r}; leave the "
                       "held-out text out of data.source")
    held_out = sources.Documents((*held_out.parts, config.text_key),
                                 functools.partial(_read_all, config.validation_source, held_out))
  else:
    parts = (*parts, str(config.validation_fraction), str(config.shuffle_seed))
    held_out = sources.Documents((*parts, "held out"), functools.partial(selection.read, held_out=True))
  return Split(
      train=sources.Documents((*parts, "train"), functools.partial(selection.read, held_out=False)),
      held_out=held_out,
      sample=sources.Documents((*parts, "sample", str(config.shuffle_seed)), selection.read_sample),
      opened=tuple(opened))


class _Selection:
  """Numbers the documents of a source in one pass, then reads them by use."""

  def __init__(self, config: config_lib.DataConfig, source: sources.Documents):
    self._config = config
    self._source = source

  def read(self, held_out: bool) -> Iterator[str]:
    for index, text in enumerate(self._texts(self._is_single)):
      if (index in self._held_out) == held_out:
        yield text

  def read_sample(self) -> Iterator[str]:
    left, allowed = SAMPLE_BYTES, {}
    for index in shuffle(len(self._num_bytes), self._config.shuffle_seed, "sample"):
      if index not in self._held_out and left > 0:
        allowed[index] = left
        left -= self._num_bytes[index]
    for index, text in enumerate(self._texts(self._is_single)):
      if index in allowed:
        yield _first_bytes(text, allowed[index])

  @functools.cached_property
  def _is_single(self) -> bool:
    texts = self._texts(is_single=False)
    if next(texts, None) is None:
      raise ValueError(f"data.source={self._config.source!r} holds no text; give a source with at "
                       "least one document that is not blank")
    return not self._config.validation_source and next(texts, None) is None

  @functools.cached_property
  def _num_bytes(self) -> list[int]:
    return [len(text.encode("utf-8")) for text in self._texts(self._is_single)]

  @functools.cached_property
  def _held_out(self) -> frozenset[int]:
    if self._config.validation_source:
      return frozenset()
    if self._is_single:
      return frozenset([1])
    num = len(self._num_bytes)
    num_held_out = min(num - 1, max(1, round(self._config.validation_fraction * num)))
    return frozenset(shuffle(num, self._config.shuffle_seed, "split")[:num_held_out])

  def _texts(self, is_single: bool) -> Iterator[str]:
    left = self._config.max_bytes or None
    for text in self._source:
      if not text.strip():
        continue
      whole = text
      if left is not None:
        text = _first_bytes(whole, left)
        left -= len(text.encode("utf-8"))
      if text:
        yield from self._cut(text) if is_single else (text,)
      if len(text) < len(whole):
        return

  def _cut(self, text: str) -> tuple[str, str]:
    place = round(len(text) * (1 - self._config.validation_fraction))
    place = min(max(1, text.rfind("\n", 0, place) + 1 or place), len(text) - 1)
    if place < 1:
      raise ValueError(f"data.source={self._config.source!r} holds a single character; give more "
                       "text")
    return text[:place], text[place:]


def _read_all(name: str, documents: sources.Documents) -> Iterator[str]:
  found = False
  for text in documents:
    if text.strip():
      found = True
      yield text
  if not found:
    raise ValueError(f"data.validation_source={name!r} holds no text; give a source with at least "
                     "one document that is not blank, or '' to hold out part of data.source")


def _first_bytes(text: str, limit: int) -> str:
  if len(text) <= limit // 4:  # no character is longer than 4 bytes
    return text
  return text.encode("utf-8")[:limit].decode("utf-8", errors="ignore")
