"""The tokenizer in a GGUF file's metadata, as a `tokenizers` .json.

Byte-level BPE only. The file names its pre-tokenizer; the expressions are what
that name means to llama.cpp, written with the library's own parts. A file that
names none, or "default", was converted before names were kept: what its
tokenizer was is not known, so it is refused.

Source: llama.cpp src/llama-vocab.cpp; gguf-py constants.py, `TokenType`.
"""

from collections.abc import Callable
import json
from typing import Any

import gguf

from mor.conversion import pretrained

_BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
_PARTS = {  # name -> what splits text before BPE
    "gpt-2": [_BYTES | dict(use_regex=True)],
    "smollm": [dict(type="Digits", individual_digits=True), _BYTES | dict(use_regex=True)],
    "llama-bpe": [dict(type="Split", pattern=dict(Regex=_LLAMA3), behavior="Isolated", invert=False),
                  _BYTES | dict(use_regex=False)],
}
_WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is one, whatever the merges say; and bos is on by default
_IDS = dict(bos="bos", eos="eos", pad="padding", unk="unknown")
_ADDED = {int(gguf.TokenType.CONTROL): True, int(gguf.TokenType.USER_DEFINED): False}  # type -> special


def read(take: Callable[..., Any], where: str) -> dict[str, Any]:
  """The fields of a `Source` that metadata tell.

  Args:
    take: value of a key, its type, and what it is if missing.
    where: the file, for messages.

  Raises:
    ValueError: a tokenizer of a kind that is unsupported, or a broken one.
  """
  ids = {name: take(f"tokenizer.ggml.{key}_token_id", int, None) for name, key in _IDS.items()}
  template = take("tokenizer.chat_template", str, None)
  kind = take("tokenizer.ggml.model", str, "none")
  if kind in ("none", "no_vocab"):
    return dict(tokenizer=None, chat_template=template, special_ids=pretrained.special(where, ids), special_tokens={},
                add_bos=False)
  if kind != "gpt2":
    raise ValueError(f"{where}: tokenizer.ggml.model={kind!r} is unsupported; use a model with 'gpt2' (byte-level BPE)")
  pre = take("tokenizer.ggml.pre", str, "default")
  if pre not in _PARTS:
    raise ValueError(f"{where}: tokenizer.ggml.pre={pre!r} is unsupported; use one of {', '.join(_PARTS)}")
  tokens = take("tokenizer.ggml.tokens", list)
  types = take("tokenizer.ggml.token_type", list, [int(gguf.TokenType.NORMAL)] * len(tokens))
  merges = take("tokenizer.ggml.merges", list)
  if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(f"{where}: {len(set(tokens))} different tokens of {len(tokens)} with {len(types)} types; "
                     "fetch the file again")
  bad = [index for index in ids.values() if index is not None and not 0 <= index < len(tokens)]
  if bad:
    raise ValueError(f"{where}: special token {bad[0]} of {len(tokens)} tokens; fetch the file again")
  add_bos = take("tokenizer.ggml.add_bos_token", bool, pre in _WHOLE_WORDS)
  bos = ids["bos"] if add_bos else None
  text = json.dumps(_fields(tokens, types, merges, pre, bos), ensure_ascii=False)
  try:
    pretrained.parse_tokenizer(text)
  except ValueError as error:
    raise ValueError(f"{where}: its tokenizer is {error}") from error
  return dict(tokenizer=text, chat_template=template, special_ids=pretrained.special(where, ids), add_bos=add_bos,
              special_tokens={name: tokens[index] for name, index in ids.items() if index is not None})


def _fields(tokens: list[str], types: list[int], merges: list[str], pre: str, bos: int | None) -> dict[str, Any]:
  """Content of the .json."""
  added = [dict(id=index, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False,
                special=_ADDED[kind])
           for index, (token, kind) in enumerate(zip(tokens, types)) if kind in _ADDED]
  first = [] if bos is None else [dict(SpecialToken=dict(id=tokens[bos], type_id=0))]
  text = lambda name, type_id: [dict(Sequence=dict(id=name, type_id=type_id))]
  processor = dict(
      type="TemplateProcessing", single=first + text("A", 0), pair=first + text("A", 0) + text("B", 1),
      special_tokens={} if bos is None else {tokens[bos]: dict(id=tokens[bos], ids=[bos], tokens=[tokens[bos]])})
  return dict(
      version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
      pre_tokenizer=dict(type="Sequence", pretokenizers=_PARTS[pre]),
      post_processor=None if bos is None else processor, decoder=_BYTES | dict(use_regex=True),
      model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=False, ignore_merges=pre in _WHOLE_WORDS,
                 vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
