"""Text to token ids and back, and the bytes of text that each id encodes.

  bytes      every byte is a token; id 256 opens a document (vocabulary 257)
  PATH.json  any file of the `tokenizers` library
  bpe:SIZE   byte-level BPE, trained on the training text at first use and kept

A task (`data.source=task:NAME`) has a tokenizer of its own symbols, whatever `data.tokenizer` says.

Text that spells a special token is encoded as ordinary text: only the data pipeline
writes `eos_id`. Byte-level tokens decode to exactly the same text.
"""

from collections.abc import Callable, Iterable, Sequence
import functools
import hashlib
import json
import pathlib
from typing import Protocol, runtime_checkable, SupportsIndex

from absl import logging
import numpy as np
import tokenizers

from mor import config as config_lib
from mor import json_file
from mor.data import cache
from mor.data import pieces
from mor.data import sources
from mor.data import special_tokens
from mor.data import token_bytes
from mor.data.tasks import base as task_base
from mor.data.tasks import table as task_table

END_OF_TEXT = ("<|endoftext|>", "<|im_end|>", "</s>", "<eos>")
_LONGEST_WORD = 512  # bytes that are one word in training


@runtime_checkable
class Tokenizer(Protocol):
  """The interface of a tokenizer.

  Attributes:
    vocab_size: one more than the largest id.
    eos_id: opens every document; also the target of a document's last token.
    num_bytes_V: bytes of text that each id encodes, 0 for special tokens; `token_bytes.py`
      says when they are exact.
    identity: text that changes whenever the encoding of a text may change.
    serialized: the same tokenizer as a `tokenizers` .json.
  """

  vocab_size: int
  eos_id: int
  num_bytes_V: np.ndarray
  identity: str
  serialized: str

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of the text, int32, without special tokens."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Encodes each text, on all cores."""

  def encode_special(self, text: str) -> np.ndarray:
    """Encodes a text; special tokens that it spells are such tokens, as in `tokenizers`."""

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Returns the text of the ids; special tokens add nothing, broken UTF-8 becomes U+FFFD."""


def name_of(config: config_lib.DataConfig) -> str:
  """Returns the name of the tokenizer of a config: `data.tokenizer`, or the task that brings one."""
  return config.source if task_table.is_task(config.source) else config.tokenizer


def is_file(name: str) -> bool:
  """Returns True if the name of a tokenizer is a path: neither "bytes" nor "bpe:SIZE" nor a task."""
  return name != "bytes" and not name.startswith("bpe:") and not task_table.is_task(name)


def load(config: config_lib.DataConfig, texts: sources.Documents | None) -> Tokenizer:
  """Returns the tokenizer that `data.tokenizer` names, or that of a task.

  Args:
    config: config with the fields `source`, `tokenizer` and `cache_dir`.
    texts: training text of "bpe:SIZE", read only if that is not in the cache; None
      for any other tokenizer.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the name or the file makes no tokenizer.
  """
  if task_table.is_task(config.source):
    return JsonTokenizer(task_base.serialize(task_table.make(config).symbols))
  kind, _, size = config.tokenizer.partition(":")
  if config.tokenizer == "bytes":
    return ByteTokenizer()
  if kind == "bpe":
    return _load_trained(size, texts, cache.root(config.cache_dir))
  path = pathlib.Path(config.tokenizer).expanduser()
  if path.suffix != ".json":
    raise ValueError(f"data.tokenizer={config.tokenizer!r}; use 'bytes', 'bpe:SIZE' or the path of "
                     "a tokenizers .json")
  if not path.is_file():
    raise FileNotFoundError(f"data.tokenizer={config.tokenizer!r}: no such file; use 'bytes', "
                            "'bpe:SIZE' or the path of a tokenizers .json")
  try:
    serialized = json_file.read_text(path)
    return JsonTokenizer(serialized, find_eos(path, serialized))
  except (ValueError, OSError) as error:
    raise ValueError(f"data.tokenizer={config.tokenizer!r}: {error}") from error


class ByteTokenizer:
  """A tokenizer whose ids are the bytes of UTF-8."""

  vocab_size = 257
  eos_id = 256
  identity = "bytes"

  def __init__(self):
    self.num_bytes_V = np.array([1] * 256 + [0], np.int32)

  @functools.cached_property
  def serialized(self) -> str:
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    same = tokenizers.Tokenizer(tokenizers.models.BPE(
        {character: byte for byte, character in _byte_characters().items()} | {END_OF_TEXT[0]: self.eos_id}, []))
    same.pre_tokenizer, same.decoder = level, tokenizers.decoders.ByteLevel()
    same.add_special_tokens([END_OF_TEXT[0]])
    return same.to_str()

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [self.encode(text) for text in texts]

  encode_special = encode

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return bytes(i for i in map(int, ids) if i < self.eos_id).decode("utf-8", errors="replace")


class JsonTokenizer:
  """A tokenizer of the `tokenizers` library.

  Args:
    serialized: content of its .json file.
    eos_id: id of the end of a text; None is the first of `END_OF_TEXT` that it has.

  Raises:
    ValueError: the file is of another kind, it has none of `END_OF_TEXT`, or no token `eos_id`.
  """

  def __init__(self, serialized: str, eos_id: int | None = None):
    self._tokenizer = special_tokens.parse(serialized)
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    known = next((vocabulary[token] for token in END_OF_TEXT if token in vocabulary), None)
    self.eos_id = known if eos_id is None else eos_id
    if self.eos_id is None:
      raise ValueError(f"no end-of-text token; add one of {', '.join(END_OF_TEXT)}, or name it as eos_token in a "
                       "tokenizer_config.json beside it")
    end = self._tokenizer.id_to_token(self.eos_id) if 0 <= self.eos_id < 2**32 else None
    if end is None:
      raise ValueError(f"its end of a text is id {self.eos_id}, and it has no such token; use an id below "
                       f"{max(vocabulary.values()) + 1}")
    self._tokenizer.add_special_tokens([end])
    self._tokenizer.encode_special_tokens = True
    self.vocab_size = max(vocabulary.values()) + 1
    self.serialized = serialized
    told = "" if self.eos_id == known else f"\0{self.eos_id}"
    self.identity = hashlib.sha256((serialized + told).encode("utf-8")).hexdigest()
    fields = json.loads(serialized)
    self._encoder = pieces.Encoder(self._tokenizer, fields)
    self.num_bytes_V = token_bytes.count(self._tokenizer, fields)
    prefix = token_bytes.prefix(self._tokenizer, self.num_bytes_V)
    problem = token_bytes.check(self._tokenizer, self.num_bytes_V, prefix)
    if problem:
      logging.warning("Bits per byte of this tokenizer are an estimate: %s.", problem)
    self.num_bytes_V[self.eos_id] = -prefix

  @functools.cached_property
  def _matching(self) -> tokenizers.Tokenizer:
    """The tokenizer as the library reads the file."""
    return special_tokens.parse(self.serialized)

  def encode_special(self, text: str) -> np.ndarray:
    return np.array(self._matching.encode(text, add_special_tokens=False).ids, np.int32)

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return self._encoder.encode_batch(texts)

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)


def find_eos(path: pathlib.Path, serialized: str) -> int | None:
  """Returns the end of a text of a tokenizer.json by what lies beside it; None if nothing tells.

  Raises:
    ValueError: a file is no tokenizer, or broken.
    OSError: a file cannot be read.
  """
  kept = path.parent / "pretrained.json"  # of a converted run
  told = json_file.ids(json_file.read_optional(kept), "eos_id", kept)
  parsed = special_tokens.parse(serialized)
  return told[0] if told else choose_eos(parsed, lambda: special_tokens.read(path.parent, parsed).stops)


def choose_eos(parsed: tokenizers.Tokenizer, read_stops: Callable[[], Sequence[int]]) -> int | None:
  """Returns the id between documents; None if nothing tells.

  An added token of a known name goes before what its makers say, because theirs may end an
  answer of a chat; a token of that name in the vocabulary alone goes behind, because it may be text.

  Args:
    parsed: tokenizer of the documents.
    read_stops: function that returns the ids that end a text, as the makers say; best first.
  """
  vocabulary = parsed.get_vocab(with_added_tokens=True)
  added = parsed.get_added_tokens_decoder()
  known = [vocabulary[token] for token in END_OF_TEXT if token in vocabulary]
  named = [index for index in known if index in added]
  told = [] if named else [index for index in read_stops() if parsed.id_to_token(index) is not None]
  return next(iter([*named, *told, *known]), None)


def _byte_characters() -> dict[int, str]:
  """Returns the character that encodes each byte in byte-level BPE (GPT-2)."""
  printable = [*range(ord("!"), ord("~") + 1), *range(0xa1, 0xad), *range(0xae, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _load_trained(size: str, texts: sources.Documents, root: pathlib.Path) -> JsonTokenizer:
  """Reads or trains byte-level BPE with `size` tokens, end-of-text included."""
  if not size.isdecimal() or int(size) < 257:
    raise ValueError(f"data.tokenizer='bpe:{size}'; SIZE is a number of tokens >= 257 (256 bytes "
                     "and end-of-text)")

  def write(directory: pathlib.Path) -> None:
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    # The time of training grows with the square of a word's length.
    short = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"[\\s\\S]{{1,{_LONGEST_WORD}}}"), "isolated")
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, short])
    trained.decoder = tokenizers.decoders.ByteLevel()
    trained.train_from_iterator(
        (piece for text in texts for piece in pieces.split(text, words)),
        tokenizers.trainers.BpeTrainer(vocab_size=int(size), special_tokens=[END_OF_TEXT[0]],
                                       initial_alphabet=alphabet, show_progress=False))
    trained.pre_tokenizer = words
    trained.save(str(directory / "tokenizer.json"))

  name = cache.key("bpe", int(size), texts.identity)
  directory = cache.publish(root / "tokenizers" / name, write)
  return JsonTokenizer((directory / "tokenizer.json").read_text(encoding="utf-8"))
