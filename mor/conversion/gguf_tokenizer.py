"""Byte-level BPE in the metadata of a GGUF file.

A file names its pre-tokenizer. `PARTS` has what a name means to llama.cpp, written with the
parts of the `tokenizers` library: a reader takes the parts of a name, and `describe` looks
for the name of the parts that a tokenizer has. Any other tokenizer is refused, because
llama.cpp would split its text otherwise, without a word.

llama.cpp begins a text with one token at most (`add_bos_token`), and ends one at the ids of eos,
eot and eom, and at tokens whose spelling it knows, e.g. <|im_end|>.

Source: llama.cpp src/llama-vocab.cpp, convert_hf_to_gguf.py.
"""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from absl import logging
import gguf
import tokenizers

BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
PARTS = {  # name -> what splits text before BPE
    "gpt-2": [BYTES | dict(use_regex=True)],
    "smollm": [dict(type="Digits", individual_digits=True), BYTES | dict(use_regex=True)],
    "llama-bpe": [dict(type="Split", pattern=dict(Regex=_LLAMA3), behavior="Isolated", invert=False),
                  BYTES | dict(use_regex=False)],
    "qwen2": [dict(type="Split", pattern=dict(Regex=_LLAMA3.replace("{1,3}", "")), behavior="Isolated", invert=False),
              BYTES | dict(use_regex=False)],
}
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is one, whatever the merges say; and bos is on by default
_ENDS = ("eos", "eot", "eom")
_PLAIN = {  # field of the library's BPE -> values with which llama.cpp merges as it does
    "type": ("BPE",), "dropout": (None, 0.0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
}


def describe(serialized: str, special_ids: Mapping[str, Sequence[int]], chat_template: str | None) -> dict[str, Any]:
  """Returns metadata, by key, with which llama.cpp encodes text as a tokenizer does.

  Args:
    serialized: JSON of the `tokenizers` library.
    special_ids: ids that open every text ("opening"; none if missing), and ids that begin ("bos"), end
      ("eos", one or several) and pad ("pad") a text, or stand for what is unknown ("unk").
    chat_template: Jinja template.

  Returns:
    A value for each key; "tokenizer.ggml.tokens" has one token for each id.

  Raises:
    ValueError: llama.cpp has no such tokenizer, or no such way to open or end a text.
  """
  parsed = tokenizers.Tokenizer.from_str(serialized)
  fields = json.loads(parsed.to_str())  # with every field, in the words of this version
  merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in fields["model"].get("merges", ())]
  opening, ends = tuple(special_ids.get("opening", ())), tuple(special_ids.get("eos", ()))
  if len(opening) > 1:
    raise ValueError(f"a text begins with the tokens {opening}, and llama.cpp puts one token before a text at most; "
                     "export with --target=hf")
  if not 1 <= len(ends) <= len(_ENDS):
    raise ValueError(f"a text ends at the tokens {ends}, and a GGUF file names 1 to {len(_ENDS)}; export with "
                     "--target=hf")
  pre = _find_name(fields, merges)
  tokens, types = _tokens(parsed, {*opening, *ends})
  ids = dict(zip(_ENDS, ends))
  ids["bos"] = (opening or tuple(special_ids.get("bos", ())) or ends)[0]  # without one, llama.cpp takes id 11
  others = (("pad", "padding"), ("unk", "unknown"))
  ids |= {name: special_ids[ours][0] for ours, name in others if special_ids.get(ours)}
  beyond = {name: index for name, index in ids.items() if index >= len(tokens)}
  if beyond:
    raise ValueError(f"the tokenizer has {len(tokens)} tokens and not the special ones of {beyond}; give the tokenizer "
                     "that the model was trained with")
  return {
      "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges,
      **{f"tokenizer.ggml.{name}_token_id": index for name, index in ids.items()},
      "tokenizer.ggml.add_bos_token": bool(opening), "tokenizer.ggml.add_eos_token": False,
      **({} if chat_template is None else {"tokenizer.chat_template": chat_template})}


def _find_name(fields: Mapping[str, Any], merges: Sequence[str]) -> str:
  """Returns the name of what splits text before BPE; raises ValueError if llama.cpp has none for it."""
  model, normalizer, decoder = fields["model"], fields["normalizer"], fields["decoder"] or {}
  remedy = f"llama.cpp has byte-level BPE that splits text as {', '.join(PARTS)} do; export with --target=llama"
  for key, plain in _PLAIN.items():
    if model.get(key) not in plain:
      raise ValueError(f"the tokenizer's model has {key}={model.get(key)!r}: {remedy}")
  if decoder.get("type") != "ByteLevel":
    raise ValueError(f"the tokenizer's decoder is {decoder.get('type')!r}: {remedy}")
  if normalizer is not None and normalizer["type"] != "NFC":
    raise ValueError(f"the tokenizer's normalizer is {normalizer['type']!r}: {remedy}")
  if normalizer is not None:
    logging.warning("The tokenizer brings text into the form NFC, and llama.cpp does not: text in another form gets "
                    "other tokens there.")
  parts = _flatten(fields["pre_tokenizer"])
  if not merges and parts and all(part["type"] == "ByteLevel" and not part["add_prefix_space"] for part in parts):
    return "gpt-2"  # a byte is a token, however text is split
  for name, known in PARTS.items():
    is_split_so = parts == _flatten(dict(type="Sequence", pretokenizers=known))
    if is_split_so and model["ignore_merges"] == (name in WHOLE_WORDS):
      return name
  raise ValueError(f"the tokenizer splits text by {json.dumps(parts, ensure_ascii=False)}, ignore_merges="
                   f"{model['ignore_merges']}: {remedy}")


def _flatten(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
  """Returns the parts of a pre-tokenizer in their order, without what alters no token."""
  if part is None:
    return []
  if part["type"] == "Sequence":
    return [flat for each in part["pretokenizers"] for flat in _flatten(each)]
  return [{key: value for key, value in part.items() if key != "trim_offsets"}]


def _tokens(parsed: tokenizers.Tokenizer, special: set[int]) -> tuple[list[str], list[int]]:
  """Returns text and type of each id; ids in `special` are special whatever the tokenizer says."""
  vocabulary, added = parsed.get_vocab(with_added_tokens=True), parsed.get_added_tokens_decoder()
  size = max(vocabulary.values()) + 1
  tokens, types = [f"[PAD{index}]" for index in range(size)], [int(gguf.TokenType.UNUSED)] * size
  for token, index in vocabulary.items():
    tokens[index] = token
    if index in special or (index in added and added[index].special):
      types[index] = int(gguf.TokenType.CONTROL)
    elif index not in added:
      types[index] = int(gguf.TokenType.NORMAL)
    else:
      types[index] = int(gguf.TokenType.USER_DEFINED)
      flags = [flag for flag in ("single_word", "lstrip", "rstrip") if getattr(added[index], flag)]
      if flags:
        raise ValueError(f"the tokenizer's added token {token!r} has {', '.join(flags)}, which llama.cpp has not; "
                         "export with --target=llama")
  return tokens, types
