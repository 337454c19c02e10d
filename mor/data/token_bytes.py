"""How many bytes of text each token of a `tokenizers` .json stands for.

The sum over the tokens of a text is its length in UTF-8, exactly, if

  byte level      the decoder is ByteLevel: a character of a token is a byte
  SentencePiece   a token is text, with U+2581 for a space; <0xC3> is a byte

and the tokenizer keeps the text. It counts other text where a normaliser changes the text,
where a pre-tokenizer drops spaces, where an added token strips spaces (lstrip, rstrip),
and where a text of a SentencePiece tokenizer has U+2581 itself: `check` says so.

SentencePiece puts a space before a text. The token of the end of a text takes it back with a
count of -1, so sums over whole documents are exact. A text that begins with a space
gets no second one from Metaspace, and counts one byte less.
"""

from collections.abc import Mapping
import re
from typing import Any

import numpy as np
import tokenizers

_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_PROBE = "The quick (brown)  fox's 123\n\tdéjà vu, ABC: 東京 🚀 \"x\"."


def count(tokenizer: tokenizers.Tokenizer, fields: Mapping[str, Any]) -> np.ndarray:
  """Returns the bytes of each id, 0 for special tokens and for ids without a token.

  Args:
    tokenizer: tokenizer to look at.
    fields: content of its .json.
  """
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  added, byte_level = tokenizer.get_added_tokens_decoder(), is_byte_level(fields)
  num_bytes_V = np.zeros(max(vocabulary.values()) + 1, np.int32)
  for token, index in vocabulary.items():
    if index in added and added[index].special:
      continue
    if byte_level:  # an added token is matched in the text itself
      num_bytes_V[index] = len(token.encode("utf-8", "replace")) if index in added else len(token)
    elif _BYTE.fullmatch(token) and index not in added:
      num_bytes_V[index] = 1
    else:
      num_bytes_V[index] = len(token.replace(_SPACE, " ").encode("utf-8", "replace"))
  return num_bytes_V


def prefix(tokenizer: tokenizers.Tokenizer, num_bytes_V: np.ndarray) -> int:
  """Returns the bytes that the tokenizer puts before a text: 1 for the space of SentencePiece, else 0."""
  ids = tokenizer.encode("a", add_special_tokens=False).ids
  return max(int(num_bytes_V[ids].sum()) - 1, 0)


def check(tokenizer: tokenizers.Tokenizer, num_bytes_V: np.ndarray, prefix_bytes: int) -> str:
  """Returns what is wrong with the count of a text of several scripts and spaces, or ""."""
  ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
  counted, actual = int(num_bytes_V[ids].sum()) - prefix_bytes, len(_PROBE.encode("utf-8"))
  return "" if counted == actual else f"its tokens of a text of {actual} bytes stand for {counted}"


def is_byte_level(fields: Mapping[str, Any]) -> bool:
  """Returns True if the decoder turns characters into bytes."""
  decoder = fields.get("decoder") or {}
  return any(part["type"] == "ByteLevel" for part in decoder.get("decoders", [decoder]) if part)
