"""The tokenizer of an export: files with which `AutoTokenizer` gives the ids that `generate` asks the model with.

  tokenizer.json           as the run reads it, with a post-processor that opens a text
  tokenizer_config.json    special tokens by name, context, chat template
  generation_config.json   ids that begin, end and pad a text

`AutoTokenizer.from_pretrained(folder)(text)` is the opening and the tokens of the text;
with `add_special_tokens=False` the opening is left out. Text that spells a special token
is ordinary text, as in training. Only a chat template writes special tokens into text,
so beside a template they are matched.

Source: transformers tokenization_utils_tokenizers; tokenizers processors.TemplateProcessing.
"""

from collections.abc import Mapping, Sequence
import json
import re
from typing import Any

import tokenizers
from tokenizers import processors

_PROBES = ("", "a", "two words")


def token_ids(special_ids: Mapping[str, Sequence[int]]) -> dict[str, int | list[int] | None]:
  """Returns the ids by field of Hugging Face; several ids of "eos" are a list."""
  bos, eos, pad = (list(special_ids.get(name, ())) for name in ("bos", "eos", "pad"))

  def first(ids):
    return ids[0] if ids else None

  return {"bos_token_id": first(bos), "eos_token_id": eos if len(eos) > 1 else first(eos),
          "pad_token_id": first(pad or eos)}


def files(tokenizer: str | None, chat_template: str | None, context: int, vocab_size: int,
          special_ids: Mapping[str, Sequence[int]]) -> dict[str, str]:
  """Returns the content of each file of tokenizer and generation, by file name.

  Args:
    tokenizer: JSON of the `tokenizers` library; None writes generation_config.json alone.
    chat_template: Jinja template, as transformers reads it.
    context: number of positions that the model was trained with.
    vocab_size: number of embeddings.
    special_ids: ids that open, begin, end and pad a text, as `hf_export.write` takes them.

  Raises:
    ValueError: the tokenizer does not fit the model or the ids, or a template has none.
  """
  ids = token_ids(special_ids)
  generation = {"generation_config.json": json.dumps(ids, indent=2)}
  if tokenizer is None:
    if chat_template is not None:
      raise ValueError("a chat_template without a tokenizer; give both")
    return generation
  parsed = tokenizers.Tokenizer.from_str(tokenizer)
  size = max(parsed.get_vocab(with_added_tokens=True).values()) + 1
  if size > vocab_size:
    raise ValueError(f"the tokenizer has ids up to {size - 1} and the model {vocab_size} embeddings; give the "
                     "tokenizer that it was trained with")

  def name_of(field: str, index: int) -> str:
    token = parsed.id_to_token(index)
    if token is None:
      raise ValueError(f"{field}={index} is no token of the tokenizer; use an id below {size}")
    return token

  opening = list(special_ids.get("opening", ()))
  names = [name_of("opening", index) for index in opening]
  config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
                            "padding_side": "left", "clean_up_tokenization_spaces": False,
                            "split_special_tokens": chat_template is None}
  for field, index in ids.items():
    if index is not None:
      config[field.removesuffix("_id")] = name_of(field, index[0] if isinstance(index, list) else index)
  begins = opening == [ids["bos_token_id"]]
  if begins and re.fullmatch(r"[^\s:$]+", config["bos_token"]):  # transformers makes a template string of it
    config["add_bos_token"] = True
  if chat_template is not None:
    config["chat_template"] = chat_template
  return {**generation, "tokenizer.json": _with_opening(tokenizer, parsed, opening, names),
          "tokenizer_config.json": json.dumps(config, indent=2)}


def _with_opening(serialized: str, parsed: tokenizers.Tokenizer, opening: list[int], names: list[str]) -> str:
  """Returns the tokenizer whose texts begin with `opening`; one that opens a text so is returned as it is."""
  parsed.no_truncation()
  parsed.no_padding()
  if all(parsed.encode(text).ids == opening + parsed.encode(text, add_special_tokens=False).ids for text in _PROBES):
    return serialized
  fields = json.loads(serialized)
  old = fields.get("post_processor") or {}
  kept = [processors.ByteLevel(trim_offsets=part["trim_offsets"])  # it moves offsets and adds no token
          for part in old.get("processors", [old]) if part.get("type") == "ByteLevel"]
  single = "opening:0 $A:0" if opening else "$A:0"
  special = [{"id": "opening", "ids": opening, "tokens": names}] if opening else []
  parsed.post_processor = processors.Sequence([*kept, processors.TemplateProcessing(
      single=single, pair=f"{single} $B:1", special_tokens=special)])
  return json.dumps(fields | {"post_processor": json.loads(parsed.to_str())["post_processor"]}, ensure_ascii=False)
