"""Reads a reference vector of the official PyTorch MoR.

A vector is an .npz that holds one tiny random model of
raymin0223/mixture_of_recursions, its input and what came out. `read` turns its
description into a `ModelConfig` and its weights into the parameter tree of
`mor.model.transformer`. Unrolled layers that share parameters are stored once
per use; the copies must be equal.

Where the official code has defaults or ignores an option, so does `read`:
alpha is 0.1 (softmax: 1.0) and is ignored by expert-choice without activation;
router "wide_mlp" is as wide as "mlp" there, so the width comes from the weights.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np

from mor import config as config_lib
from mor.model import schedule as schedule_lib

ROUTERS = dict(vanilla="fixed", recursive="fixed", expert="expert_choice", token="token_choice")
COEFFS = dict(sampling_loss=0.001, balancing_loss=0.1, router_z_loss=0.001)  # in total_loss

_REQUIRED = ("kind", "num_recursions", "num_unrolled_layers", "sharing", "heads", "kv", "d", "ff",
             "V", "rope_theta", "rms_norm_eps")
_OPTIONAL = ("tie_embeddings", "capacity", "router", "func", "alpha", "z", "temp", "gating",
             "balancing", "sampling", "kvshare", "update_cache", "loss_coeffs")
_NOTES = ("name", "batch", "seq", "seed")  # say nothing about the model
_LINEARS = {  # ours -> Hugging Face name, and our shape: inputs, outputs
    ("attention", "q"): ("self_attn.q_proj", "D NH"),
    ("attention", "k"): ("self_attn.k_proj", "D KH"),
    ("attention", "v"): ("self_attn.v_proj", "D KH"),
    ("attention", "o"): ("self_attn.o_proj", "NH D"),
    ("ffw", "gate"): ("mlp.gate_proj", "D F"),
    ("ffw", "up"): ("mlp.up_proj", "D F"),
    ("ffw", "down"): ("mlp.down_proj", "F D"),
}
_NORMS = {"attention_norm": "input_layernorm", "ffw_norm": "post_attention_layernorm"}
_AUX_ROUTERS = ("aux_router.{}", "mlp_router.{}", "router.{}.mlp_router", "router.{}.aux_router")


@dataclasses.dataclass(frozen=True)
class Vector:
  """One reference vector.

  Attributes:
    name: name of the file without its ending.
    kind: vanilla, recursive, expert or token.
    model: what the file describes.
    params: parameter tree, float32.
    bias_R: bias of loss-free balancing, or None.
    arrays: everything but the weights, by the file's keys.
    has_z: whether the official run computed the z-loss; else it reports 0.
  """

  name: str
  kind: str
  model: config_lib.ModelConfig
  params: dict[str, Any]
  bias_R: np.ndarray | None
  arrays: dict[str, np.ndarray]
  has_z: bool


def read(path: str | pathlib.Path) -> Vector:
  """Reads one file.

  Raises:
    ValueError: the file is incomplete or has an option unknown here.
  """
  with np.load(path) as file:
    arrays = {key: file[key] for key in file.files}
  _require("meta" in arrays, "no entry 'meta'")
  meta = json.loads(str(arrays.pop("meta")))
  weights = {key[2:]: arrays.pop(key) for key in list(arrays) if key.startswith("w/")}
  used = set()

  def take(name, shape):
    _require(name in weights, f"no entry 'w/{name}'")
    actual = weights[name].shape
    _require(actual == shape, f"'w/{name}' has shape {actual}, not {shape}")
    used.add(name)
    return np.asarray(weights[name], np.float32)

  aux = next((form for form in _AUX_ROUTERS
              if any(key.startswith(form.format(0) + ".") for key in weights)), None)
  model = _model(meta, weights, aux)
  params, bias_R = _params(model, take, aux), None
  if model.router.balancing == "loss_free":
    bias_R = np.zeros(model.num_recursions, np.float32)
    for name in {"router_bias", "router.0.router_bias"} & set(weights):
      bias_R = take(name, (model.num_recursions,))
  _require(used == set(weights), f"unused weights {sorted(set(weights) - used)}")
  for key in ("input_ids", "logits_eval"):
    _require(key in arrays, f"no entry {key!r}")
  if meta["kind"] == "expert":
    for r in range(model.num_recursions):
      _require(f"selected/{r}" in arrays, f"no entry 'selected/{r}'")
  if meta["kind"] == "token":
    _require("token_logits" in arrays, "no entry 'token_logits'")
  name, has_z = pathlib.Path(path).stem, bool(meta.get("z"))
  return Vector(name, meta["kind"], model, params, bias_R, arrays, has_z)


def _require(ok: bool, what: str) -> None:
  if not ok:
    raise ValueError(what)


def _coeffs(meta):
  coeffs = {**COEFFS, **(meta.get("loss_coeffs") or {})}
  _require(set(coeffs) == set(COEFFS), f"unknown loss_coeffs {sorted(coeffs)}")
  return coeffs


def _model(meta, weights, aux):
  missing = [key for key in _REQUIRED if meta.get(key) is None]
  known = {*_REQUIRED, *_OPTIONAL, *_NOTES}
  unknown = sorted(key for key in set(meta) - known if meta[key] not in (None, False))
  _require(not missing, f"meta has no {missing}")
  _require(not unknown, f"meta has unknown options {unknown}")
  _require(meta["kind"] in ROUTERS, f"unknown kind {meta['kind']!r}")
  _require("layers.0.self_attn.q_proj.weight" in weights, "no weights of layer 0")
  width = weights["layers.0.self_attn.q_proj.weight"].shape[0]
  _require(width % meta["heads"] == 0, f"{width} query rows do not divide by {meta['heads']} heads")
  sharing = "vanilla" if meta["sharing"] in ("none", "vanilla") else meta["sharing"]
  defaults = config_lib.default().to_dict()
  fields = dict(
      vocab_size=meta["V"], d_model=meta["d"], num_heads=meta["heads"], num_kv_heads=meta["kv"],
      head_dim=width // meta["heads"], d_ff=meta["ff"], num_layers=meta["num_unrolled_layers"],
      sharing=sharing, num_recursions=meta["num_recursions"], kv_plan=_kv_plan(meta),
      execution="gathered", rope_theta=float(meta["rope_theta"]),
      norm_eps=float(meta["rms_norm_eps"]), init_std=0.02, cross_documents=False,
      compute_dtype="float32", remat="none", scan_layers=True,
      router={**defaults["model"]["router"], **_router(meta, weights, aux)})
  return config_lib.from_dict({**defaults, "model": {**defaults["model"], **fields}}).model


def _kv_plan(meta):
  share = meta.get("kvshare") or False
  if meta.get("update_cache"):
    _require(bool(share), "update_cache without kvshare")
    share = "hybrid"
  plans = {False: "recursion_wise", True: "shared"}
  plan = plans.get(share, share)
  _require(plan in ("recursion_wise", "shared", "hybrid"), f"unknown kvshare {share!r}")
  return plan


def _router(meta, weights, aux):
  expert, token = meta["kind"] == "expert", meta["kind"] == "token"
  activation = meta.get("func", "softmax" if token else "sigmoid")
  if activation is None:
    activation = "softmax" if token else "none"
  alpha = meta.get("alpha")
  if alpha is None:
    alpha = 1.0 if activation == "softmax" else 0.1
  sampling = meta.get("sampling") or ("aux_router" if aux else "aux_loss")
  return dict(
      name=ROUTERS[meta["kind"]], arch=_arch(meta, weights), activation=activation,
      alpha=float(1.0 if expert and activation == "none" else alpha),
      temperature=float(meta.get("temp") or 1.0),
      capacity=tuple(meta.get("capacity") or ()) if expert else (), capacity_warmup_steps=0,
      gating=meta.get("gating") or "weighted", sampling=sampling if expert else "none",
      sampling_coef=_coeffs(meta)["sampling_loss"], aux_router_lr_multiplier=10.0,
      z_loss_coef=_coeffs(meta)["router_z_loss"] if meta.get("z") else 0.0,
      balancing=(meta.get("balancing", "loss") or "none") if token else "none",
      balance_coef=_coeffs(meta)["balancing_loss"], bias_update_rate=0.001, balance_warmup_steps=0)


def _arch(meta, weights):
  name = meta.get("router") or "linear"
  if name == "wide_mlp" and "router.0.router.0.weight" in weights:
    return {2 * meta["d"]: "mlp"}.get(weights["router.0.router.0.weight"].shape[0], name)
  return name


def _params(model, take, aux):
  sizes = dict(D=model.d_model, F=model.d_ff, H=model.head_dim,
               N=model.num_heads, K=model.num_kv_heads)
  groups = {"prelude": [], "stack": [], "coda": []}
  for i, (group, row) in enumerate(schedule_lib.make(model).unrolled()):
    layer = _layer(lambda name, shape: take(f"layers.{i}.{name}.weight", shape), sizes)
    if row < len(groups[group]):
      _require(_equal(groups[group][row], layer), f"layer {i} differs from the layer it is tied to")
    else:
      groups[group].append(layer)
  params = {name: _stack(layers) for name, layers in groups.items() if layers}
  params["embedding"] = take("embed", (model.vocab_size, model.d_model))
  params["final_norm"] = take("norm", (model.d_model,))
  if model.router.name != "fixed":
    params["router"] = _read_routers(model, take, "router.{}")
  if model.router.sampling == "aux_router":
    _require(aux is not None, "no weights of the auxiliary router")
    params["aux_router"] = _read_routers(model, take, aux)
  return params


def _layer(take, sizes):
  """One layer; Hugging Face stores [out, in]."""
  layer = {ours: take(theirs, (sizes["D"],)) for ours, theirs in _NORMS.items()}
  for (part, ours), (theirs, shape) in _LINEARS.items():
    ins, outs = ([sizes[letter] for letter in letters] for letters in shape.split())
    weight = take(theirs, (math.prod(outs), math.prod(ins)))
    layer.setdefault(part, {})[ours] = weight.T.reshape(ins + outs)
  return layer


def _read_routers(model, take, form):
  """Stacks the routers named by `form`; official names of the MLP are 0 and 2."""
  expert, d = model.router.name == "expert_choice", model.d_model
  steps, outs = (model.num_recursions, 1) if expert else (1, model.num_recursions)
  if model.router.arch == "linear":
    shapes = {"out": ("router", (outs, d))}
  else:
    wide = {"mlp": 2, "wide_mlp": 4}[model.router.arch] * d
    shapes = {"hidden": ("router.0", (wide, d)), "out": ("router.2", (outs, wide))}
  return {ours: np.stack([take(f"{form.format(r)}.{theirs}.weight", shape).T for r in range(steps)])
          for ours, (theirs, shape) in shapes.items()}


def _stack(layers):
  if isinstance(layers[0], dict):
    return {name: _stack([layer[name] for layer in layers]) for name in layers[0]}
  return np.stack(layers)


def _equal(a, b):
  if isinstance(a, dict):
    return all(_equal(a[name], b[name]) for name in a)
  return np.array_equal(a, b)
