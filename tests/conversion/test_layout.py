"""The tensors of each kind of file, both ways."""

import numpy as np
import pytest

from mor.conversion import layout
from mor.conversion import pretrained
from tests.helpers import checkpoints
from tests.helpers import tiny
from tests.helpers import weights

EXPERT = dict(capacity=(), sampling="aux_loss")
LOSS_FREE = tiny.TOKEN_CHOICE | dict(balancing="loss_free")
MODELS = {
    "hf": ("hf", checkpoints.llama()),
    "hf_untied": ("hf", checkpoints.llama(tie_embeddings=False)),
    "gguf": ("gguf", checkpoints.llama()),
    "gguf_halves": ("gguf_halves", checkpoints.llama()),
    "gguf_mqa": ("gguf", checkpoints.llama(num_kv_heads=1, tie_embeddings=False)),
    "vanilla": ("official_mor", checkpoints.llama()),
    "recursive": ("official_mor", tiny.config(model=dict(router=tiny.FIXED)).model),
    "sequence": ("official_mor", tiny.config(model=dict(sharing="middle_sequence", router=tiny.FIXED)).model),
    "expert": ("official_mor", tiny.config().model),
    "expert_cycle": ("official_mor", tiny.config(model=dict(sharing="cycle", num_layers=6)).model),
    "aux_mlp": ("official_mor", tiny.config(model=dict(router=dict(sampling="aux_router", arch="mlp"))).model),
    "random": ("official_mor", tiny.config(model=dict(router=dict(arch="random", sampling="none"))).model),
    "token": ("official_mor", tiny.config(model=dict(router=tiny.TOKEN_CHOICE | dict(arch="wide_mlp"))).model),
    "token_cycle": ("official_mor", tiny.config(model=dict(sharing="cycle", num_layers=6, router=LOSS_FREE)).model),
}


def draw(model):
  """Variables of a model; a bias where there is one."""
  variables = {"params": weights.draw(model)}
  if model.router.arch == "random":
    variables["params"].pop("router", None)
  if model.router.balancing == "loss_free":
    variables["balance"] = {"bias_R": np.array([-0.2, 0.1, 0.3], np.float32)}
  return variables


@pytest.mark.parametrize("name", MODELS)
def test_reading_undoes_writing(name):
  form, model = MODELS[name]
  variables = draw(model)
  arrays = dict(layout.write(variables, model, form))
  assert len(arrays) == len(layout.layout(model, form)), "two entries have one name"
  assert all(array.flags.c_contiguous for array in arrays.values())
  assert {key: array.shape for key, array in arrays.items()} == {
      entry.key: entry.shape for entry in layout.layout(model, form)}
  assert checkpoints.equal(pretrained.assemble(checkpoints.InMemory(arrays), model, form), variables)


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_names_are_theirs(tied):
  import transformers
  model = checkpoints.llama(tie_embeddings=tied)
  theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoints.hf_config(model)))
  shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
  if tied:
    shapes.pop("lm_head.weight")
  assert {entry.key: entry.shape for entry in layout.layout(model, "hf")} == shapes


def test_llama_cpp_names_are_theirs():
  import gguf
  known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
  model = checkpoints.llama(tie_embeddings=False)
  for hf, ours in zip(layout.layout(model, "hf"), layout.layout(model, "gguf"), strict=True):
    assert known.get_name(hf.key, try_suffixes=(".weight",)) == ours.key


@pytest.mark.parametrize("name,keys", [
    ("expert", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.block.0.mlp.up_proj.weight",
                "model.layers.3.block.1.self_attn.q_proj.weight", "model.layers.4.input_layernorm.weight",
                "model.layers.3.mor_router.router.weight"]),
    ("expert_cycle", ["model.layers.0.block.0.mlp.up_proj.weight", "model.layers.2.block.1.mlp.up_proj.weight",
                      "model.layers.0.mor_router.router.weight"]),
    ("aux_mlp", ["model.layers.1.mor_router.router.0.weight", "model.layers.2.mlp_router.router.2.weight"]),
    ("token", ["model.layers.1.block_list.2.1.mlp.up_proj.weight", "model.layers.1.mor_router.router.2.weight",
               "model.layers.2.mlp.up_proj.weight"]),
    ("token_cycle", ["model.layers.block_list.0.1.mlp.up_proj.weight", "model.layers.mor_router.router.weight",
                     "model.layers.router_bias"]),
    ("recursive", ["model.layers.7.mlp.up_proj.weight", "model.norm.weight"]),
])
def test_official_names(name, keys):
  """Written down from upstream's modules."""
  form, model = MODELS[name]
  known = {entry.key for entry in layout.layout(model, form)}
  assert set(keys) <= known
  assert len({key.split(".")[2] for key in known if ".layers." in key and key.split(".")[2].isdigit()}) == {
      "expert": 5, "expert_cycle": 3, "aux_mlp": 5, "token": 3, "token_cycle": 0, "recursive": 8}[name]


def test_layers_that_share_are_named_once_per_use():
  form, model = MODELS["expert"]
  entries = [entry for entry in layout.layout(model, form) if entry.path == "params/stack/ffw/up"]
  assert [(entry.key.split(".mlp")[0].split("layers.")[1], entry.index[0]) for entry in entries] == [
      (f"{1 + r}.block.{j}", j) for r in range(3) for j in range(2)]


@pytest.mark.parametrize("heads,kind", [(4, "attention/q"), (2, "attention/k")])
def test_interleaved_rows_rotate_as_neighbours(heads, kind):
  """llama.cpp turns (x0, x1), (x2, x3), …; Hugging Face and we turn (x0, xh), (x1, xh+1), …"""
  rng = np.random.default_rng(0)
  width, half = 6, 3
  rows, x_D = rng.normal(size=(heads * width, 20)), rng.normal(size=20)
  angle_H = rng.normal(size=half)
  cos_H, sin_H = np.cos(angle_H), np.sin(angle_H)

  def turn(a, b):
    return a * cos_H - b * sin_H, a * sin_H + b * cos_H
  ours = (rows @ x_D).reshape(heads, width)
  first, second = turn(ours[:, :half], ours[:, half:])
  theirs = (layout.interleave(rows, heads) @ x_D).reshape(heads, half, 2)
  even, odd = turn(theirs[..., 0], theirs[..., 1])
  np.testing.assert_allclose(even, first, rtol=1e-12)
  np.testing.assert_allclose(odd, second, rtol=1e-12)
  np.testing.assert_array_equal(layout.deinterleave(layout.interleave(rows, heads), heads), rows)
  model = checkpoints.llama()
  assert not any(entry.heads for entry in layout.layout(model, "gguf_halves"))
  entries = layout.layout(model, "gguf")
  assert {entry.heads for entry in entries if entry.path == f"params/stack/{kind}"} == {heads}
