"""Other engines on the weights of our vanilla model: what a user would run instead.

Hugging Face transformers and llama.cpp, each in float32 and bfloat16, with their
own kernels, caches and number formats. A peer decodes greedily a batch of
prompts of equal length: one prefill, then one token of every row a step; the end
of the text does not stop it. Nothing around the steps (tokenizer, `generate`'s
checks, sampler) is in the way.

Source: transformers models/llama; llama.cpp include/llama.h.
"""

from collections.abc import Callable
import importlib.util
import logging
import pathlib
from typing import Any, Protocol, runtime_checkable
import weakref

import numpy as np

from mor import config as config_lib
from mor.conversion import layout

_CONTEXT = 1 << 20  # positions: no limit of ours


@runtime_checkable
class Peer(Protocol):
  """An engine with weights loaded."""

  name: str

  def generate(self, prompts: list[list[int]], num_tokens: int) -> np.ndarray:
    """Returns the most likely next tokens, int32 `[B, num_tokens]`.

    Raises:
      ValueError: no prompt, an empty one, unequal lengths, or no token asked for.
    """


def make(name: str, model: config_lib.ModelConfig, params: dict, threads: int, directory: pathlib.Path) -> Peer:
  """Loads our weights into an engine.

  Args:
    name: one of `PEERS`.
    model: of a vanilla model.
    params: its parameters, see `model/transformer.py`.
    threads: of the engine.
    directory: where an engine that reads files finds its weights; they stay.

  Raises:
    ValueError: an unknown name, a model with recursion, or a missing package.
  """
  if name not in PEERS:
    raise ValueError(f"peer {name!r}; use one of {', '.join(PEERS)}")
  if model.sharing != "vanilla" or model.router.name != "fixed" or model.rope_scaling.factor != 1:
    raise ValueError(f"peer {name!r} of a model with sharing={model.sharing!r}, router {model.router.name!r}, rope "
                     f"factor {model.rope_scaling.factor:g}; other engines run sharing 'vanilla' with router 'fixed' "
                     "and no scaling only")
  build, dtype, packages = PEERS[name]
  missing = [package for package in packages if importlib.util.find_spec(package) is None]
  if missing:
    raise ValueError(f"peer {name!r} needs {', '.join(missing)}; pip install 'mor[peers]'")
  return build(name, model, params, threads, dtype, directory)


def llama_config(shape: Any, **others: Any) -> Any:
  """Returns a `LlamaConfig` of transformers.

  Args:
    shape: has our names of the sizes, as a model's config has.
    others: further fields, by their names there.
  """
  import transformers
  return transformers.LlamaConfig(
      vocab_size=shape.vocab_size, hidden_size=shape.d_model, intermediate_size=shape.d_ff,
      num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
      head_dim=shape.head_dim, bos_token_id=None, eos_token_id=None, pad_token_id=None, attn_implementation="sdpa",
      **others)


class _HuggingFace:
  """`LlamaForCausalLM` with its own growing cache."""

  def __init__(self, name: str, model: config_lib.ModelConfig, params: dict, threads: int, dtype: str,
               directory: pathlib.Path):
    del directory
    import torch
    import transformers
    self.name, self._threads = name, threads
    config = llama_config(
        model, rms_norm_eps=model.norm_eps, rope_parameters=dict(rope_type="default", rope_theta=model.rope_theta),
        tie_word_embeddings=model.tie_embeddings)
    self._model = transformers.LlamaForCausalLM(config).eval().to(getattr(torch, dtype))
    state = {key: torch.from_numpy(np.array(weight, np.float32))
             for key, weight in layout.write({"params": params}, model, "hf")}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    self._model.load_state_dict(state)

  def generate(self, prompts: list[list[int]], num_tokens: int) -> np.ndarray:
    import torch
    import transformers
    _check(prompts, num_tokens)
    torch.set_num_threads(self._threads)
    cache = transformers.DynamicCache(config=self._model.config)
    input_BT, ids = torch.tensor(prompts), []
    with torch.inference_mode():
      for _ in range(num_tokens):
        logits_B1V = self._model(input_BT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        input_BT = logits_B1V.argmax(-1)
        ids.append(input_BT)
    return torch.cat(ids, 1).numpy().astype(np.int32)


class _LlamaCpp:
  """llama.cpp's own graph and cache, through its C interface."""

  def __init__(self, name: str, model: config_lib.ModelConfig, params: dict, threads: int, dtype: str,
               directory: pathlib.Path):
    import llama_cpp
    log = logging.getLogger("llama-cpp-python")  # its level decides what llama.cpp prints
    log.setLevel(log.level or logging.CRITICAL)
    self.name, self._threads, self._vocab_size = name, threads, model.vocab_size
    path = pathlib.Path(directory) / f"{name}.gguf"
    _write_gguf(path, model, params, dtype)
    llama_cpp.llama_backend_init()
    self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not self._model:
      raise ValueError(f"llama.cpp did not load {path}; set the level of logger 'llama-cpp-python' to DEBUG to see why")
    weakref.finalize(self, llama_cpp.llama_model_free, self._model)  # after the context, which comes later
    self._size, self._context, self._free = (0, 0, 0), None, lambda: None  # rows, positions, tokens a call
    self._kv = llama_cpp.GGML_TYPE_F32 if dtype == "float32" else llama_cpp.GGML_TYPE_F16

  def generate(self, prompts: list[list[int]], num_tokens: int) -> np.ndarray:
    import llama_cpp
    _check(prompts, num_tokens)
    tokens_BT = np.asarray(prompts, np.int32)
    context = self._prepare(len(prompts), tokens_BT.shape[1] + num_tokens, tokens_BT.size)
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    ids_B1, start = [], 0
    for _ in range(num_tokens):
      ids_B1.append(self._step(context, tokens_BT, start))
      start += tokens_BT.shape[1]
      tokens_BT = ids_B1[-1]
    return np.concatenate(ids_B1, 1)

  def _prepare(self, batch: int, seq_len: int, num_tokens: int) -> Any:
    """Returns a context of `batch` rows of `seq_len` positions, `num_tokens` a call; the last one, if they fit."""
    import llama_cpp
    if self._size[0] != batch or self._size[1] < seq_len or self._size[2] < num_tokens:
      self._free()
      self._size, positions = (0, 0, 0), -(-seq_len // 256) * 256  # it pads rows to 256
      options = llama_cpp.llama_context_default_params()
      options.n_ctx, options.n_seq_max, options.n_batch = batch * positions, batch, num_tokens
      options.n_threads = options.n_threads_batch = self._threads
      options.type_k = options.type_v = self._kv
      # Measured for one token a row: as fast in bfloat16, 1.4 times in float32. A cache shared by all rows is slower.
      options.flash_attn_type, options.kv_unified = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED, False
      self._context = llama_cpp.llama_init_from_model(self._model, options)
      if not self._context:
        raise ValueError(f"llama.cpp has no context of {batch} rows of {seq_len} tokens; use fewer or shorter rows")
      self._free = weakref.finalize(self, llama_cpp.llama_free, self._context)
      self._size = batch, positions, num_tokens
    return self._context

  def _step(self, context: Any, tokens_BT: np.ndarray, start: int) -> np.ndarray:
    """Adds tokens to every row; the most likely next ones, `[B, 1]`."""
    import llama_cpp
    rows, columns = tokens_BT.shape
    batch = llama_cpp.llama_batch_init(tokens_BT.size, 0, 1)
    try:
      batch.n_tokens = tokens_BT.size
      for index, token in enumerate(tokens_BT.ravel().tolist()):
        row, column = divmod(index, columns)
        batch.token[index], batch.pos[index] = token, start + column
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
        batch.logits[index] = column == columns - 1
      status = llama_cpp.llama_decode(context, batch)
    finally:
      llama_cpp.llama_batch_free(batch)
    if status:
      raise ValueError(f"llama_decode returned {status} for {rows} rows of {columns} tokens at {start}")
    logits_BV = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (rows, self._vocab_size))
    return logits_BV.argmax(-1).astype(np.int32)[:, None]


def _write_gguf(path: pathlib.Path, model: config_lib.ModelConfig, params: dict, dtype: str) -> None:
  """Writes a GGUF file of the weights, without a tokenizer. Norms stay float32."""
  import gguf
  matrix = gguf.GGMLQuantizationType[{"float32": "F32", "bfloat16": "BF16"}[dtype]]
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_file_type(gguf.LlamaFileType[{"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16"}[dtype]])
  writer.add_vocab_size(model.vocab_size)
  writer.add_tokenizer_model("none")
  writer.add_context_length(_CONTEXT)
  writer.add_embedding_length(model.d_model)
  writer.add_block_count(model.num_layers)
  writer.add_feed_forward_length(model.d_ff)
  writer.add_head_count(model.num_heads)
  writer.add_head_count_kv(model.num_kv_heads)
  writer.add_key_length(model.head_dim)
  writer.add_value_length(model.head_dim)
  writer.add_rope_dimension_count(model.head_dim)
  writer.add_rope_freq_base(model.rope_theta)
  writer.add_layer_norm_rms_eps(model.norm_eps)
  for key, weight in layout.write({"params": params}, model, "gguf"):
    weight = np.asarray(weight, np.float32)
    kind = matrix if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
    writer.add_tensor(key, gguf.quants.quantize(weight, kind), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _check(prompts: list[list[int]], num_tokens: int) -> None:
  lengths = sorted({len(prompt) for prompt in prompts})
  if len(lengths) != 1 or not lengths[0]:
    raise ValueError(f"prompts of {lengths or 'no'} tokens; give at least one prompt, all of one length >= 1")
  if num_tokens < 1:
    raise ValueError(f"num_tokens={num_tokens}; use at least 1")


# name -> (engine, number format, packages)
_TORCH, _LLAMA = ("torch", "transformers"), ("llama_cpp", "gguf")
PEERS: dict[str, tuple[Callable[..., Peer], str, tuple[str, ...]]] = {
    "hf-float32": (_HuggingFace, "float32", _TORCH),
    "hf-bfloat16": (_HuggingFace, "bfloat16", _TORCH),
    "llamacpp-float32": (_LlamaCpp, "float32", _LLAMA),
    "llamacpp-bfloat16": (_LlamaCpp, "bfloat16", _LLAMA),
}
