"""Writes folders that transformers loads, and reads them back.

  write(folder, model, variables, …)         writes a MorForCausalLM (trust_remote_code=True)
  read(folder)                               reads a folder of `write`
  write_llama(folder, model, variables, …)   writes a model without routing as a LlamaForCausalLM,
                                             with `qk_norm` as a Qwen3ForCausalLM

A folder appears whole or not at all. In bfloat16 every tensor is rounded once.
Routers stay in float32, because they choose in float32.

Source: transformers configuration_utils, tokenization_utils_tokenizers.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import ml_dtypes  # also teaches NumPy "bfloat16"
import numpy as np
from safetensors import numpy as safetensors_numpy

from mor import fields as fields_lib
from mor import json_file
from mor import model_config
from mor import parameters
from mor.conversion import export_tokenizer
from mor.conversion import layout
from mor.conversion import pretrained
from mor.conversion import tensors as tensors_lib
from mor.conversion import unrolled
from mor.model.routers import table as router_table

MODELING = pathlib.Path(__file__).with_name("modeling_mor.py")
CACHE = MODELING.with_name("cache_mor.py")  # imported by MODELING
ROUTERS = ("fixed", "expert_choice", "token_choice")  # routers that modeling_mor.py implements
_SIZES = {  # field of Hugging Face -> field of `ModelConfig`
    "vocab_size": "vocab_size", "hidden_size": "d_model", "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim", "rope_theta": "rope_theta", "rms_norm_eps": "norm_eps", "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
ROPE_SCALING = {  # field of rope_type "llama3" in Hugging Face -> field of `RopeScalingConfig`
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
}
_OWN = ("sharing", "num_recursions", "kv_plan")  # fields that a Llama does not have
_FLOAT32 = ("model.router.", "model.aux_router.", "model.balance_bias")


def write(directory: str | os.PathLike, model: model_config.ModelConfig, variables: Mapping[str, Any], *,
          tokenizer: str | None, chat_template: str | None, context: int, dtype: str,
          special_ids: Mapping[str, Sequence[int]]) -> None:
  """Writes a folder for `AutoModelForCausalLM.from_pretrained(…, trust_remote_code=True)`.

  Args:
    directory: directory to create; an empty one may exist.
    model: config of the model.
    variables: {"params": …} and, if the model has a balance state, {"balance": …}.
    tokenizer: JSON of the `tokenizers` library; None writes no tokenizer.
    chat_template: Jinja template, as transformers reads it.
    context: number of positions that the model was trained with.
    dtype: "float32" or "bfloat16".
    special_ids: ids that open every text ("opening"; none if missing), and ids that begin
      ("bos"), end ("eos", one or several) and pad ("pad")
      a text; each name may be missing. Without "pad" the first "eos" pads.

  Raises:
    ValueError: the model or the variables cannot be written, or the directory is
      not empty.
  """
  if model.router.name not in ROUTERS:
    raise ValueError(f"router.name={model.router.name!r}: modeling_mor.py has no such router ({', '.join(ROUTERS)}); "
                     "write it there in PyTorch, and its name into hf_export.ROUTERS")
  if router_table.make(model).routes and model.router.arch == "random":
    raise ValueError("router.arch='random' draws its scores from JAX's generator, which PyTorch has not; "
                     "export a model whose router is learned")
  own = {"rotary_scaling": _rope_scaling(model), **{field: getattr(model, field) for field in _OWN},
         **({"qk_norm": True} if model.qk_norm else {})}
  config = {
      "architectures": ["MorForCausalLM"], "model_type": "mor",
      "auto_map": {"AutoConfig": "modeling_mor.MorConfig", "AutoModel": "modeling_mor.MorModel",
                   "AutoModelForCausalLM": "modeling_mor.MorForCausalLM"},
      **_shared_fields(model, context, dtype, special_ids), **own,
      "lora": {_short(row.hf): model.lora.ranks[row.name] for row in parameters.PROJECTIONS
               if row.name in model.lora.ranks},
      "router": dataclasses.asdict(model.router)}
  layout.check(variables, model)
  state = {key: _cast(theirs, "float32" if key.startswith(_FLOAT32) else dtype)
           for key, theirs in layout.write(variables, model, "mor")}
  with _publish(directory) as folder:
    for code in (MODELING, CACHE):
      shutil.copyfile(code, folder / code.name)
    _write_folder(folder, config, state, export_tokenizer.files(
        tokenizer, chat_template, context, model.vocab_size, special_ids))


def write_llama(directory: str | os.PathLike, model: model_config.ModelConfig, variables: Mapping[str, Any], *,
                tokenizer: str | None, chat_template: str | None, context: int, dtype: str,
                special_ids: Mapping[str, Sequence[int]]) -> None:
  """Writes a folder of a plain Llama, or with `qk_norm` of a Qwen3.

  Every unrolled layer has its own tensors, into which LoRA is folded.

  Args: see `write`.

  Raises:
    ValueError: as `write`, or the unrolled model is no plain Llama.
  """
  unrolled.check(model)
  if model.d_model % model.num_heads and not model.qk_norm:
    raise ValueError(f"model.d_model={model.d_model} is not a multiple of num_heads={model.num_heads}, which "
                     "transformers asks of a Llama; export with --target=hf")
  kind = ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False} if model.qk_norm
          else {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False})
  config = {**kind, "hidden_act": "silu", "attention_bias": False, "rope_scaling": _rope_scaling(model),
            **_shared_fields(model, context, dtype, special_ids)}
  layout.check(variables, model)
  state = {name: _cast(theirs, dtype) for name, theirs in unrolled.write(variables, model, "hf")}
  with _publish(directory) as folder:
    _write_folder(folder, config, state, export_tokenizer.files(
        tokenizer, chat_template, context, model.vocab_size, special_ids))


def read(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a folder of `write`, also one that PyTorch saved again: fields of `ModelConfig`, and variables in float32.

  Fields that belong to a run are left out: execution, attention, cross_documents,
  compute_dtype, remat, scan_layers and recursions_train.

  Raises:
    ValueError: a file or a tensor is missing, unexpected, broken or of a wrong shape.
  """
  directory = pathlib.Path(directory)
  fields = read_fields(directory / "config.json")
  try:
    model = fields_lib.build(model_config.ModelConfig, fields | pretrained.EXECUTION, "model")
  except ValueError as error:
    raise ValueError(f"{directory / 'config.json'} is no config of `write` ({error}); export again") from error
  return fields, pretrained.assemble(tensors_lib.open_path(directory), model, "mor")


def read_fields(path: pathlib.Path) -> dict[str, Any]:
  """Reads the fields of `ModelConfig` from config.json alone; raises as `read` does."""
  if not path.is_file():
    raise ValueError(f"{path}: no such file; name the folder of an export")
  config = json_file.read(path)
  if config.get("model_type") != "mor":
    raise ValueError(f"{path} is of model_type {config.get('model_type')!r}, not 'mor'; import it with hf:")
  missing = [field for field in (*_SIZES, *_OWN, "rotary_scaling", "lora", "router") if field not in config]
  if missing:
    raise ValueError(f"{path} misses {', '.join(missing)}; export again")
  lora, said = (json_file.group(config, name, path) for name in ("lora", "rotary_scaling"))
  ranks = {row.name: lora.get(_short(row.hf), 0) for row in parameters.PROJECTIONS}
  scaling = ({ours: said.get(theirs) for theirs, ours in ROPE_SCALING.items()} if said
             else dataclasses.asdict(pretrained.NO_SCALING))
  return {**{ours: config[theirs] for theirs, ours in _SIZES.items()}, **{field: config[field] for field in _OWN},
          "qk_norm": config.get("qk_norm", False),  # a model without qk_norm writes no such field
          "rope_scaling": scaling, "lora": ranks, "router": config["router"]}


def _short(name: str) -> str:
  """Returns the last part of a name: q_proj of self_attn.q_proj."""
  return name.split(".")[-1]


def _shared_fields(model: model_config.ModelConfig, context: int, dtype: str,
                   special_ids: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Returns the fields that both kinds of config.json have."""
  if dtype not in ("float32", "bfloat16"):
    raise ValueError(f"dtype={dtype!r}; use 'float32' or 'bfloat16'")
  return {"dtype": dtype, "max_position_embeddings": context, **export_tokenizer.token_ids(special_ids),
          **{theirs: getattr(model, ours) for theirs, ours in _SIZES.items()}}


def _rope_scaling(model: model_config.ModelConfig) -> dict[str, Any] | None:
  if model.rope_scaling.factor == 1.0:
    return None
  return {"rope_type": "llama3", **{theirs: getattr(model.rope_scaling, ours)
                                    for theirs, ours in ROPE_SCALING.items()}}


def _cast(theirs: np.ndarray, dtype: str) -> np.ndarray:
  return np.ascontiguousarray(theirs, ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)


def _write_folder(folder: pathlib.Path, config: dict, state: dict[str, np.ndarray], files: dict[str, str]) -> None:
  safetensors_numpy.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
  for name, content in {"config.json": json.dumps(config, indent=2), **files}.items():
    (folder / name).write_text(content + "\n", encoding="utf-8")


@contextlib.contextmanager
def _publish(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a folder beside `directory`, and renames it to `directory` when it is complete."""
  directory = pathlib.Path(directory).expanduser().absolute()
  if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
    raise ValueError(f"{directory} is there and not empty; name a new folder, or remove it")
  folder = directory.with_name(f".{directory.name}.{os.getpid()}")
  folder.mkdir(parents=True)
  try:
    yield folder
    folder.rename(directory)
  except BaseException:
    shutil.rmtree(folder)
    raise
