"""Reads a Hugging Face folder of a Llama-like model, or a folder that `hf_export.py` wrote.

Source: transformers models/llama/configuration_llama.py for names and defaults;
models/mistral for Mistral, which computes the same without a sliding window;
models/qwen3 for Qwen3, which also norms queries and keys.
"""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

from mor import fields as fields_lib
from mor import json_file
from mor import model_config
from mor.conversion import hf_export
from mor.conversion import pretrained
from mor.conversion import tensors as tensors_lib
from mor.data import special_tokens

_LLAMA = dict(rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=2048, tie_word_embeddings=False,
              initializer_range=0.02)
DEFAULTS = {  # model_type -> values of fields that config.json may leave out
    "llama": _LLAMA,
    "mistral": _LLAMA | dict(max_position_embeddings=131072, sliding_window=4096),
    "qwen3": _LLAMA | dict(max_position_embeddings=32768, head_dim=128, use_sliding_window=False),
}
_FIXED = {"qwen3": dict(qk_norm=True)}  # model_type -> fields of `ModelConfig` that it fixes
_PLAIN = {  # field -> values of a plain Llama; any other value changes the computation
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (None, False),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
}
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")
_OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")


def read(path: pathlib.Path) -> pretrained.Source:
  """Reads the folder.

  Raises:
    ValueError: the kind of model is unsupported, or a file is inconsistent.
    OSError: a file cannot be read.
  """
  config_path, config, model = _begin(path)
  if config.get("model_type") == "mor":  # an export, perhaps trained further in PyTorch
    variables = hf_export.read(path)[1]
  else:
    variables = pretrained.assemble(tensors_lib.open_path(path), model, "hf")
  return pretrained.Source(model=model, variables=variables, context=context(config, config_path),
                           **companions(path, config, model.vocab_size))


def describe(path: pathlib.Path) -> model_config.ModelConfig:
  """Returns the model alone; raises as `read` does."""
  return _begin(path)[2]


def _begin(path: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any], model_config.ModelConfig]:
  """Returns the path of config.json, its content, and the model that it describes."""
  if not path.is_dir():
    raise ValueError(f"hf:{path} is no folder; name the one that holds config.json")
  config_path = path / "config.json"
  if not config_path.is_file():
    raise ValueError(f"hf:{path} holds no config.json; name the folder of a model, with config.json and safetensors")
  config = json_file.read(config_path)
  if config.get("model_type") == "mor":
    own = hf_export.read_fields(config_path)
    pretrained.check_sizes(config_path, own)
    return config_path, config, fields_lib.build(
        model_config.ModelConfig, own | pretrained.EXECUTION, str(config_path))
  architectures = config.get("architectures") or [_ARCHITECTURES[0]]
  if not isinstance(architectures, list) or not any(name in _ARCHITECTURES for name in architectures):
    raise ValueError(f"{config_path}: architectures {json_file.show(architectures)} are unsupported; "
                     f"use {' or '.join(_ARCHITECTURES)}")
  return config_path, config, pretrained.build(config_path, **fields(config, config_path))


def fields(config: Mapping[str, Any], where: pathlib.Path) -> dict[str, Any]:
  """Returns the fields of `ModelConfig` that the config.json of a Llama gives.

  Raises:
    ValueError: a field is missing, of another type, or unsupported.
  """
  kind = config.get("model_type")
  if not isinstance(kind, str) or kind not in DEFAULTS:
    raise ValueError(f"{where}: model_type {json_file.show(kind)} is unsupported; use one of {', '.join(DEFAULTS)}")
  config = DEFAULTS[kind] | config
  if config.get("use_sliding_window") is False:
    config["sliding_window"] = None  # no layer uses the width that the file may give
  for name, plain in _PLAIN.items():
    if config.get(name, plain[0]) not in plain:
      raise ValueError(f"{where}: {name}={json_file.show(config[name])} is unsupported; only {name}={plain[0]!r} is a "
                       "plain Llama")

  def take(name, *default):
    return json_file.number(config, name, int, where, *default)

  heads, d_model = take("num_attention_heads"), take("hidden_size")
  return dict(
      vocab_size=take("vocab_size"), d_model=d_model, num_heads=heads,
      num_kv_heads=take("num_key_value_heads", heads), head_dim=take("head_dim", d_model // max(heads, 1)),
      d_ff=take("intermediate_size"), num_layers=take("num_hidden_layers"), rope_theta=_rope_theta(config, where),
      rope_scaling=_rope_scaling(config, where),
      norm_eps=json_file.number(config, "rms_norm_eps", float, where),
      init_std=json_file.number(config, "initializer_range", float, where) or _LLAMA["initializer_range"],
      tie_embeddings=json_file.flag(config, "tie_word_embeddings", where), **_FIXED.get(kind, {}))


def context(config: Mapping[str, Any], where: pathlib.Path) -> int:
  """Returns the number of positions that the model was trained for."""
  name = "max_position_embeddings"
  positions = json_file.number(DEFAULTS.get(config["model_type"], {}) | config, name, int, where)
  return pretrained.check_context(where, name, positions)


def companions(folder: pathlib.Path, config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
  """Reads the fields of a `Source` from the files beside the weights: tokenizer, template, special tokens."""
  tokenizer = json_file.read_text(folder / "tokenizer.json")
  if tokenizer is None:
    _refuse_other_tokenizers(folder)
  try:
    parsed = None if tokenizer is None else special_tokens.parse(tokenizer)
  except ValueError as error:
    raise ValueError(f"{folder / 'tokenizer.json'} is {error}") from error
  return dict(chat_template=_chat_template(folder), **pretrained.tokenizer_fields(
      folder, tokenizer, special_tokens.read(folder, parsed, config), vocab_size))


def _refuse_other_tokenizers(folder: pathlib.Path) -> None:
  found = [name for name in _OTHER_TOKENIZERS if os.path.lexists(folder / name)]
  if found:
    raise ValueError(
        f"{folder} has {found[0]} and no tokenizer.json, which is the only kind of tokenizer that is read; make it there "
        f"with transformers: t = AutoTokenizer.from_pretrained({str(folder)!r}); t.save_pretrained({str(folder)!r})")


def _chat_template(folder: pathlib.Path) -> str | None:
  path = folder / "tokenizer_config.json"
  template = json_file.read_text(folder / "chat_template.jinja")
  if template is None:
    template = json_file.read_optional(path).get("chat_template")
  if isinstance(template, list):  # several templates, by name
    named = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
    template = named.get("default")
  if template is not None and not isinstance(template, str):
    raise ValueError(f"{path}: chat_template is a {type(template).__name__}, not text; fetch it again")
  return template


def _rope_theta(config: Mapping[str, Any], where: pathlib.Path) -> float:
  """Returns the rotary base, from `rope_theta` or the newer `rope_parameters`."""
  said = json_file.group(config, "rope_parameters", where)
  return json_file.number(said if said.get("rope_theta") else config, "rope_theta", float, where)


def _rope_scaling(config: Mapping[str, Any], where: pathlib.Path) -> model_config.RopeScalingConfig:
  """Returns the scaling of Llama 3 or no scaling, from `rope_scaling` or the newer `rope_parameters`."""
  scaling = pretrained.NO_SCALING
  for group in ("rope_scaling", "rope_parameters"):
    said = json_file.group(config, group, where)
    kind = said.get("rope_type", said.get("type", "default"))
    if kind == "llama3":
      numbers = {ours: json_file.number(said, theirs, int if ours == "original_context" else float, where)
                 for theirs, ours in hf_export.ROPE_SCALING.items()}
      try:
        scaling = model_config.RopeScalingConfig(**numbers)
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    elif kind != "default":
      raise ValueError(f"{where}: {group} of type {json_file.show(kind)} is unsupported; use a model with 'llama3' or "
                       "none")
    elif said.get("factor") not in (None, 1, 1.0) or any(isinstance(value, dict) for value in said.values()):
      raise ValueError(f"{where}: {group}={json_file.show(said)} is unsupported; use a model with one scaling, of type "
                       "'llama3' or none")
    if said.get("partial_rotary_factor") not in (None, 1, 1.0):
      raise ValueError(f"{where}: partial_rotary_factor={json_file.show(said['partial_rotary_factor'])} is unsupported; "
                       "only whole heads rotate")
  return scaling
