"""Reads a checkpoint of the official PyTorch MoR, raymin0223/mixture_of_recursions.

A checkpoint is a folder, or a file in a folder, with

  config.json   config of the Llama, with the number of unrolled layers
  *.yaml        recipe of the official repository: recursive, kv_sharing and mor
  weights       model.safetensors or pytorch_model.bin, sharded or not, or *.pt

If a file is missing, `target` must give its options; options of a file must agree
with `target`. `read` has the defaults of the official code, and ignores the same
options: alpha is 0.1 (softmax: 1.0), and expert-choice without activation ignores
it. The official "wide_mlp" is as wide as "mlp", so the width comes from the weights.

Source: util/config.py, model/sharing_strategy/llama.py and model/mor_model of the
official repository.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import yaml

from mor import fields
from mor import json_file
from mor import model_config
from mor.conversion import hf_import
from mor.conversion import pretrained
from mor.conversion import tensors as tensors_lib
from mor.model import schedule as schedule_lib
from mor.model.routers import scores

_PLANS = {(False, False): "recursion_wise", (True, False): "shared", (True, True): "hybrid"}
_TRAINING = {"capacity_warmup_steps", "sampling_coef", "aux_router_lr_multiplier", "z_loss_coef", "balance_coef",
             "bias_update_rate", "balance_warmup_steps", "sampling", "balancing"}  # no part of a trained model
_NO_CONTEXT = 2048  # context of every released model


def read(path: pathlib.Path, target: model_config.ModelConfig | None) -> pretrained.Source:
  """Reads a checkpoint.

  Args:
    path: folder, or file of weights.
    target: model whose fields complete the files, those of training included.

  Raises:
    ValueError: options are missing, the files and `target` differ, the kind of
      checkpoint is unsupported, or a file is inconsistent.
    OSError: a file cannot be read.
  """
  folder = path if path.is_dir() else path.parent
  tensors = tensors_lib.open_path(path)
  llama, recipe = _llama(folder), _recipe(folder)
  if target is None and (llama is None or recipe is None):
    raise ValueError(f"{folder} has no {'config.json' if llama is None else '.yaml of its training'}; put it there, or "
                     "say in the config what the model is")
  config_path = folder / "config.json"
  said = {} if llama is None else hf_import.fields(llama, config_path)
  if recipe is not None:
    said |= _recursion(*recipe, tensors)
  model = target or pretrained.build(folder, **said)
  _compare(folder, said, model)
  _check_arch(tensors, model)
  context = _NO_CONTEXT if llama is None else hf_import.context(llama, config_path)
  return pretrained.Source(model=model, variables=pretrained.assemble(tensors, model, "official_mor"), context=context,
                           **hf_import.companions(folder, llama or {}, model.vocab_size))


def _llama(folder: pathlib.Path) -> dict[str, Any] | None:
  path = folder / "config.json"
  return json_file.read(path) if os.path.lexists(path) else None


def _recipe(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]] | None:
  """Reads the only .yaml of the folder; returns None if the folder has none."""
  paths = sorted(folder.glob("*.yaml"))
  if len(paths) > 1:
    raise ValueError(f"{folder} has {len(paths)} recipes, {paths[0].name}, {paths[1].name}, …; leave one")
  if not paths:
    return None
  try:
    recipe = yaml.load(paths[0].read_text(encoding="utf-8"), _Loader)
  except (yaml.YAMLError, ValueError, RecursionError) as error:
    raise ValueError(f"{paths[0]} is not YAML ({json_file.first_line(error)}); fetch it again") from error
  if not isinstance(recipe, dict):
    raise ValueError(f"{paths[0]} holds a {type(recipe).__name__}, not groups of options; fetch it again")
  return paths[0], recipe


class _Loader(yaml.SafeLoader):
  """Refuses aliases: a short text of them describes a value without end."""

  def compose_node(self, parent, index):
    if self.check_event(yaml.AliasEvent):
      raise yaml.YAMLError("it has aliases, which no recipe needs")
    return super().compose_node(parent, index)


def _group(where: pathlib.Path, options: Mapping[str, Any], name: str) -> dict[str, Any]:
  """Returns a group of options, or {} if the group is missing or not enabled."""
  group = options.get(name) or {}
  if not isinstance(group, dict):
    raise ValueError(f"{where}: {name}={json_file.show(group)}; give a group of options")
  return group if group.get("enable", True) else {}


def _recursion(where: pathlib.Path, recipe: Mapping[str, Any], tensors: tensors_lib.Tensors) -> dict[str, Any]:
  """Returns the fields of `ModelConfig` that a recipe gives."""
  recursive, mor = _group(where, recipe, "recursive"), _group(where, recipe, "mor")
  sharing_kv = _group(where, recipe, "kv_sharing")
  if _group(where, recipe, "relaxation"):
    raise ValueError(f"{where}: relaxation is unsupported; only models without it are")
  if recursive and not recursive.get("ln_share", True):
    raise ValueError(f"{where}: recursive.ln_share=false is unsupported; norms are shared with their layer")
  steps = recursive.get("num_recursion", 1)
  if not recursive or steps == 1:  # the official code runs such a model once
    if mor or sharing_kv:
      raise ValueError(f"{where}: mor or kv_sharing without recursive is unsupported; enable recursive")
    return dict(sharing="vanilla", num_recursions=1, kv_plan="recursion_wise", router=pretrained.NO_ROUTER)
  said = dict(sharing=recursive.get("sharing"), num_recursions=steps,
                kv_plan=_PLANS[bool(sharing_kv), bool(sharing_kv.get("update_cache"))])
  if said["sharing"] not in list(schedule_lib.SCHEMES) or type(steps) is not int:
    raise ValueError(f"{where}: recursive.sharing={json_file.show(said['sharing'])}, "
                     f"num_recursion={json_file.show(steps)}; use a scheme of "
                     f"{', '.join(schedule_lib.SCHEMES)} and a count")
  router = _router(where, mor, steps) if mor else pretrained.NO_ROUTER
  if router.arch in scores.WIDTHS:
    router = dataclasses.replace(router, arch=_arch(tensors, router.arch))
  return said | dict(router=router)


def _router(where: pathlib.Path, mor: Mapping[str, Any], steps: int) -> model_config.RouterConfig:
  kind = mor.get("type")
  if kind not in ("expert", "token"):
    raise ValueError(f"{where}: mor.type={json_file.show(kind)}; use 'expert' or 'token'")
  if mor.get("rand_router") and kind == "token":
    raise ValueError(f"{where}: mor.rand_router with type 'token' is unsupported; use a trained router")
  read, own = {"expert": _expert, "token": _token}[kind], _group(where, mor, kind)
  gating = dict(gating=own.get("gating") or "weighted")
  try:
    common = dict(name=f"{kind}_choice", arch=mor.get("router_type", "linear"),
                  temperature=float(mor.get("temp") or 1.0),
                  z_loss_coef=float(mor.get("z_coeff", 0.001)) if mor.get("z_loss") else 0.0)
    said = dataclasses.asdict(pretrained.NO_ROUTER) | common | gating | read(mor, own, steps)
    return fields.build(model_config.RouterConfig, said, "mor")
  except (ValueError, TypeError, OverflowError) as error:
    raise ValueError(f"{where}: {json_file.first_line(error)}") from error


def _expert(mor: Mapping[str, Any], own: Mapping[str, Any], steps: int) -> dict[str, Any]:
  activation = own.get("router_func", "sigmoid") or "none"
  said = dict(activation=activation, alpha=1.0 if activation == "none" else _alpha(own, 0.1),
              sampling=own.get("sampling") or "none", sampling_coef=float(own.get("coeff", 0.001)),
              capacity_warmup_steps=int(own.get("cap_warmup_step") or 0))
  if mor.get("rand_router"):  # scores are drawn, without activation or learning
    said |= dict(arch="random", activation="none", alpha=_alpha(own, 0.1), sampling="none")
  if mor.get("capacity"):
    capacity = tuple(float(part) for part in str(mor["capacity"]).split(","))
    said["capacity"] = () if len(capacity) == steps and capacity == _default_capacity(steps) else capacity
  return said


def _token(mor: Mapping[str, Any], own: Mapping[str, Any], steps: int) -> dict[str, Any]:
  activation = own.get("router_func") or "softmax"
  return dict(activation=activation, alpha=_alpha(own, 1.0 if activation == "softmax" else 0.1),
              balancing=own.get("balancing") or "none", balance_coef=float(own.get("coeff", 0.1)),
              bias_update_rate=float(own.get("u", 0.001)), balance_warmup_steps=int(own.get("bal_warmup_step") or 0))


def _alpha(own: Mapping[str, Any], default: float) -> float:
  return default if own.get("alpha") is None else float(own["alpha"])


def _default_capacity(steps: int) -> tuple[float, ...]:
  return tuple((steps - r) / steps for r in range(steps))


def _arch(tensors: tensors_lib.Tensors, said: str) -> str:
  """Returns the router architecture whose width the weights have, or `said` if no weights of a router are found."""
  widths = (shape for key, shape in tensors.shapes.items() if key.endswith(".mor_router.router.0.weight"))
  shape = next((shape for shape in widths if len(shape) == 2 and shape[1]), (0, 1))
  return {factor: arch for arch, factor in scores.WIDTHS.items()}.get(shape[0] / shape[-1], said)


def _check_arch(tensors: tensors_lib.Tensors, model: model_config.ModelConfig) -> None:
  said = model.router.arch
  if model.router.name != "fixed" and said in scores.WIDTHS and said != _arch(tensors, said):
    raise ValueError(f"{tensors.where}: its router is as wide as arch {_arch(tensors, said)!r} is, the config says "
                     f"{said!r}; set router.arch={_arch(tensors, said)!r}")


def _compare(where: pathlib.Path, said: Mapping[str, Any], model: model_config.ModelConfig) -> None:
  """Raises ValueError if the files and the config describe different models."""
  if model.lora.ranks:
    raise ValueError(f"official_mor with model.lora={model.lora.ranks}; import without LoRA first")
  pairs = {name: (value, getattr(model, name)) for name, value in said.items() if name not in ("router", "init_std")}
  router = said.get("router")
  if router is not None:
    pairs["router.name"] = (router.name, model.router.name)
  if router is not None and "fixed" not in (router.name, model.router.name):
    for field in dataclasses.fields(router):
      if field.name not in _TRAINING and field.name not in ("name", "capacity"):
        pairs[f"router.{field.name}"] = (getattr(router, field.name), getattr(model.router, field.name))
    pairs["router.sampling == 'aux_router'"] = (router.sampling == "aux_router", model.router.sampling == "aux_router")
    pairs["router.balancing == 'loss_free'"] = (router.balancing == "loss_free", model.router.balancing == "loss_free")
    if router.name == "expert_choice" and said["num_recursions"] == model.num_recursions:
      pairs["router.capacity"] = (router.capacity or _default_capacity(model.num_recursions), model.capacity)
  differing = [f"{name} {theirs!r} (config: {ours!r})" for name, (theirs, ours) in pairs.items() if theirs != ours]
  if differing:
    raise ValueError(f"{where} is another model than the config's: {', '.join(differing)}; set what it says")
