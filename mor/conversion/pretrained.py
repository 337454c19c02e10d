"""A pretrained model as we read it: config, parameters, tokenizer.

`assemble` turns named tensors (`tensors.py`) into our tree by `layout.layout`,
after it has found every one with the right shape and nothing else. Tensors are
read one at a time into the stacked leaves, so the model is held once.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import pathlib
import re
from typing import Any

from absl import logging
import numpy as np

from mor import fields as fields_lib
from mor import json_file
from mor import model_config
from mor import parameters
from mor.conversion import layout
from mor.conversion import tensors as tensors_lib
from mor.conversion import wrapped
from mor.data import special_tokens
from mor.data import tokenizer as tokenizer_lib

# Fields that no checkpoint of others tells: those that do not change a model's numbers, with their defaults.
EXECUTION = {name: fields_lib.plain(getattr(model_config.ModelConfig(), name)) for name in (
    "execution", "attention", "cross_documents", "compute_dtype", "remat", "scan_layers", "recursions_train")}
NO_ROUTER = model_config.RouterConfig(name="fixed", sampling="none")
NO_SCALING = model_config.RopeScalingConfig()

# Fields that every file tells, in its own words: a default must not stand in for them.
_TOLD = frozenset("vocab_size d_model num_heads num_kv_heads head_dim d_ff num_layers rope_theta norm_eps init_std "
                  "tie_embeddings".split())
_SIZES = ("vocab_size", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "num_layers")
_BUFFERS = re.compile(r".*\brotary_emb\.inv_freq")  # follow from the config; old files have them
_SHOWN = 4  # names in a message
_UNTIED = {  # where a checkpoint's copies of a shared parameter differ: what it is instead
    "attention": "it was trained with untied attention, a defect of upstream's expert-choice before its fix 82c97f2; "
                 "it is another model, import it with sharing='vanilla' if nothing routes",
    "norm": "it was trained with recursive.ln_share=false, which is unsupported",
    "ffw": "it does not share parameters as the config says; check sharing and num_recursions",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """A pretrained model.

  Attributes:
    model: what the file describes; sharing "vanilla" unless it is a recursive one.
    variables: {"params": …} and, with loss-free balancing, {"balance": …}; float32.
    tokenizer: text of a `tokenizers` .json, or None.
    chat_template: Jinja text, or None.
    context: positions it was trained for.
    special_ids: ids of "bos", "eos", "pad", "unk", as far as known; "eos" may be several.
    special_tokens: their text; the first where there are several.
    add_bos: True if a text starts with "bos".
    opening: ids that its makers put before a text.
    eos_id: id between documents in training; None if there is no tokenizer, or it has none.
  """

  model: model_config.ModelConfig
  variables: dict[str, Any]
  tokenizer: str | None
  chat_template: str | None
  context: int
  special_ids: dict[str, tuple[int, ...]]
  special_tokens: dict[str, str]
  add_bos: bool
  opening: tuple[int, ...]
  eos_id: int | None

  @property
  def stops(self) -> tuple[int, ...]:
    """Ids that end a text: all that its makers name, and the one between documents."""
    return tuple(dict.fromkeys((*self.special_ids.get("eos", ()), *([] if self.eos_id is None else [self.eos_id]))))


def tokenizer_fields(where: str | pathlib.Path, tokenizer: str | None, said: special_tokens.SpecialTokens,
                     vocab_size: int) -> dict[str, Any]:
  """Returns the fields of a `Source` that are about its tokenizer, without the ids that the model has no row for.

  Args:
    where: folder or file, for messages.
    tokenizer: text of a `tokenizers` .json, or None.
    said: special tokens that the files name.
    vocab_size: rows of the embedding.

  Raises:
    ValueError: it is no tokenizer, or not the one of the model.
  """
  def known(ids):
    return tuple(index for index in ids if index < vocab_size)

  eos_id = None
  if tokenizer is not None:
    try:
      tokenizer, dropped = special_tokens.drop_beyond(tokenizer, vocab_size)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error
    if dropped:
      logging.warning("%s: the embedding has %d rows, and none for the added tokens %s; they are left out, so text that "
                      "spells them is ordinary text.", where, vocab_size, _some(dropped))
    eos_id = tokenizer_lib.choose_eos(special_tokens.parse(tokenizer), lambda: known(said.stops))
  if known(said.opening) != said.opening:
    raise ValueError(f"{where}: a text begins with the ids {said.opening}, and the embedding has {vocab_size} rows; use "
                     "the tokenizer that belongs to the model")
  ids = {name: known(each) for name, each in said.ids.items()}
  for name in ids:
    if ids[name] != said.ids[name]:
      logging.warning("%s: the embedding has %d rows, so the model never draws %s_token_id=%s.", where, vocab_size, name,
                      said.ids[name])
  return dict(tokenizer=tokenizer, special_ids={name: each for name, each in ids.items() if each},
              special_tokens=said.tokens, add_bos=said.add_bos, opening=said.opening, eos_id=eos_id)


def build(where: pathlib.Path, **said: Any) -> model_config.ModelConfig:
  """Returns the model that the fields of a file tell; it shares nothing unless they say more.

  Raises:
    ValueError: they do not fit together.
  """
  assert _TOLD <= said.keys(), f"a reader forgot {', '.join(sorted(_TOLD - said.keys()))}"
  check_sizes(where, said)
  plain = dict(sharing="vanilla", num_recursions=1, kv_plan="recursion_wise", router=NO_ROUTER)
  try:
    return model_config.ModelConfig(**(plain | said))
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def check_sizes(where: str | pathlib.Path, said: Mapping[str, Any]) -> None:
  """Raises ValueError if a size is one that no model has, because work grows with it before a tensor is looked at."""
  for name in _SIZES:
    if isinstance(said[name], int) and said[name] >= (2**16 if name == "num_layers" else 2**31):
      raise ValueError(f"{where}: {name}={json_file.show(said[name])} is no size of a model; fetch the file again")


def check_context(where: str | pathlib.Path, name: str, positions: int) -> int:
  """Returns the number of positions that a field says; raises ValueError if it is no such number."""
  if not 1 <= positions < 2**31:
    raise ValueError(f"{where}: {name}={positions}; give a number of positions")
  return positions


def assemble(tensors: tensors_lib.Tensors, model: model_config.ModelConfig, form: str) -> dict[str, Any]:
  """Returns our variables from the tensors of a file, float32.

  A parameter that several layers share may come once per use, all equal, or
  once: writers of safetensors keep one. A head may come though it is tied, if
  it equals the embedding.

  Args:
    tensors: of the file.
    model: what it should hold.
    form: one of `layout.FORMS`.

  Raises:
    ValueError: a tensor is missing, superfluous, of another shape or type, or
      differs from what it is tied to.
  """
  if model.sharing == "vanilla" and model.num_layers > len(tensors.shapes):
    raise ValueError(f"{tensors.where} has {len(tensors.shapes)} tensors, its config says {model.num_layers} layers; "
                     "is it whole, and is it what its config says?")
  entries = layout.layout(model, form)
  tensors = wrapped.unwrap(tensors, [entry.key for entry in entries],
                           re.compile(f"{_BUFFERS.pattern}|{re.escape(_head(form))}"))
  _check(tensors, model, entries, form)
  lengths: dict[str, tuple[int, ...]] = {}  # of the leading axes of each leaf that is not made yet
  for entry in entries:
    lengths[entry.path] = max(lengths.get(entry.path, ()), tuple(i + 1 for i in entry.index))
  variables: dict[str, Any] = {}
  first: dict[tuple[str, tuple[int, ...]], str] = {}  # the tensor that filled a place
  for entry in entries:
    if entry.key not in tensors.shapes:
      continue
    ours = entry.read(tensors_lib.read_finite(tensors, entry.key))
    if entry.path in lengths:
      parameters.put(variables, entry.path, np.empty((*lengths.pop(entry.path), *ours.shape), np.float32))
    leaf = parameters.get(variables, entry.path)
    known = first.setdefault((entry.path, entry.index), entry.key)
    if known == entry.key:
      leaf[entry.index] = ours
    elif not np.array_equal(leaf[entry.index], ours):
      part = "norm" if entry.path.endswith("norm") else entry.path.split("/")[2]
      raise ValueError(f"{tensors.file(entry.key)}: tensor {entry.key!r} differs from {known!r}, to which it is tied: "
                       f"{_UNTIED[part]}")
  _check_head(tensors, model, variables["params"]["embedding"], form)
  return variables


def _check(tensors: tensors_lib.Tensors, model: model_config.ModelConfig, entries: Iterable[layout.Entry],
           form: str) -> None:
  """Raises ValueError unless names and shapes are those of the model."""
  missing: dict[tuple[str, tuple[int, ...]], str] = {}
  for entry in entries:
    missing.setdefault((entry.path, entry.index), entry.key)
  shapes: dict[str, tuple[int, ...]] = {}
  for entry in entries:
    shapes[entry.key] = entry.shape
    if entry.key in tensors.shapes:
      missing.pop((entry.path, entry.index), None)
  if missing:
    raise ValueError(f"{tensors.where} has no tensor {_some(missing.values())}; is it whole, and is it what its "
                     "config says?")
  shapes[_head(form)] = (model.vocab_size, model.d_model)
  extra = [key for key in tensors.shapes if key not in shapes and not _BUFFERS.fullmatch(key)]
  if extra:
    raise ValueError(f"{tensors.file(extra[0])} has tensor {_some(extra)}, which a {form} model of "
                     f"{model.num_layers} layers as its config says has not; only these layers are supported")
  for key, shape in shapes.items():
    if tensors.shapes.get(key, shape) != shape:
      raise ValueError(f"{tensors.file(key)}: tensor {key!r} has shape {tuple(tensors.shapes[key])}, its config says "
                       f"{shape}; take both from one place")


def _check_head(tensors: tensors_lib.Tensors, model: model_config.ModelConfig, embedding_VD: np.ndarray,
                form: str) -> None:
  key = _head(form)
  if model.tie_embeddings and key in tensors.shapes and not np.array_equal(tensors.read(key), embedding_VD):
    raise ValueError(f"{tensors.file(key)}: tensor {key!r} differs from the embedding, though the head is tied to it; "
                     "say tie_word_embeddings=false in its config if it is not")


def _head(form: str) -> str:
  row = parameters.find("params/head")
  return f"{row.gguf if form.startswith('gguf') else row.hf}.weight"


def _some(keys: Iterable[str]) -> str:
  """Returns a few names, and how many more there are."""
  keys = list(keys)
  shown = ", ".join(repr(key) for key in keys[:_SHOWN])
  return shown if len(keys) <= _SHOWN else f"{shown} and {len(keys) - _SHOWN} more"
