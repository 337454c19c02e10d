"""Names and layouts of parameters, here and elsewhere: one table, read in both directions.

Ours are leaves of a layer's parameters (`model/transformer.py`), without the
leading layer axis and with inputs before outputs, `[D, N, H]`. Elsewhere a
projection is `[out, in]`; llama.cpp turns neighbours instead of halves of a
head, so there the rows of q and k are interleaved.

  hf            model.layers.{l}.{name}.weight, l an unrolled layer
  gguf          blk.{l}.{name}.weight
  official_mor  as hf where nothing routes; else a recursion step wraps its layers:
                expert-choice  model.layers.{e + r}.block.{j}.{name}.weight
                               model.layers.{e + r}.mor_router.…, mlp_router.… (auxiliary)
                token-choice   model.layers.{e}.block_list.{r}.{j}.{name}.weight
                               model.layers.{e}.mor_router.…, router_bias
                with e = 1 behind a prelude, else 0; a token-choice model without
                a prelude is no list, so its names have no "{e}."

Source: transformers models/llama; llama.cpp gguf-py tensor_mapping.py and
convert_hf_to_gguf.py, `permute`; raymin0223/mixture_of_recursions
model/mor_model.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from mor import model_config
from mor.model import schedule as schedule_lib
from mor.model.routers import scores


@dataclasses.dataclass(frozen=True)
class Weight:
  """One parameter of a layer.

  Attributes:
    ours: its path, e.g. "attention/q".
    hf: Hugging Face's name, without the layer and ".weight".
    gguf: llama.cpp's.
    ins, outs: letters (`types.py`) of our axes; what is stored as it is, as a
      norm, has no inputs.
  """

  ours: str
  hf: str
  gguf: str
  ins: str
  outs: str

  def shape(self, model: model_config.ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Our input axes and output axes."""
    sizes = dict(D=model.d_model, F=model.d_ff, H=model.head_dim, N=model.num_heads, K=model.num_kv_heads,
                 V=model.vocab_size, R=model.num_recursions, I=model.d_model * scores.WIDTHS.get(model.router.arch, 1),
                 O=1 if model.router.name == "expert_choice" else model.num_recursions)
    return tuple(sizes[letter] for letter in self.ins), tuple(sizes[letter] for letter in self.outs)

  def their_shape(self, model: model_config.ModelConfig) -> tuple[int, ...]:
    """`(out, in)`, or ours without inputs."""
    ins, outs = self.shape(model)
    return (math.prod(outs), math.prod(ins)) if ins else outs

  def heads(self, model: model_config.ModelConfig) -> int:
    """Heads whose rows llama.cpp interleaves; 0 where it does not."""
    return {"attention/q": model.num_heads, "attention/k": model.num_kv_heads}.get(self.ours, 0)

  def read(self, theirs: np.ndarray, model: model_config.ModelConfig) -> np.ndarray:
    """Ours from `[out, in]`."""
    ins, outs = self.shape(model)
    return theirs.T.reshape(ins + outs) if ins else theirs

  def write(self, ours: np.ndarray, model: model_config.ModelConfig) -> np.ndarray:
    """`[out, in]` from ours; contiguous."""
    theirs = np.reshape(ours, self.their_shape(model)[::-1]).T if self.ins else ours
    return np.ascontiguousarray(theirs)


LAYER = (
    Weight("attention_norm", "input_layernorm", "attn_norm", "", "D"),
    Weight("attention/q", "self_attn.q_proj", "attn_q", "D", "NH"),
    Weight("attention/k", "self_attn.k_proj", "attn_k", "D", "KH"),
    Weight("attention/v", "self_attn.v_proj", "attn_v", "D", "KH"),
    Weight("attention/o", "self_attn.o_proj", "attn_output", "NH", "D"),
    Weight("ffw_norm", "post_attention_layernorm", "ffn_norm", "", "D"),
    Weight("ffw/gate", "mlp.gate_proj", "ffn_gate", "D", "F"),
    Weight("ffw/up", "mlp.up_proj", "ffn_up", "D", "F"),
    Weight("ffw/down", "mlp.down_proj", "ffn_down", "F", "D"),
)
TOP = (  # ours, Hugging Face's, llama.cpp's; the head is absent where it is the embedding
    ("embedding", "model.embed_tokens", "token_embd"),
    ("final_norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
)
_LINEAR_ROUTER = (Weight("out", "router", "", "I", "O"),)
_MLP_ROUTER = (Weight("hidden", "router.0", "", "D", "I"), Weight("out", "router.2", "", "I", "O"))
_ROUTERS = {"router": "mor_router", "aux_router": "mlp_router"}  # ours, upstream's


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file, and its place in our variables.

  Attributes:
    key: its name there.
    path: our leaf, e.g. "params/stack/attention/q".
    row: of the leaf's leading axis; None where the leaf has none.
    weight: layout of both.
    interleaved: whether its rows are llama.cpp's.
  """

  key: str
  path: str
  row: int | None
  weight: Weight
  interleaved: bool

  def read(self, theirs: np.ndarray, model: model_config.ModelConfig) -> np.ndarray:
    """Our leaf, or its row, from their tensor."""
    if self.interleaved and self.weight.heads(model):
      theirs = deinterleave(theirs, self.weight.heads(model))
    return self.weight.read(theirs, model)

  def write(self, variables: Mapping[str, Any], model: model_config.ModelConfig) -> np.ndarray:
    """Their tensor from our variables."""
    leaf = get(variables, self.path)
    theirs = self.weight.write(np.asarray(leaf if self.row is None else leaf[self.row]), model)
    if self.interleaved and self.weight.heads(model):
      theirs = interleave(theirs, self.weight.heads(model))
    return theirs


def layout(model: model_config.ModelConfig, form: str) -> tuple[Entry, ...]:
  """Every tensor of a model's file; one that several layers use comes once per use.

  Args:
    model: without LoRA, which these files do not have. Routers are named by
      "official_mor" only.
    form: one of `FORMS`.
  """
  llama_cpp = form == "gguf"
  entries = []
  for ours, hf, gguf in TOP:
    if ours != "head" or not model.tie_embeddings:
      weight = Weight(ours, hf, gguf, "", "D" if ours == "final_norm" else "VD")
      entries.append(Entry(f"{gguf if llama_cpp else hf}.weight", f"params/{ours}", None, weight, False))
  for stem, (group, row) in zip(FORMS[form](model), schedule_lib.make(model).unrolled(), strict=True):
    for weight in LAYER:
      key = f"{stem}.{weight.gguf if llama_cpp else weight.hf}.weight"
      entries.append(Entry(key, f"params/{group}/{weight.ours}", row, weight, llama_cpp))
  return tuple(entries + (_routers(model) if form == "official_mor" else []))


def _routers(model: model_config.ModelConfig) -> list[Entry]:
  """Upstream's routers, the auxiliary ones and the bias of loss-free balancing."""
  names = [] if model.router.name == "fixed" or model.router.arch == "random" else ["router"]
  names += ["aux_router"] if model.router.sampling == "aux_router" else []
  weights = _MLP_ROUTER if model.router.arch in scores.WIDTHS else _LINEAR_ROUTER
  stems = _step_stems(model)
  entries = [Entry(f"{stem}.{_ROUTERS[name]}.{weight.hf}.weight", f"params/{name}/{weight.ours}", row, weight, False)
             for name in names for row, stem in enumerate(stems) for weight in weights]
  if model.router.balancing == "loss_free":
    bias = Weight("bias_R", "router_bias", "", "", "R")
    entries.append(Entry(f"{stems[0]}.router_bias", "balance/bias_R", None, bias, False))
  return entries


def _step_stems(model: model_config.ModelConfig) -> list[str]:
  """Upstream's module of each recursion step; one for all with token-choice."""
  edge = schedule_lib.make(model).prelude
  if model.router.name == "token_choice":
    return [f"model.layers.{edge}" if edge else "model.layers"]
  return [f"model.layers.{edge + r}" for r in range(model.num_recursions)]


def _official(model: model_config.ModelConfig) -> list[str]:
  """Upstream's module of each unrolled layer."""
  if model.router.name == "fixed":
    return FORMS["hf"](model)
  schedule = schedule_lib.make(model)
  steps = _step_stems(model)
  if model.router.name == "token_choice":
    blocks = [f"{steps[0]}.block_list.{r}" for r in range(model.num_recursions)]
  else:
    blocks = [f"{step}.block" for step in steps]
  after = schedule.prelude + len(steps)
  return ([f"model.layers.{i}" for i in range(schedule.prelude)]
          + [f"{block}.{j}" for block in blocks for j in range(schedule.depth)]
          + [f"model.layers.{after + i}" for i in range(schedule.coda)])


FORMS = {  # form -> the module of each unrolled layer
    "hf": lambda model: [f"model.layers.{i}" for i in range(model.num_layers)],
    "gguf": lambda model: [f"blk.{i}" for i in range(model.num_layers)],
    "official_mor": _official,
}


def write(variables: Mapping[str, Any], model: model_config.ModelConfig, form: str) -> Iterator[tuple[str, np.ndarray]]:
  """(name, tensor) of every entry of `layout`."""
  for entry in layout(model, form):
    yield entry.key, entry.write(variables, model)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows `[out, in]` of q or k so that the two halves of a head alternate, as llama.cpp has them."""
  return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
  """Inverse of `interleave`."""
  return rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


ROPE_SCALING = {  # Hugging Face's fields of rope_type "llama3" -> ours
    "factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_context",
}


def get(layer: Mapping[str, Any], path: str) -> Any:
  """The leaf at a path such as "attention/q"."""
  for name in path.split("/"):
    layer = layer[name]
  return layer


def put(layer: dict, path: str, leaf: Any) -> None:
  """Sets the leaf at a path, making its groups."""
  *groups, name = path.split("/")
  for group in groups:
    layer = layer.setdefault(group, {})
  layer[name] = leaf
