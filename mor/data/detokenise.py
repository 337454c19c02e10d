"""The text of token ids that come one by one, at a cost that does not grow with the text.

A window of few tokens is decoded at each token: a *context* whose text is known, and
the *pending* tokens behind it. What the window's text has beyond the context's is new.
The context makes it what a tokenizer says in the middle of a text, because at the
beginning alone the first space of a SentencePiece token is dropped. U+FFFD at the end is
held back: it may be the beginning of a character.

The parts join to the text of all tokens, also of broken UTF-8 if a tokenizer decodes
bytes in their order. With byte fallback a broken byte breaks the valid characters
beside it; those that were given out before it stay as they are.

Source: `tokenizers.decoders.DecodeStream` has the same window. It raises if a broken
byte changes the text before it, cannot give out what it holds back at the end, and
decodes a run of broken bytes from its beginning at every token.
"""

from collections.abc import Callable, Sequence
import itertools

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8  # tokens of a context that begins within a text, at least
_FARTHEST = 16  # the same at most
_PENDING = 8  # tokens that are held back, at most
_CHARACTER = 4  # bytes of a character at most, so tokens too


class Detokeniser:
  """Turns tokens into text, one by one.

  Args:
    decode: text of a list of ids, e.g. `Tokenizer.decode`.
    before: ids before the first token, whose text is not returned.
  """

  def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int] = ()):
    self._decode = decode
    heard = itertools.islice((t for t in reversed(before) if not self._is_mute(t)), _FARTHEST)
    self._move(self._cut([*heard][::-1]), [])
    self._given = 0  # characters of `_text` that were returned

  def add(self, token: int) -> str:
    """Returns the text that is certain with the next token, beyond what was returned before."""
    text = self._read([*self._pending, token])
    if text == self._text and self._is_mute(token):
      return ""
    self._pending, self._text = [*self._pending, token], text
    out = text.rstrip(_BROKEN)[self._given:]
    self._given += len(out)
    if text.endswith(_BROKEN):
      return out + self._let_go()
    if text:
      alone = not self._decode(self._pending).startswith(_BROKEN)
      self._move(self._pending if alone else self._cut(self._context + self._pending), [])
      self._given = 0
    return out

  @property
  def held(self) -> str:
    """The text that is held back, as it is if no token follows."""
    return self._text[self._given:]

  def _is_mute(self, token: int) -> bool:
    """Returns True for a special token, or one that the tokenizer does not have."""
    return not self._decode([token, token])

  def _cut(self, ids: list[int]) -> list[int]:
    """Returns the last ids, from the beginning of a character on."""
    for size in range(_CONTEXT, min(len(ids), _FARTHEST)):
      if not self._decode(ids[-size:]).startswith(_BROKEN):
        return ids[-size:]
    return ids[-_FARTHEST:]

  def _move(self, context: list[int], pending: list[int]) -> None:
    self._context, self._known, self._pending = context, self._decode(context), pending
    self._text = self._read(pending)

  def _read(self, pending: list[int]) -> str:
    """Returns the text of tokens behind the context."""
    text = self._decode(self._context + pending)
    if text.startswith(self._known):
      return text[len(self._known):]
    whole = self._known.rstrip(_BROKEN)
    if whole != self._known and text.startswith(whole):  # they complete a character of the context
      return text[len(whole):]
    return self._decode(pending)

  def _let_go(self) -> str:
    """Returns broken characters that no later token can complete, if too many tokens are held back."""
    if len(self._pending) <= _PENDING:
      return ""
    for size in range(len(self._pending) - _CHARACTER, 0, -1):
      part = self._read(self._pending[:size])
      if self._text.startswith(part):
        break
    else:
      return ""
    out, left = part[self._given:], max(0, self._given - len(part))
    self._move(self._cut(self._context + self._pending[:size]), self._pending[size:])
    self._given = left
    return out
