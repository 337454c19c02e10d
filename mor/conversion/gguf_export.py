"""Writes a model without routing as a GGUF file, which llama.cpp loads.

Every unrolled layer has its own tensors, into which LoRA is folded (`unrolled.py`). The
architecture is "llama", with `qk_norm` "qwen3". A matrix is rounded once to the type; vectors
stay in float32, as llama.cpp asks. Ids that the tokenizer does not have are never drawn, so their
rows of the embedding and of the head are left out.

In float32, with keys and values in float32 as well (llama-cpp-python: type_k=0, type_v=0), the
greedy tokens of llama.cpp are those of `generate`. In 16 bits it also rounds activations.

A file appears whole or not at all.

Source: llama.cpp convert_hf_to_gguf.py; docs/gguf.md in ggml.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import itertools
import math
import os
import pathlib
from typing import Any

import gguf
import ml_dtypes  # also teaches NumPy "bfloat16"
import numpy as np

from mor import model_config
from mor.conversion import gguf_import
from mor.conversion import gguf_tokenizer
from mor.conversion import layout
from mor.conversion import rope_factors
from mor.conversion import unrolled

_VOCABULARY = ("params/embedding", "params/head")  # leaves with a row for each id
_TYPES = {  # dtype -> type of numbers, of files, and of arrays
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32, np.float32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16, np.float16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16, ml_dtypes.bfloat16),
}


def write(path: str | os.PathLike, model: model_config.ModelConfig, variables: Mapping[str, Any], *, tokenizer: str,
          chat_template: str | None, context: int, dtype: str, special_ids: Mapping[str, Sequence[int]]) -> None:
  """Writes a file for `llama-cli -m` and `llama_cpp.Llama`.

  Args:
    path: file to create, NAME.gguf.
    model: config of the model.
    variables: {"params": …}.
    tokenizer: JSON of the `tokenizers` library.
    chat_template: Jinja template.
    context: number of positions that the model was trained with.
    dtype: of matrices, "float32", "float16" or "bfloat16".
    special_ids: see `gguf_tokenizer.describe`.

  Raises:
    ValueError: model, tokenizer or numbers have no place in such a file, or the path
      is no new .gguf; nothing is written then.
    OSError: the file cannot be written.
  """
  path = pathlib.Path(path).expanduser().absolute()
  if path.suffix != ".gguf":
    raise ValueError(f"output={str(path)!r} is no name of a GGUF file; give --output={path.name or 'model'}.gguf")
  if path.exists():
    raise ValueError(f"{path} is there; name a new file, or remove it")
  if dtype not in _TYPES:
    raise ValueError(f"dtype={dtype!r}; use {', '.join(map(repr, _TYPES))}")
  unrolled.check(model)
  family = "qwen3" if model.qk_norm else "llama"
  if model.qk_norm and model.rope_scaling.factor != 1.0:
    raise ValueError(f"model.rope_scaling.factor={model.rope_scaling.factor} with qk_norm: llama.cpp reads no such "
                     "scaling for qwen3; export with --target=llama")
  layout.check(variables, model)
  described = gguf_tokenizer.describe(tokenizer, special_ids, chat_template)
  num_tokens = len(described["tokenizer.ggml.tokens"])
  if num_tokens > model.vocab_size:
    raise ValueError(f"the tokenizer has ids up to {num_tokens - 1} and the model {model.vocab_size} embeddings; give "
                     "the tokenizer that it was trained with")
  fields = _fields(model, num_tokens, context)
  with _publish(path) as partial:
    writer = _Writer(partial, family)
    writer.add_name(path.stem)
    writer.add_file_type(_TYPES[dtype][1])
    for key, value in ({f"{family}.{key}": value for key, value in fields.items()} | described).items():
      writer.add(key, value)
    with contextlib.closing(writer):
      _write_tensors(writer, model, variables, num_tokens, dtype, gguf_import.FAMILIES[family][0])


def _fields(model: model_config.ModelConfig, num_tokens: int, context: int) -> dict[str, int | float]:
  """Returns what a file says of the model, by key without the architecture."""
  scaling = ({} if model.rope_scaling.factor == 1.0 else
             {"rope.scaling.original_context_length": model.rope_scaling.original_context})
  return {
      "block_count": model.num_layers, "context_length": context, "embedding_length": model.d_model,
      "feed_forward_length": model.d_ff, "attention.head_count": model.num_heads,
      "attention.head_count_kv": model.num_kv_heads, "attention.key_length": model.head_dim,
      "attention.value_length": model.head_dim, "attention.layer_norm_rms_epsilon": float(model.norm_eps),
      "rope.dimension_count": model.head_dim, "rope.freq_base": float(model.rope_theta), "vocab_size": num_tokens,
      **scaling}


def _write_tensors(writer: "_Writer", model: model_config.ModelConfig, variables: Mapping[str, Any], num_tokens: int,
                   dtype: str, form: str) -> None:
  """Writes names and shapes, then one tensor at a time."""
  kind, _, numbers = _TYPES[dtype]
  entries = layout.layout(model, form)
  rows = {entry.key: num_tokens for entry in entries if entry.path in _VOCABULARY}
  shapes = {entry.key: (rows.get(entry.key, entry.shape[0]), *entry.shape[1:]) for entry in entries}
  factors = {}
  if model.rope_scaling.factor != 1.0:
    divisors_H = rope_factors.divisors(model.rope_scaling, model.rope_theta, model.head_dim // 2)
    factors = {"rope_freqs.weight": np.float32(divisors_H)}
  for key, shape in (shapes | {key: value.shape for key, value in factors.items()}).items():
    is_matrix = len(shape) == 2
    size = math.prod(shape) * np.dtype(numbers if is_matrix else np.float32).itemsize
    raw = kind if is_matrix else gguf.GGMLQuantizationType.F32
    writer.add_tensor_info(key, shape, np.dtype(np.float32), size, raw)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for key, theirs in itertools.chain(unrolled.write(variables, model, form), factors.items()):
    writer.write_tensor_data(_cast(key, theirs[:rows.get(key)], numbers))


def _cast(key: str, theirs: np.ndarray, numbers: Any) -> np.ndarray:
  """Returns a tensor as it is stored; raises ValueError if it had numbers that the type has not."""
  if theirs.ndim == 1:
    return np.ascontiguousarray(theirs, np.float32)
  with np.errstate(over="ignore"):
    stored = np.ascontiguousarray(theirs.astype(numbers))
  if np.isinf(stored).any():
    raise ValueError(f"tensor {key!r} has numbers up to {np.abs(theirs).max():.3g}, which {np.dtype(numbers).name} does "
                     "not hold; export with --dtype=bfloat16 or float32")
  return stored.view(np.uint16) if stored.itemsize == 2 else stored


class _Writer(gguf.GGUFWriter):
  """The library's writer, and empty lists: llama.cpp asks for merges where there are none, too."""

  def add(self, key: str, value: Any) -> None:
    """Adds one value; a list is of strings or of whole numbers."""
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32,
             str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}
    is_numbers = isinstance(value, list) and value and isinstance(value[0], int)
    self.add_key_value(key, value, kinds[type(value)],
                       gguf.GGUFValueType.INT32 if is_numbers else gguf.GGUFValueType.STRING)

  def _pack_val(self, val, vtype, add_vtype, sub_type=None):
    if vtype == gguf.GGUFValueType.ARRAY and not val:
      return b"".join((self._pack("I", vtype), self._pack("I", sub_type), self._pack("Q", 0)))
    return super()._pack_val(val, vtype, add_vtype, sub_type)


@contextlib.contextmanager
def _publish(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a file beside `path`, and renames it to `path` when it is complete."""
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    yield partial
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
