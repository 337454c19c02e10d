"""Reads a GGUF file of architecture llama: metadata, dequantised tensors, tokenizer.

The `gguf` library parses and dequantises. Here a file is first found whole:
every length it claims lies within it.

Source: llama.cpp gguf-py (gguf_reader.py, constants.py), docs/gguf.md in ggml,
src/llama-model.cpp for defaults.
"""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

import gguf
import numpy as np

from mor import model_config
from mor.conversion import gguf_tokenizer
from mor.conversion import pretrained

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


def read(path: pathlib.Path) -> pretrained.Source:
  """Reads the file.

  Raises:
    ValueError: it is no GGUF file, cut short, or of a kind that is unsupported.
    OSError: it cannot be read.
  """
  metadata, tensors, model = _begin(path)
  tokenizer = gguf_tokenizer.read(metadata.take, str(path))
  return pretrained.Source(
      model=model, variables=pretrained.assemble(tensors, model, "gguf"),
      context=metadata.take("llama.context_length", int), **tokenizer)


def describe(path: pathlib.Path) -> model_config.ModelConfig:
  """The model alone; raises as `read` does."""
  return _begin(path)[2]


def _begin(path: pathlib.Path) -> "tuple[_Metadata, _Tensors, model_config.ModelConfig]":
  if not path.is_file():
    raise ValueError(f"gguf:{path} is no file; name the .gguf itself")
  reader = _open(path)
  metadata = _Metadata(path, reader.fields)
  kind = metadata.take("general.architecture", str)
  if kind != "llama":
    raise ValueError(f"{path}: architecture {kind!r} is unsupported; use 'llama'")
  if metadata.take("split.count", int, 1) > 1:
    raise ValueError(f"{path} is one part of a split model; merge the parts with llama-gguf-split --merge")
  tensors = _Tensors(path, reader)
  return metadata, tensors, pretrained.build(path, **_fields(metadata, tensors))


def _fields(metadata: "_Metadata", tensors: "_Tensors") -> dict[str, Any]:
  """Fields of `ModelConfig`."""
  take, where = metadata.take, tensors.where
  for key in metadata.keys("llama."):
    if key not in _KNOWN:
      raise ValueError(f"{where}: llama.{key}={take(f'llama.{key}')!r} is unknown here; only plain Llamas are "
                       "supported")
  for key, plain in _ALTERING.items():
    value = take(f"llama.{key}", None, plain[0])
    if value not in plain:
      raise ValueError(f"{where}: llama.{key}={value!r} is unsupported; only {plain[0]!r} is a plain Llama")
  if "rope_freqs.weight" in tensors.shapes:
    raise ValueError(f"{where}: tensor 'rope_freqs.weight' is rope scaling, which is unsupported")
  heads, d_model = take("llama.attention.head_count", int), take("llama.embedding_length", int)
  head_dim = take("llama.attention.key_length", int, d_model // max(heads, 1))
  for key in ("attention.value_length", "rope.dimension_count"):
    if take(f"llama.{key}", int, head_dim) != head_dim:
      raise ValueError(f"{where}: llama.{key}={take(f'llama.{key}')} with heads of width {head_dim} is unsupported; "
                       "they must be equal")
  vocab_size = take("llama.vocab_size", int, tensors.shapes.get("token_embd.weight", (0,))[0])
  return dict(
      vocab_size=vocab_size, d_model=d_model, num_heads=heads,
      num_kv_heads=take("llama.attention.head_count_kv", int, heads), head_dim=head_dim,
      d_ff=take("llama.feed_forward_length", int), num_layers=take("llama.block_count", int),
      rope_theta=take("llama.rope.freq_base", float, 10000.0),
      norm_eps=take("llama.attention.layer_norm_rms_epsilon", float), init_std=0.02,
      tie_embeddings="output.weight" not in tensors.shapes)


class _Metadata:
  """Keys and values of the file, with their types checked."""

  def __init__(self, path: pathlib.Path, fields: Mapping[str, gguf.ReaderField]):
    self._path, self._fields = path, fields

  def keys(self, prefix: str) -> list[str]:
    """Keys that begin so, without it."""
    return [key.removeprefix(prefix) for key in self._fields if key.startswith(prefix)]

  def take(self, key: str, kind: type | None = None, *default: Any) -> Any:
    """A value; a float as the shortest decimal that its 32 bits mean."""
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
    if kind is not None and type(value) is not kind:
      raise ValueError(f"{self._path}: {key} is a {type(value).__name__}, expected one {kind.__name__}; "
                       "a value for each layer is unsupported")
    return value


class _Tensors:
  """A `tensors.Tensors`."""

  def __init__(self, path: pathlib.Path, reader: gguf.GGUFReader):
    self.where = str(path)
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    self.shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

  def file(self, key: str) -> str:
    return self.where

  def read(self, key: str) -> np.ndarray:
    tensor = self._tensors[key]
    try:
      return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
    except NotImplementedError as error:
      raise ValueError(f"{self.where}: tensor {key!r} has unsupported quantisation {tensor.tensor_type.name}; "
                       "quantise the model to another type") from error


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
    reason = str(error).strip("'\"").splitlines() or [type(error).__name__]
    raise ValueError(f"{path}: {reason[0]}; fetch the file again") from error
