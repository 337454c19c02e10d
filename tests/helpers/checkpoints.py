"""Tiny checkpoints of other projects, written here to be read by `mor.conversion`."""

import json
import pathlib
from typing import Any

import gguf
import jax
import numpy as np
import safetensors.numpy
import tokenizers

from mor import config as config_lib
from mor.conversion import layout
from mor.model import transformer
from tests.helpers import tiny
from tests.helpers import weights

# Plain Llamas by kind of attention; no two sizes are equal.
HEADS = {"mha": dict(num_heads=4, num_kv_heads=4), "gqa": dict(num_heads=4, num_kv_heads=2),
         "mqa": dict(num_heads=4, num_kv_heads=1)}
TOKENS_BT = np.random.default_rng(0).integers(0, 61, (3, 12))


def llama(**fields: Any) -> config_lib.ModelConfig:
  """A vanilla model."""
  return tiny.config(dict(model=tiny.VANILLA | dict(num_layers=3, rope_theta=300.0, norm_eps=1e-3)),
                     model=fields).model


class InMemory:
  """`tensors.Tensors` of a dictionary."""

  where = "memory"

  def __init__(self, arrays: dict[str, np.ndarray]):
    self.arrays, self.shapes = arrays, {key: array.shape for key, array in arrays.items()}

  def file(self, key: str) -> str:
    return self.where

  def read(self, key: str) -> np.ndarray:
    return self.arrays[key]


def logits(model: config_lib.ModelConfig, variables: dict, tokens_BT: np.ndarray = TOKENS_BT) -> np.ndarray:
  """Of our forward pass, routed causally."""
  @jax.jit
  def run(variables, tokens_BT):
    out = transformer.Transformer(model).apply(variables, tokens_BT, routing="decide")
    return transformer.unembed(variables["params"], out.hidden_BTD)
  with jax.default_matmul_precision("highest"):
    return np.asarray(run(variables, tokens_BT))


def equal(a: dict, b: dict) -> bool:
  """Whether two trees are, bit for bit."""
  if jax.tree.structure(a) != jax.tree.structure(b):
    return False
  return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def hf_config(model: config_lib.ModelConfig, **fields: Any) -> dict[str, Any]:
  """A config.json as old versions of transformers wrote it."""
  return dict(
      architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=model.vocab_size,
      hidden_size=model.d_model, intermediate_size=model.d_ff, num_hidden_layers=model.num_layers,
      num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim,
      rms_norm_eps=model.norm_eps, rope_theta=model.rope_theta, rope_scaling=None, max_position_embeddings=77,
      tie_word_embeddings=model.tie_embeddings, bos_token_id=1, eos_token_id=2) | fields


def write_folder(folder: pathlib.Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> pathlib.Path:
  """A folder with config.json and model.safetensors."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  safetensors.numpy.save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()},
                              folder / "model.safetensors")
  return folder


def hf_folder(folder: pathlib.Path, model: config_lib.ModelConfig, seed: int = 1, **fields: Any) -> dict[str, Any]:
  """A Hugging Face folder of random weights, which are returned."""
  variables = {"params": weights.draw(model, seed)}
  write_folder(folder, hf_config(model, **fields), dict(layout.write(variables, model, "hf")))
  return variables


def tokenizer() -> tokenizers.Tokenizer:
  """Byte-level BPE with an end-of-text token."""
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  trained.decoder = tokenizers.decoders.ByteLevel()
  trained.train_from_iterator(
      ["the state of a union, it's what we make 1234 of it"] * 9,
      tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>"],
                                     initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  return trained


def write_gguf(path: pathlib.Path, model: config_lib.ModelConfig, arrays: dict[str, np.ndarray], kind: str = "F32",
               extra: dict[str, Any] | None = None, family: str = "llama",
               endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> None:
  """A GGUF file; matrices of the type `kind`.

  Args:
    extra: metadata over what the model says; None drops a key.
    family: architecture, with which the keys begin.
    endianess: byte order of the file.
  """
  metadata = {key.replace("llama.", f"{family}."): value for key, value in {
      "llama.block_count": model.num_layers, "llama.context_length": 77, "llama.embedding_length": model.d_model,
      "llama.feed_forward_length": model.d_ff, "llama.attention.head_count": model.num_heads,
      "llama.attention.head_count_kv": model.num_kv_heads, "llama.attention.key_length": model.head_dim,
      "llama.attention.value_length": model.head_dim, "llama.rope.dimension_count": model.head_dim,
      "llama.rope.freq_base": float(model.rope_theta), "llama.attention.layer_norm_rms_epsilon": model.norm_eps,
      "llama.vocab_size": model.vocab_size}.items()} | (extra or {})
  writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", family), endianess=endianess)
  for key, value in metadata.items():
    if isinstance(value, bool):
      writer.add_bool(key, value)
    elif isinstance(value, int):
      writer.add_uint32(key, value)
    elif isinstance(value, float):
      writer.add_float32(key, value)
    elif isinstance(value, str):
      writer.add_string(key, value)
    elif value is not None:
      writer.add_array(key, value)
  for key, array in arrays.items():
    quantised = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
    writer.add_tensor(key, gguf.quants.quantize(np.asarray(array, np.float32), quantised), raw_dtype=quantised)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
