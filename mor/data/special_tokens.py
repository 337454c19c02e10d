"""Which tokens begin and end a text, from the files that come with a tokenizer.

  tokenizer.json           its post-processor: the ids that it puts before a text
  tokenizer_config.json    bos_token, eos_token, pad_token, unk_token, add_bos_token
  generation_config.json   bos_token_id, eos_token_id (one, or a list)
  config.json              the same, as older models have them

Several files may answer one question:

  opening   the post-processor, if it puts anything before a text; else the first bos
            token if `add_bos_token` is true; else nothing. So does transformers 5,
            but for `add_bos_token` beside a post-processor without tokens, which
            transformers 4 and llama.cpp obey.
  stops     all eos tokens that any of the files names.
  eos       the token between documents in training (`tokenizer.py` says when): the
            eos_token of tokenizer_config.json, else the first of generation_config.json,
            else the first of config.json.

What a post-processor puts behind a text is left out, because a prompt is to be continued.

Source: transformers 5 tokenization_utils_tokenizers.py, generation/configuration_utils.py.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

import tokenizers

from mor import json_file

NAMES = ("bos", "eos", "pad", "unk")
_PROBES = ("a", "the", " ", "0")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """What the files of a folder say.

  Attributes:
    opening: ids before a text.
    stops: ids that end one.
    ids: ids of "bos", "eos", "pad", "unk", as far as known; "eos" may be several.
    tokens: their text, the first of each.
    add_bos: True if a text begins with "bos".
  """

  opening: tuple[int, ...]
  ids: dict[str, tuple[int, ...]]
  tokens: dict[str, str]
  add_bos: bool

  @property
  def stops(self) -> tuple[int, ...]:
    return self.ids.get("eos", ())


def parse(serialized: str) -> tokenizers.Tokenizer:
  """Returns the tokenizer that a .json describes, without its truncation and padding.

  Raises:
    ValueError: it describes none.
  """
  try:
    parsed = tokenizers.Tokenizer.from_str(serialized)
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f"not a tokenizers file ({json_file.first_line(error)}); save one with Tokenizer.save") from error
  except BaseException as error:  # a panic of the library is no Exception
    if type(error).__name__ != "PanicException":
      raise
    raise ValueError(f"not a tokenizers file ({json_file.first_line(error)}); save one with Tokenizer.save") from None
  parsed.no_truncation()
  parsed.no_padding()
  return parsed


def read(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer | None,
         config: Mapping[str, Any] | None = None) -> SpecialTokens:
  """Reads the files beside a tokenizer.json.

  Args:
    folder: directory of the files, each of which may be missing.
    tokenizer: content of tokenizer.json, if there is one.
    config: content of config.json; None reads it.

  Raises:
    ValueError: a file is broken, or a field of another type.
    OSError: a file cannot be read.
  """
  where = {name: folder / name for name in ("tokenizer_config.json", "generation_config.json", "config.json")}
  said, generation = (json_file.read_optional(where[name]) for name in list(where)[:2])
  config = json_file.read_optional(where["config.json"]) if config is None else config
  tokens, ids = {}, {}
  for name in NAMES:
    token = json_file.token(said, f"{name}_token", where["tokenizer_config.json"])
    index = None if token is None or tokenizer is None else tokenizer.token_to_id(token)
    found = [
        *json_file.ids(generation, f"{name}_token_id", where["generation_config.json"]),
        *json_file.ids(config, f"{name}_token_id", where["config.json"])]
    found = ([] if index is None else [index]) + found
    found = list(dict.fromkeys(found)) if name == "eos" else found[:1]
    if found:
      ids[name] = tuple(found)
    if token is not None:
      tokens[name] = token
  add_bos = json_file.flag(said, "add_bos_token", where["tokenizer_config.json"], False)
  opening = find_opening(tokenizer) if tokenizer is not None else ()
  if not opening and add_bos:
    opening = ids.get("bos", ())
  return SpecialTokens(opening, ids, tokens, bool(opening) and opening[0] in ids.get("bos", opening))


def find_opening(tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
  """Returns the ids that the post-processor puts before a text."""
  for text in _PROBES:
    encoded = tokenizer.encode(text, add_special_tokens=True)
    if 0 in encoded.special_tokens_mask:
      return tuple(encoded.ids[:encoded.special_tokens_mask.index(0)])
  return ()


def drop_beyond(serialized: str, vocab_size: int) -> tuple[str, list[str]]:
  """Drops the added tokens that have no row in an embedding.

  Text that spells a dropped token is ordinary text, so its id is never given to the
  model. The model never draws it either, because it has no row for it.

  Args:
    serialized: a `tokenizers` .json.
    vocab_size: rows of the embedding.

  Returns:
    The .json, which is the same text if nothing was dropped; and the dropped tokens.

  Raises:
    ValueError: it is no tokenizer, or tokens that are not added ones have no row.
  """
  parsed = parse(serialized)
  vocabulary = parsed.get_vocab(with_added_tokens=True)
  added = {token.content for token in parsed.get_added_tokens_decoder().values()}
  beyond = {token: index for token, index in vocabulary.items() if index >= vocab_size}
  if not beyond:
    return serialized, []
  if beyond.keys() - added:
    raise ValueError(f"the tokenizer has id {max(vocabulary.values())} and the embedding {vocab_size} rows; "
                     "use the tokenizer that belongs to the model")
  fields = json.loads(serialized)
  fields["added_tokens"] = [token for token in fields["added_tokens"] if token["content"] not in beyond]
  words = fields["model"].get("vocab")
  if isinstance(words, dict):
    fields["model"]["vocab"] = {word: index for word, index in words.items() if word not in beyond}
  elif isinstance(words, list):
    fields["model"]["vocab"] = [word for word in words if word[0] not in beyond]
  text = json.dumps(fields, ensure_ascii=False)
  if max(parse(text).get_vocab(with_added_tokens=True).values(), default=-1) >= vocab_size:
    raise ValueError(f"the tokenizer has ids beyond the {vocab_size} rows of the embedding; use the tokenizer that "
                     "belongs to the model")
  return text, sorted(beyond, key=beyond.get)
