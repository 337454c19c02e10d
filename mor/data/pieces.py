"""Long texts, encoded piece by piece, with the tokens of the whole text.

One call of `tokenizers` needs 130 to 190 times the bytes of its text. So a long text is cut,
and few pieces are encoded at a time. It is cut at the first of these that there is:

  word break   before a space between two letters of ASCII
  pre-token    where the pattern of the pre-tokenizer cuts a window of the text; a pattern looks
               at a run of characters of one kind, so cuts away from the window's end are those
               of the whole text
  token        inside a word that is longer than a window, where two tokens of BPE meet that are
               also the tokens of their joint text: the tokens of a word are the only ones of
               which that holds for all neighbours

Source of the last: H. van Antwerpen and A. Neubeck, "So many tokens, so little time", 2024;
github/rust-gems, crates/bpe.
"""

from collections.abc import Iterator, Sequence
import re
from typing import Any

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

PIECE_CHARACTERS = 16384  # a text up to this size is not cut
_CALL_CHARACTERS = 16 * PIECE_CHARACTERS  # that are encoded at once
_MARGIN = 4  # characters at the end of a window that may belong together with what follows: a contraction
_WORD_BREAK = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")
_NO_SPACE = re.compile(r"\S")
_DROPPED = 8  # tokens at the end of a window that may change when the word goes on
_LOOKS_BACK = re.compile(r"\(\?<[=!]|\\[bBAGK]|(?<!\[)\^")  # in a pattern: what stands before a match may change it
_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# Characters that stand for bytes inside a character of UTF-8: the second byte of U+0080 to U+00BF.
_INNER = frozenset(_LEVEL.pre_tokenize_str(chr(byte))[0][0][1] for byte in range(0x80, 0xC0))


class _NoSeamError(Exception):
  """A word has no place where its tokens are known to be independent."""


class Encoder:
  """Encodes texts of any length in bounded memory, if the kind of the tokenizer allows cuts.

  Args:
    tokenizer: tokenizer without truncation and padding.
    fields: content of its .json file.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer, fields: dict[str, Any]):
    self._tokenizer = tokenizer
    added = [token for token in fields.get("added_tokens") or [] if not token["special"]]
    parts = _parts(fields)
    plain = fields.get("normalizer") is None
    self._breaks = plain and any(map(_breaks_words, parts)) and not any(map(_spans_words, added))
    self._windows = plain and not added and _is_local(parts)
    self._words = self._windows and _is_plain_bpe(fields["model"]) and any(part["type"] == "ByteLevel" for part in parts)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text, int32."""
    found: list[list[np.ndarray]] = [[] for _ in texts]
    waiting: list[tuple[int, str]] = []
    num_characters = 0
    for index, text in enumerate(texts):
      for piece in self._pieces_or_whole(text):
        if isinstance(piece, np.ndarray) or num_characters + len(piece) > _CALL_CHARACTERS:
          self._flush(waiting, found)
          num_characters = 0
        if isinstance(piece, np.ndarray):
          found[index].append(piece)
        else:
          waiting.append((index, piece))
          num_characters += len(piece)
    self._flush(waiting, found)
    return [np.concatenate([np.zeros(0, np.int32), *arrays]) for arrays in found]

  def _flush(self, waiting: list[tuple[int, str]], found: list[list[np.ndarray]]) -> None:
    for (index, _), ids in zip(waiting, self._encode([piece for _, piece in waiting])):
      found[index].append(ids)
    waiting.clear()

  def _encode(self, pieces: list[str]) -> list[np.ndarray]:
    return [np.array(one.ids, np.int32) for one in self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]

  def _pieces_or_whole(self, text: str) -> list[str | np.ndarray]:
    try:
      return list(self._pieces(text))
    except _NoSeamError:
      return [text]

  def _pieces(self, text: str) -> Iterator[str | np.ndarray]:
    """Yields the pieces of a text, or their ids if these were needed to find an end."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
      end = self._cut(text, start)
      if end is not None:
        yield text[start:end]
        start = end
      elif self._words:
        for ids, start in self._long_word(text, start):
          yield ids
      else:
        break
    if start < len(text):
      yield text[start:]

  def _cut(self, text: str, start: int) -> int | None:
    """Returns where a piece may end that starts at `start`; None if that is unknown.

    No piece ends in a space, because patterns split a run of spaces by what follows it.
    """
    if self._breaks:
      found = _WORD_BREAK.search(text, start + PIECE_CHARACTERS, start + _window() if self._windows else len(text))
      if found:
        return found.start()
    if not self._windows:
      return None
    window = text[start:start + _window()]
    ends = (end for _, (_, end) in reversed(self._tokenizer.pre_tokenizer.pre_tokenize_str(window)))
    return next((start + end for end in ends if _is_end(window, end) and not window[end - 1].isspace()), None)

  def _long_word(self, text: str, start: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the ids of a word window by window, each with their end; the last end is that of the word."""
    length, whole = self._reach(text, start)
    ids = self._encode([text[start:start + length]])[0]
    while not whole:
      dropped = _DROPPED
      while True:
        num, end = self._shorten(ids, start + length, dropped)
        goes_on = self._first_end(text[end:start + length]) == start + length - end
        next_length, next_whole = self._reach(text, end)
        next_ids = self._encode([text[end:end + next_length]])[0]
        if goes_on and self._meet(*ids[num - 1:num].tolist(), *next_ids[:1].tolist()):
          break
        dropped *= 2
      yield ids[:num], end
      start, length, whole, ids = end, next_length, next_whole, next_ids
    yield ids, start + length

  def _reach(self, text: str, start: int) -> tuple[int, bool]:
    """Returns how many characters of the word at `start` a window shows, and whether these are all."""
    window = text[start:start + _window()]
    end = self._first_end(window)
    if len(window) == len(text) - start or _is_end(window, end):
      return end, True
    if end < len(window) - _MARGIN:
      raise _NoSeamError
    return len(window) - _MARGIN, False

  def _first_end(self, window: str) -> int:
    return self._tokenizer.pre_tokenizer.pre_tokenize_str(window)[0][1][1]

  def _shorten(self, ids: np.ndarray, end: int, dropped: int) -> tuple[int, int]:
    """Returns how many ids are left without the last ones, and where their text ends: between two characters."""
    tokens = [self._tokenizer.id_to_token(index) for index in ids[-dropped - _MARGIN:].tolist()]
    for first in range(len(tokens) - dropped, 0, -1):
      if tokens[first][0] not in _INNER:
        text = "".join(tokens[first:])
        return len(ids) - len(tokens) + first, end - sum(character not in _INNER for character in text)
    raise _NoSeamError

  def _meet(self, left: int, right: int) -> bool:
    """Returns True if two tokens are the tokens of their joint text."""
    joint = self._tokenizer.id_to_token(left) + self._tokenizer.id_to_token(right)
    return [token.id for token in self._tokenizer.model.tokenize(joint)] == [left, right]


def split(text: str, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Iterator[str]:
  """Cuts a long text for training: between words, or anywhere in a word that is longer than a window."""
  start = 0
  while len(text) - start > PIECE_CHARACTERS:
    found = _WORD_BREAK.search(text, start + PIECE_CHARACTERS, start + _window())
    window = text[start:start + _window()]
    ends = [] if found else [end for _, (_, end) in pre_tokenizer.pre_tokenize_str(window) if _is_end(window, end)]
    end = found.start() if found else start + (ends[-1] if ends else PIECE_CHARACTERS)
    yield text[start:end]
    start = end
  yield text[start:]


def _window() -> int:
  return max(2 * PIECE_CHARACTERS, 4 * _MARGIN)


def _is_end(window: str, end: int) -> bool:
  """Returns True if a pre-token of a window ends there in the whole text, too: a run of spaces is seen to its end."""
  last = len(window) - _MARGIN
  return 0 < end <= last and (not window[end - 1].isspace() or bool(_NO_SPACE.search(window, end, last)))


def _parts(fields: dict[str, Any]) -> list[dict[str, Any]]:
  before = fields.get("pre_tokenizer") or {}
  return [part for part in before.get("pretokenizers", [before]) if part]


def _breaks_words(part: dict[str, Any]) -> bool:
  """Returns True if a part of a pre-tokenizer always cuts at `_WORD_BREAK`, and a text may be cut there before it."""
  return (part["type"] == "ByteLevel" and part.get("use_regex", True)
          or part["type"] == "Metaspace" and part.get("split", True))


def _spans_words(token: dict[str, Any]) -> bool:
  """Returns True if the library may match an added token across `_WORD_BREAK`."""
  return (token["rstrip"] or token["single_word"] or token["content"].endswith(" ")
          or bool(_WORD_BREAK.search(token["content"])))


def _is_local(parts: list[dict[str, Any]]) -> bool:
  """Returns True if the pre-tokenizer is one pattern of letters and numbers, like those of GPT-2 and Llama 3."""
  if any(part["type"] not in ("ByteLevel", "Split") or part.get("add_prefix_space") for part in parts):
    return False
  patterns = [part for part in parts if part["type"] == "Split" or part.get("use_regex", True)]
  if len(patterns) != 1 or patterns[0] is not parts[0]:
    return False
  pattern = patterns[0].get("pattern", {}).get("Regex", "")
  return patterns[0]["type"] == "ByteLevel" or (
      patterns[0]["behavior"] == "Isolated" and r"\p{L}" in pattern and r"\p{N}" in pattern
      and not _LOOKS_BACK.search(pattern))


def _is_plain_bpe(model: dict[str, Any]) -> bool:
  """Returns True if a word has one sequence of tokens, which does not depend on chance or on its place."""
  return model.get("type") == "BPE" and not any(
      model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
