"""The parameters of a model: one row for each, which every reader shares.

  LAYER  the parameters of a layer, below the groups prelude, stack and coda
  TOP    the parameters beside the layers

A row says where the parameter is, which letters its axes have, what splits them,
and what other formats call it. Sharding, conversion, export, decoding weights,
memory counts and recursive initialisation read these rows. A router declares
its own rows (`model/routers/base.py`), which readers take beside these.

Arrays have their inputs before their outputs, `[D, N, H]`; the layers of a group
are stacked on a leading axis. Elsewhere a projection is `[out, in]`, heads
flattened (`conversion/layout.py`).

Source of names: transformers models/llama; llama.cpp gguf-py tensor_mapping.py;
raymin0223/mixture_of_recursions model/mor_model.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
from typing import Any

from mor import model_config

GROUPS = ("prelude", "stack", "coda")  # of layers, in the order in which they run


def always(model: model_config.ModelConfig) -> bool:
  """Returns True: every model has the parameter."""
  del model
  return True


def _has_head(model: model_config.ModelConfig) -> bool:
  return not model.tie_embeddings


def _has_qk_norm(model: model_config.ModelConfig) -> bool:
  return model.qk_norm


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One parameter.

  Attributes:
    path: leaf below its group, e.g. "attention/q", or below its collection, e.g. "router/out".
    ins, outs: letters (`types.py`) of the input and the output axes; a vector or a
      table, which multiplies nothing, has no inputs.
    axes: logical axis of each letter: "vocab", "model", "heads" or "ffw"; None is
      never split over devices.
    hf: name in Hugging Face, without ".weight"; of a layer's parameter without the
      layer. "{i}" stands for the index on the axis of `count`.
    gguf: name in llama.cpp, likewise.
    official: name in the official checkpoints; "" is `hf`. Of a router's parameter
      without the module of its step.
    interleaved: True if llama.cpp's Llama interleaves the halves of its heads.
    merged: matrix that decoding makes of it and of the other rows of this name.
    norm: path of the norm that its inputs come from; "" is none.
    collection: "params", or "balance" if no gradient reaches it.
    count: length of a leading axis of its own, e.g. the number of routers; None is no axis.
    widths: sizes of letters that stand for no field of the model's config.
    when: tells whether a model has the parameter.
  """

  path: str
  ins: str
  outs: str
  axes: tuple[str | None, ...]
  hf: str = ""
  gguf: str = ""
  official: str = ""
  interleaved: bool = False
  merged: str = ""
  norm: str = ""
  collection: str = "params"
  count: int | None = None
  widths: tuple[tuple[str, int], ...] = ()
  when: Callable[[model_config.ModelConfig], bool] = always

  def __post_init__(self):
    if len(self.axes) != len(self.ins + self.outs):
      raise ValueError(f"parameter {self.path!r} has axes {self.ins + self.outs!r} and logical axes {self.axes}; "
                       "give one for each letter")

  @property
  def name(self) -> str:
    """Last part of the path: "q" of "attention/q"."""
    return self.path.split("/")[-1]

  @property
  def group(self) -> str:
    """First part of the path: "router" of "router/out"."""
    return self.path.split("/")[0]

  def shape(self, model: model_config.ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the sizes of the input axes and of the output axes."""
    sizes = dict(D=model.d_model, F=model.d_ff, H=model.head_dim, N=model.num_heads, K=model.num_kv_heads,
                 V=model.vocab_size, R=model.num_recursions) | dict(self.widths)
    return tuple(sizes[letter] for letter in self.ins), tuple(sizes[letter] for letter in self.outs)

  def matrix(self, model: model_config.ModelConfig) -> tuple[int, int]:
    """Returns inputs and outputs, each flattened to one axis."""
    ins, outs = self.shape(model)
    return math.prod(ins), math.prod(outs)

  def size(self, model: model_config.ModelConfig) -> int:
    """Returns the number of its entries, of all `count` of them."""
    return math.prod(self.matrix(model)) * (1 if self.count is None else self.count)

  def is_at(self, path: str) -> bool:
    """Returns True if a path ends in this parameter."""
    return path == self.path or path.endswith(f"/{self.path}")


_WHOLE, _DNH, _NHD = (None,), ("model", "heads", None), ("heads", None, "model")
LAYER = (
    Parameter("attention_norm", "", "D", _WHOLE, "input_layernorm", "attn_norm"),
    Parameter("attention/q", "D", "NH", _DNH, "self_attn.q_proj", "attn_q", interleaved=True, merged="qkv",
              norm="attention_norm"),
    Parameter("attention/k", "D", "KH", _DNH, "self_attn.k_proj", "attn_k", interleaved=True, merged="qkv",
              norm="attention_norm"),
    Parameter("attention/v", "D", "KH", _DNH, "self_attn.v_proj", "attn_v", merged="qkv", norm="attention_norm"),
    Parameter("attention/o", "NH", "D", _NHD, "self_attn.o_proj", "attn_output", merged="o"),
    Parameter("attention/q_norm", "", "H", _WHOLE, "self_attn.q_norm", "attn_q_norm", when=_has_qk_norm),
    Parameter("attention/k_norm", "", "H", _WHOLE, "self_attn.k_norm", "attn_k_norm", when=_has_qk_norm),
    Parameter("ffw_norm", "", "D", _WHOLE, "post_attention_layernorm", "ffn_norm"),
    Parameter("ffw/gate", "D", "F", ("model", "ffw"), "mlp.gate_proj", "ffn_gate", merged="gate_up", norm="ffw_norm"),
    Parameter("ffw/up", "D", "F", ("model", "ffw"), "mlp.up_proj", "ffn_up", merged="gate_up", norm="ffw_norm"),
    Parameter("ffw/down", "F", "D", ("ffw", "model"), "mlp.down_proj", "ffn_down", merged="down"),
)
TOP = (
    Parameter("embedding", "", "VD", ("vocab", "model"), "model.embed_tokens", "token_embd"),
    Parameter("final_norm", "", "D", _WHOLE, "model.norm", "output_norm"),
    Parameter("head", "", "VD", ("vocab", "model"), "lm_head", "output", when=_has_head),
)
PROJECTIONS = tuple(row for row in LAYER if row.ins)  # each may have a low-rank delta


def layer(model: model_config.ModelConfig) -> tuple[Parameter, ...]:
  """Returns the rows of a layer of this model."""
  return tuple(row for row in LAYER if row.when(model))


def top(model: model_config.ModelConfig) -> tuple[Parameter, ...]:
  """Returns the rows beside the layers of this model."""
  return tuple(row for row in TOP if row.when(model))


def delta(row: Parameter, part: str, widths: tuple[tuple[str, int], ...] = ()) -> Parameter:
  """Returns the row of the low-rank delta of a projection: `a` [I, A] or `b` [A, O], never split."""
  ins, outs = {"a": ("I", "A"), "b": ("A", "O")}[part]
  return Parameter(f"lora/{row.path}/{part}", ins, outs, (None, None), f"{row.hf}_{part}", widths=widths)


def deltas(model: model_config.ModelConfig) -> tuple[Parameter, ...]:
  """Returns the rows of the low-rank deltas of a layer of this model."""
  rows = []
  for row in PROJECTIONS:
    if row.name in model.lora.ranks:
      ins, outs = row.matrix(model)
      widths = (("I", ins), ("A", model.lora.ranks[row.name]), ("O", outs))
      rows += [delta(row, part, widths) for part in "ab"]
  return tuple(rows)


DELTAS = tuple(delta(row, part) for row in PROJECTIONS for part in "ab")


def find(path: str, rows: Iterable[Parameter] = ()) -> Parameter:
  """Returns the row of the parameter (or of its moment in an optimizer) at a path.

  Args:
    path: e.g. "params/stack/attention/q".
    rows: rows of the model's router, beside the tables.

  Raises:
    ValueError: no row is at the path, or several are.
  """
  found = [row for row in (*LAYER, *TOP, *DELTAS, *rows) if row.is_at(path)]
  if len(found) != 1:
    raise ValueError(f"{path!r} is {len(found)} parameters; it must be one: declare it in mor/parameters.py, or in the "
                     "`parameters` of its router")
  return found[0]


def get(tree: Mapping[str, Any], path: str) -> Any:
  """Returns the leaf at a path such as "attention/q"."""
  for name in path.split("/"):
    tree = tree[name]
  return tree


def put(tree: dict, path: str, leaf: Any) -> None:
  """Sets the leaf at a path, making its groups."""
  *groups, name = path.split("/")
  for group in groups:
    tree = tree.setdefault(group, {})
  tree[name] = leaf
