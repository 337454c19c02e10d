"""Reads a GGUF file of the Llama family: metadata, dequantised tensors, tokenizer.

The `gguf` library parses and dequantises. Before that, every length that the file
claims is checked to lie within it.

The tokenizer becomes a `tokenizers` .json; byte-level BPE only, split as
`gguf_tokenizer.PARTS` says. A file that names none, or "default", was converted before
names were kept, so its tokenizer is unknown, and it is refused.

Source: llama.cpp gguf-py (gguf_reader.py, constants.py), docs/gguf.md in ggml,
src/llama-model.cpp for defaults, src/llama-vocab.cpp.
"""

from collections.abc import Callable, Mapping
import json
import math
import pathlib
from typing import Any

import gguf
import numpy as np

from mor import json_file
from mor import model_config
from mor.conversion import gguf_tokenizer
from mor.conversion import pretrained
from mor.conversion import rope_factors
from mor.conversion import tensors as tensors_lib
from mor.data import special_tokens

FAMILIES = {  # architecture -> form of its names (`layout.FORMS`), and fields of our config that it fixes
    "llama": ("gguf", {}),
    "qwen3": ("gguf_halves", dict(qk_norm=True)),
}
_ALTERING = {  # key -> values with which it alters nothing
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
}
_KNOWN = {"block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
          "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length",
          "attention.value_length", "rope.freq_base", "rope.dimension_count", "vocab_size", "tensor_data_layout",
          "rope.scaling.original_context_length", "rope.scaling.finetuned", *_ALTERING}

_IDS = dict(bos=("bos",), eos=("eos", "eot", "eom"), pad=("padding",), unk=("unknown",))
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_CONTEXT = 8192  # positions that Llama 3 was trained on before its context was extended
_QUOTES = "'\""  # around the message of a KeyError
_SWAPPED = {"F32": "u4", "F16": "u2"}  # type -> what is turned in a file of the other byte order
_ADDED = {int(gguf.TokenType.CONTROL): True, int(gguf.TokenType.USER_DEFINED): False}  # type -> special


def read(path: pathlib.Path) -> pretrained.Source:
  """Reads the file.

  Raises:
    ValueError: it is no GGUF file, cut short, or of a kind that is unsupported.
    OSError: it cannot be read.
  """
  metadata, tensors, model = _begin(path)
  form, _ = FAMILIES[metadata.family]
  context = pretrained.check_context(path, "context_length", metadata.of_family("context_length", int))
  return pretrained.Source(
      model=model, variables=pretrained.assemble(tensors, model, form), context=context, **_tokenizer(metadata.take, str(path), model.vocab_size))


def describe(path: pathlib.Path) -> model_config.ModelConfig:
  """Returns the model alone; raises as `read` does."""
  return _begin(path)[2]


def _begin(path: pathlib.Path) -> "tuple[_Metadata, _Tensors, model_config.ModelConfig]":
  if not path.is_file():
    raise ValueError(f"gguf:{path} is no file; name the .gguf itself")
  reader = _open(path)
  metadata = _Metadata(path, reader.fields)
  if metadata.family not in FAMILIES:
    raise ValueError(f"{path}: architecture {metadata.family!r} is unsupported; use "
                     f"{' or '.join(repr(family) for family in FAMILIES)}")
  if metadata.take("split.count", int, 1) > 1:
    raise ValueError(f"{path} is one part of a split model; merge the parts with llama-gguf-split --merge")
  tensors = _Tensors(path, reader)
  return metadata, tensors, pretrained.build(path, **_fields(metadata, tensors))


def _fields(metadata: "_Metadata", tensors: "_Tensors") -> dict[str, Any]:
  """Returns the fields of `ModelConfig` that the metadata tell."""
  take, where, family = metadata.of_family, tensors.where, metadata.family
  for key in metadata.keys(f"{family}."):
    if key not in _KNOWN:
      raise ValueError(f"{where}: {family}.{key}={take(key)!r} is unknown here; only plain models are supported")
  for key, plain in _ALTERING.items():
    value = take(key, None, plain[0])
    if value not in plain:
      raise ValueError(f"{where}: {family}.{key}={value!r} is unsupported; only {plain[0]!r} is a plain model")
  heads, d_model = take("attention.head_count", int), take("embedding_length", int)
  head_dim = take("attention.key_length", int, d_model // max(heads, 1))
  for key in ("attention.value_length", "rope.dimension_count"):
    if take(key, int, head_dim) != head_dim:
      raise ValueError(f"{where}: {family}.{key}={take(key)} with heads of width {head_dim} is unsupported; "
                       "they must be equal")
  rope_theta = take("rope.freq_base", float, 10000.0)
  return dict(
      vocab_size=take("vocab_size", int, tensors.shapes.get("token_embd.weight", (0,))[0]), d_model=d_model,
      num_heads=heads, num_kv_heads=take("attention.head_count_kv", int, heads), head_dim=head_dim,
      d_ff=take("feed_forward_length", int), num_layers=take("block_count", int),
      rope_theta=rope_theta, rope_scaling=_rope_scaling(metadata, tensors, head_dim, rope_theta),
      norm_eps=take("attention.layer_norm_rms_epsilon", float), init_std=0.02,
      tie_embeddings="output.weight" not in tensors.shapes, **FAMILIES[family][1])


def _rope_scaling(metadata: "_Metadata", tensors: "_Tensors", head_dim: int,
                  rope_theta: float) -> model_config.RopeScalingConfig:
  """Returns the scaling of Llama 3 that the file's divisors of its frequencies mean, or none."""
  if tensors.rope_factors_H is None:
    return pretrained.NO_SCALING
  if tensors.rope_factors_H.shape != (head_dim // 2,):
    raise ValueError(f"{tensors.where}: tensor {_ROPE_FACTORS!r} has shape {tensors.rope_factors_H.shape}, its metadata "
                     f"say {(head_dim // 2,)}; fetch the file again")
  context = metadata.of_family("rope.scaling.original_context_length", int, 0) or _LLAMA3_CONTEXT
  try:
    return rope_factors.scaling(tensors.rope_factors_H, rope_theta, context)
  except ValueError as error:
    raise ValueError(f"{tensors.where}: tensor {_ROPE_FACTORS!r}: {error}; convert the Hugging Face folder that the file "
                     "was made from, with --source=hf:FOLDER") from error


class _Metadata:
  """Keys and values of the file, with their types checked."""

  def __init__(self, path: pathlib.Path, fields: Mapping[str, gguf.ReaderField]):
    self._path, self._fields = path, fields
    self.family = self.take("general.architecture", str)

  def keys(self, prefix: str) -> list[str]:
    """Returns the keys that begin with a prefix, without it."""
    return [key.removeprefix(prefix) for key in self._fields if key.startswith(prefix)]

  def take(self, key: str, kind: type | None = None, *default: Any) -> Any:
    """Returns a value; a float as the shortest decimal that its 32 bits mean."""
    if key not in self._fields:
      if default:
        return default[0]
      raise ValueError(f"{self._path} has no {key}; it is incomplete")
    field = self._fields[key]
    try:
      value = field.contents()
    except (UnicodeDecodeError, IndexError) as error:
      raise ValueError(f"{self._path}: {key} is broken ({error}); fetch the file again") from error
    if field.types[0] == gguf.GGUFValueType.FLOAT32:
      value = float(str(np.float32(value)))
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f"{self._path}: {key}={value} is no number; fetch the file again")
    if kind is not None and type(value) is not kind:
      raise ValueError(f"{self._path}: {key} is a {type(value).__name__}, expected one {kind.__name__}; "
                       "a value for each layer is unsupported")
    return value

  def of_family(self, key: str, kind: type | None = None, *default: Any) -> Any:
    """Takes the value of a key that begins with the architecture."""
    return self.take(f"{self.family}.{key}", kind, *default)


class _Tensors:
  """A `tensors.Tensors`."""

  def __init__(self, path: pathlib.Path, reader: gguf.GGUFReader):
    self.where = str(path)
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    self._swapped = reader.byte_order == "S"
    self.shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()}
    self.rope_factors_H = None
    if _ROPE_FACTORS in self.shapes:  # part of the config, not of the weights
      self.rope_factors_H = tensors_lib.read_finite(self, _ROPE_FACTORS)
      del self.shapes[_ROPE_FACTORS]

  def file(self, key: str) -> str:
    return self.where

  def read(self, key: str) -> np.ndarray:
    tensor = self._tensors[key]
    try:
      return np.asarray(gguf.dequantize(self._native(key), tensor.tensor_type), np.float32)
    except NotImplementedError as error:
      raise ValueError(f"{self.where}: tensor {key!r} has unsupported quantisation {tensor.tensor_type.name}; "
                       "quantise the model to another type") from error

  def _native(self, key: str) -> np.ndarray:
    """Returns the data of a tensor in the byte order of this machine."""
    tensor = self._tensors[key]
    if not self._swapped:
      return tensor.data
    if tensor.tensor_type.name not in _SWAPPED:
      raise ValueError(f"{self.where}: tensor {key!r} is of type {tensor.tensor_type.name} in a file of the other "
                       f"byte order, where only {', '.join(_SWAPPED)} are read; turn it with gguf-convert-endian of llama.cpp")
    raw = np.frombuffer(tensor.data.tobytes(), _SWAPPED[tensor.tensor_type.name]).byteswap()
    return raw.view(tensor.data.dtype.newbyteorder("=")).reshape(tensor.data.shape)


class _Reader(gguf.GGUFReader):
  """The library's reader, which does not check that lengths lie within the file."""

  def _get(self, offset, dtype, count=1, override_order=None):
    end = int(offset) + np.dtype(dtype).itemsize * int(count)
    if end > len(self.data):
      raise ValueError(f"the header reads on to byte {end} of {len(self.data)}: the file is cut short")
    return super()._get(offset, dtype, count, override_order)

  def _build_tensors(self, start_offs, fields):
    for field in fields:
      dims, code, offset = field.parts[3].tolist(), int(field.parts[4][0]), int(field.parts[5][0])
      known = {int(kind): kind for kind in gguf.GGMLQuantizationType}
      if code not in known:
        raise ValueError(f"tensor {field.name!r} has unknown type {code}; use a file of a known quantisation")
      block, size = gguf.GGML_QUANT_SIZES[known[code]]
      if not dims or dims[0] % block:
        raise ValueError(f"tensor {field.name!r} of shape {tuple(dims[::-1])} does not divide into {known[code].name} "
                         f"blocks of {block}")
      end = start_offs + offset + math.prod(dims) // block * size
      if end > len(self.data):
        raise ValueError(f"tensor {field.name!r} ends at byte {end} of {len(self.data)}: the file is cut short")
    super()._build_tensors(start_offs, fields)


def _open(path: pathlib.Path) -> gguf.GGUFReader:
  try:
    return _Reader(path)
  except OSError:
    raise
  except Exception as error:  # the library lets through what NumPy raises on broken bytes
    raise ValueError(f"{path}: {json_file.first_line(error).strip(_QUOTES)}; fetch the file again") from error


def _tokenizer(take: Callable[..., Any], where: str, vocab_size: int) -> dict[str, Any]:
  """Returns the fields of a `Source` that the metadata tell of the tokenizer.

  Args:
    take: returns the value of a key, given its type and a default.
    where: name of the file, for messages.
    vocab_size: rows of the embedding.

  Raises:
    ValueError: a tokenizer of a kind that is unsupported, or a broken one.
  """
  named = {name: [take(f"tokenizer.ggml.{key}_token_id", int, None) for key in keys] for name, keys in _IDS.items()}
  ids = {name: tuple(dict.fromkeys(index for index in each if index is not None)) for name, each in named.items()}
  ids = {name: each for name, each in ids.items() if each}
  template = take("tokenizer.chat_template", str, None)
  kind = take("tokenizer.ggml.model", str, "none")
  if kind in ("none", "no_vocab"):
    said = special_tokens.SpecialTokens((), ids, {}, False)
    return dict(chat_template=template, **pretrained.tokenizer_fields(where, None, said, vocab_size))
  if kind != "gpt2":
    raise ValueError(f"{where}: tokenizer.ggml.model={kind!r} is unsupported; use a model with 'gpt2' (byte-level BPE)")
  pre = take("tokenizer.ggml.pre", str, "default")
  if pre not in gguf_tokenizer.PARTS:
    raise ValueError(f"{where}: tokenizer.ggml.pre={pre!r} is unsupported; use one of "
                     f"{', '.join(gguf_tokenizer.PARTS)}")
  tokens = take("tokenizer.ggml.tokens", list)
  types = take("tokenizer.ggml.token_type", list, [int(gguf.TokenType.NORMAL)] * len(tokens))
  merges = take("tokenizer.ggml.merges", list)
  if not all(isinstance(text, str) for text in (*tokens, *merges)):
    raise ValueError(f"{where}: tokenizer.ggml.tokens or merges are no text; fetch the file again")
  if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
    raise ValueError(f"{where}: {len(set(tokens))} different tokens of {len(tokens)} with {len(types)} types; "
                     "fetch the file again")
  bad = [index for each in ids.values() for index in each if not 0 <= index < len(tokens)]
  if bad:
    raise ValueError(f"{where}: special token {bad[0]} of {len(tokens)} tokens; fetch the file again")
  add_bos = take("tokenizer.ggml.add_bos_token", bool, pre in gguf_tokenizer.WHOLE_WORDS)
  bos = ids.get("bos", (None,))[0] if add_bos else None
  text = json.dumps(_tokenizer_fields(tokens, types, merges, pre, bos), ensure_ascii=False)
  try:
    special_tokens.parse(text)
  except ValueError as error:
    raise ValueError(f"{where}: its tokenizer is {error}") from error
  said = special_tokens.SpecialTokens(() if bos is None else (bos,), ids,
                                      {name: tokens[each[0]] for name, each in ids.items()}, bos is not None)
  return dict(chat_template=template, **pretrained.tokenizer_fields(where, text, said, vocab_size))


def _tokenizer_fields(tokens: list[str], types: list[int], merges: list[str], pre: str,
                      bos: int | None) -> dict[str, Any]:
  """Returns the content of the .json."""
  added = [dict(id=index, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False,
                special=_ADDED[kind])
           for index, (token, kind) in enumerate(zip(tokens, types)) if kind in _ADDED]
  first = [] if bos is None else [dict(SpecialToken=dict(id=tokens[bos], type_id=0))]
  texts = [dict(Sequence=dict(id=name, type_id=index)) for index, name in enumerate("AB")]
  processor = dict(
      type="TemplateProcessing", single=first + texts[:1], pair=first + texts,
      special_tokens={} if bos is None else {tokens[bos]: dict(id=tokens[bos], ids=[bos], tokens=[tokens[bos]])})
  return dict(
      version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
      pre_tokenizer=dict(type="Sequence", pretokenizers=gguf_tokenizer.PARTS[pre]),
      post_processor=None if bos is None else processor, decoder=gguf_tokenizer.BYTES | dict(use_regex=True),
      model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                 fuse_unk=False, byte_fallback=False, ignore_merges=pre in gguf_tokenizer.WHOLE_WORDS,
                 vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
