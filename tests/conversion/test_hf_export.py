"""Folders for transformers: whole, exact, read in a fresh process, or refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
import tokenizers
import torch
import transformers

from mor.conversion import hf_export
from mor.conversion import hf_import
from mor.serve import model as model_lib
from tests.helpers import exported
from tests.helpers import tiny

FLAT = dict(sharing="cycle", num_layers=3)
TOKEN = FLAT | dict(tie_embeddings=False, router=tiny.TOKEN_CHOICE)
EXPERT = FLAT | dict(tie_embeddings=False)
RELAXED = FLAT | dict(router=tiny.FIXED, lora=exported.RANKS)
MODELS = {
    "vanilla": tiny.VANILLA | dict(num_layers=3),
    "recursive": FLAT | dict(router=tiny.FIXED, tie_embeddings=False),
    "relaxed": RELAXED,
    "expert_choice": EXPERT,
    "token_choice": TOKEN,
}
LOSS_FREE = TOKEN | dict(router=tiny.TOKEN_CHOICE | dict(balancing="loss_free", arch="mlp"), kv_plan="hybrid")
AUX = dict(router=dict(sampling="aux_router", arch="wide_mlp", capacity=(1.0, 0.5, 0.25)))
PROMPTS = [[5, 9, 2, 33, 7], [60, 1], [8, 8, 40]]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"

GENERATE = """
import json, sys
import torch, transformers
folders, prompts = json.loads(sys.argv[1])
width = max(map(len, prompts))
ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
answers = {}
for name, folder in folders.items():
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
  options = dict(max_new_tokens=64, do_sample=False, use_cache=True)
  rows = model.generate(ids, attention_mask=mask, **options)
  single = model.generate(torch.tensor(prompts[:1]), **options)
  answers[name] = [rows[:, width:].tolist(), single[:, len(prompts[0]):].tolist()]
print(json.dumps(["mor" in sys.modules, "jax" in sys.modules, answers]))
"""


def run(script: str, *arguments: str, home) -> list:
  """What a fresh process prints, as JSON; it can import transformers but not our package."""
  environment = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
  done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=home, capture_output=True, text=True,
                        check=False, env=environment)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_generate_in_a_fresh_process_is_ours(tmp_path):
  cases = {name: exported.make(tmp_path / name, **model) for name, model in MODELS.items()}
  folders = {name: str(case.folder) for name, case in cases.items()}
  ours_imported, jax_imported, answers = run(GENERATE, json.dumps([folders, PROMPTS]), home=tmp_path)
  assert not ours_imported and not jax_imported
  for name, case in cases.items():
    model = model_lib.Model(case.config, case.variables, None, exported.CONTEXT)
    ours = model.generate(PROMPTS, temperature=0.0, max_tokens=64)
    rows, single = answers[name]
    expected = [list(completion.tokens) for completion in ours]
    assert len({token for row in expected for token in row}) > 3, "nearly one token only; draw other parameters"
    assert rows == expected, name
    assert single == expected[:1], name
    if case.config.router.name != "fixed":
      assert len({depth for completion in ours for depth in completion.depths}) == 3, "some depth is never chosen"


FEW = FLAT | dict(num_layers=12, num_recursions=12, router=tiny.FIXED)  # fewer tensors than unrolled layers


@pytest.mark.parametrize("model", [MODELS["vanilla"], RELAXED, LOSS_FREE, AUX, FEW],
                         ids=["vanilla", "lora", "token", "expert", "few"])
def test_read_is_the_inverse_of_write(model, tmp_path):
  case = exported.make(tmp_path / "full", **model)
  fields, variables = hf_export.read(case.folder)
  assert tiny.config(model=dict(execution="masked", scan_layers=False) | fields).model == case.config
  jax.tree.map(np.testing.assert_array_equal, variables, case.variables)
  exported.write(tmp_path / "half", case.config, case.variables, dtype="bfloat16")
  _, halves = hf_export.read(tmp_path / "half")

  def check(path, half, full):
    keys = jax.tree_util.keystr(path)
    rounded = full if "router" in keys or "balance" in keys else np.asarray(full).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(half, np.asarray(rounded, np.float32), err_msg=keys)

  jax.tree_util.tree_map_with_path(check, halves, case.variables)
  exported.write(tmp_path / "again", case.config, halves, dtype="bfloat16")
  assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "half/model.safetensors").read_bytes()


@pytest.mark.parametrize("model", [MODELS["vanilla"], RELAXED | dict(kv_plan="hybrid"), dict(
    sharing="middle_sequence", num_layers=6, num_recursions=2, router=tiny.FIXED, tie_embeddings=False,
    lora=dict(q=3, down=2))], ids=["vanilla", "cycle", "middle_sequence"])
@torch.no_grad()
def test_unrolled_it_is_a_plain_llama(model, tmp_path):
  case = exported.make(tmp_path / "mor", **model)
  hf_export.write_llama(tmp_path / "llama", case.config, case.variables, tokenizer=None, chat_template=None, context=72,
                        dtype="float32", special_ids={})
  mor = exported.load_modeling().MorForCausalLM.from_pretrained(case.folder)
  llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
  assert type(llama) is transformers.LlamaForCausalLM
  assert llama.config.num_hidden_layers == case.config.num_layers
  tokens_BT = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(0))
  expected_BTV = mor(tokens_BT).logits
  error = (llama(tokens_BT).logits - expected_BTV).abs().max() / expected_BTV.abs().max()
  assert error < 1e-5, error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [dict(num_heads=4, num_kv_heads=4), dict(num_heads=4, num_kv_heads=1),
                                   dict(num_heads=4, num_kv_heads=2)], ids=["MHA", "MQA", "GQA"])
def test_a_llama_comes_back_bitwise(heads, dtype, tmp_path):
  llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=61, hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=heads["num_heads"],
      num_key_value_heads=heads["num_kv_heads"], head_dim=6, max_position_embeddings=72, rope_theta=500.0))
  llama.to(getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
  first = hf_import.read(tmp_path / "theirs")
  hf_export.write_llama(tmp_path / "ours", first.model, first.variables, tokenizer=None, chat_template=None,
                        context=first.context, dtype=dtype, special_ids={"eos": (2,)})
  second = hf_import.read(tmp_path / "ours")
  assert second.model == first.model and second.context == first.context
  jax.tree.map(np.testing.assert_array_equal, second.variables, first.variables)
  theirs, ours = (safetensors_numpy.load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
  assert theirs.keys() == ours.keys()
  for name, tensor in theirs.items():
    assert tensor.dtype == ours[name].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(tensor, ours[name], err_msg=name)


def test_tokenizer_goes_along(tmp_path):
  text = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
  case = exported.make(tmp_path / "plain", **MODELS["vanilla"])
  exported.write(tmp_path / "with", case.config, case.variables, tokenizer=text.to_str(), chat_template=TEMPLATE,
                 special_ids={name: (0,) for name in ("bos", "eos", "pad")})
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "with")
  assert tokenizer(["aba", "ab"], padding=True)["input_ids"] == [[3, 1], [0, 3]]
  assert tokenizer(["aba", "ab"], padding=True)["attention_mask"] == [[1, 1], [0, 1]]
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 0, exported.CONTEXT)
  assert tokenizer.decode([3, 0], skip_special_tokens=True) == "ab"
  chat = [{"role": "user", "content": "ab"}]
  assert tokenizer.apply_chat_template(chat, tokenize=False) == "ab"
  generation = transformers.GenerationConfig.from_pretrained(tmp_path / "with")
  assert (generation.eos_token_id, generation.pad_token_id) == (0, 0)


def test_bytes_on_disk(tmp_path):
  case = exported.make(tmp_path / "full", **LOSS_FREE)
  exported.write(tmp_path / "half", case.config, case.variables, dtype="bfloat16")
  assert sorted(path.name for path in case.folder.iterdir()) == [
      "cache_mor.py", "config.json", "generation_config.json", "model.safetensors", "modeling_mor.py"]
  for code in (hf_export.MODELING, hf_export.CACHE):
    assert (case.folder / code.name).read_bytes() == code.read_bytes()
  half = safetensors_numpy.load_file(tmp_path / "half/model.safetensors")
  assert half["model.stack.0.mlp.down_proj.weight"].dtype == ml_dtypes.bfloat16
  assert half["model.router.0.out.weight"].dtype == np.float32
  assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_write_refuses(tmp_path):
  model = exported.config(**MODELS["vanilla"])
  case = exported.make(tmp_path / "there", **MODELS["vanilla"])
  before = sorted(tmp_path.iterdir())
  with pytest.raises(ValueError, match="there is there and not empty; name a new folder"):
    exported.write(tmp_path / "there", model, case.variables)
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 99}, merges=[]))
  random = dataclasses.replace(exported.config(), router=dataclasses.replace(
      exported.config().router, arch="random", sampling="none"))
  bad_shape = {"params": case.variables["params"] | {"final_norm": np.ones(7, np.float32)}}
  for problem, arguments, options in [
      ("router.arch='random'", (random, case.variables), {}),
      ("dtype='float64'; use", (model, case.variables), dict(dtype="float64")),
      ("chat_template without", (model, case.variables), dict(chat_template=TEMPLATE)),
      ("ids up to 99 and the model 61", (model, case.variables), dict(tokenizer=tokenizer.to_str())),
      ("variables miss 'params/embedding'", (model, {"params": {}}), {}),
      ("variables have, .* 'balance/bias_R'", (model, case.variables | {"balance": {"bias_R": np.ones(1)}}), {}),
      (r"'params/final_norm' has shape \(7,\), .* asks for \(20,\)", (model, bad_shape), {}),
  ]:
    with pytest.raises(ValueError, match=problem):
      exported.write(tmp_path / "new", *arguments, **options)
  assert sorted(tmp_path.iterdir()) == before


def test_llama_refuses_what_is_none(tmp_path):
  options = dict(tokenizer=None, chat_template=None, context=72, dtype="float32", special_ids={})
  for problem, model in [("router.name='expert_choice'", EXPERT),
                         ("model.kv_plan='shared'", FLAT | dict(router=tiny.FIXED, kv_plan="shared")),
                         ("model.d_model=22", MODELS["vanilla"] | dict(d_model=22))]:
    with pytest.raises(ValueError, match=problem):
      hf_export.write_llama(tmp_path / "llama", exported.config(**model), {}, **options)
  assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  case = exported.make(tmp_path / "first", **MODELS["vanilla"])
  (tmp_path / "empty").mkdir()

  def fail(*unused, **options):
    raise OSError("the disk is full")

  with monkeypatch.context() as patch:
    patch.setattr(hf_export.safetensors_numpy, "save_file", fail)
    for name in ("empty", "new"):
      with pytest.raises(OSError, match="full"):
        exported.write(tmp_path / name, case.config, case.variables)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "first"]
  assert not list((tmp_path / "empty").iterdir())
  exported.write(tmp_path / "empty", case.config, case.variables)  # an empty folder may be there
  assert (tmp_path / "empty/config.json").exists()


def test_read_names_what_is_wrong(tmp_path):
  case = exported.make(tmp_path / "model", **RELAXED)
  weights, config = case.folder / "model.safetensors", case.folder / "config.json"
  state, fields = safetensors_numpy.load_file(weights), json.loads(config.read_text())
  name = "model.lora.2.0.mlp.up_proj_a.weight"
  for problem, broken in [
      (f"model.safetensors has no tensor '{name}'", {key: x for key, x in state.items() if key != name}),
      ("has tensor 'model.norm.bias', which a mor model", state | {"model.norm.bias": state["model.norm.weight"]}),
      (f"tensor '{name}' has shape .20, 2., its config says .2, 20.", state | {name: np.ascontiguousarray(state[name].T)}),
  ]:
    safetensors_numpy.save_file(broken, weights)
    with pytest.raises(ValueError, match=problem):
      hf_export.read(case.folder)
  parts = {f"{i}.safetensors": dict(list(state.items())[i::2]) for i in range(2)}  # as transformers saves a large model
  for part, tensors in parts.items():
    safetensors_numpy.save_file(tensors, case.folder / part)
  weights.rename(tmp_path / "whole")
  (case.folder / "model.safetensors.index.json").write_text(json.dumps(
      dict(weight_map={key: part for part, tensors in parts.items() for key in tensors})))
  jax.tree.map(np.testing.assert_array_equal, hf_export.read(case.folder)[1], case.variables)
  (tmp_path / "whole").rename(weights)
  weights.write_bytes(weights.read_bytes()[:-9])
  with pytest.raises(ValueError, match="model.safetensors"):
    hf_export.read(case.folder)
  for problem, broken in [
      ("model_type 'llama', not 'mor'", fields | {"model_type": "llama"}),
      ("config.json misses sharing, lora", {k: v for k, v in fields.items() if k not in ("sharing", "lora")}),
      ("model.sharing='spiral'", fields | {"sharing": "spiral"}),
      ("model.d_model='20' is of type str", fields | {"hidden_size": "20"}),
  ]:
    config.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=problem):
      hf_export.read(case.folder)
  with pytest.raises(ValueError, match="no such file"):
    hf_export.read(tmp_path)
