"""Hugging Face folders: ours agree with transformers, and what lies is refused."""

import dataclasses
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from mor.conversion import hf_export
from mor.conversion import layout
from mor.conversion import command
from tests.helpers import checkpoints
from tests.helpers import weights


def theirs(model, dtype="float32"):
  """A random LlamaForCausalLM whose norms matter."""
  import torch
  import transformers
  torch.manual_seed(0)
  config = checkpoints.hf_config(model) | dict(initializer_range=0.2)
  network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
  with torch.no_grad():
    for name, value in network.named_parameters():
      if "norm" in name:
        value.normal_(1.0, 0.2)
  return network.to(getattr(torch, dtype))


@pytest.mark.parametrize("heads,tied,shard", [("mha", True, None), ("gqa", False, "6KB"), ("mqa", True, "6KB")])
def test_logits_are_theirs(heads, tied, shard, tmp_path):
  import torch
  model = checkpoints.llama(**checkpoints.HEADS[heads], tie_embeddings=tied)
  network = theirs(model)
  network.save_pretrained(tmp_path, **({} if shard is None else dict(max_shard_size=shard)))
  assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard
  assert (tmp_path / "model.safetensors.index.json").exists() == bool(shard)
  read = command.read(f"hf:{tmp_path}")
  assert read.model.tie_embeddings is tied and ("head" in read.variables["params"]) is not tied
  assert read.model.norm_eps == 1e-3 and read.model.rope_theta == 300.0
  with torch.no_grad():
    expected = network(torch.tensor(checkpoints.TOKENS_BT)).logits.numpy()
  np.testing.assert_allclose(checkpoints.logits(read.model, read.variables), expected, rtol=0, atol=1e-5)


def test_llama_3_scaling_is_theirs(tmp_path):
  """Frequencies of all three kinds: kept, divided, and between."""
  import torch
  import transformers
  model = checkpoints.llama(head_dim=10)
  scaling = dict(rope_type="llama3", rope_theta=300.0, factor=4.0, low_freq_factor=0.5, high_freq_factor=1.5,
                 original_max_position_embeddings=9)
  torch.manual_seed(0)
  fields = checkpoints.hf_config(model) | dict(initializer_range=0.3, rope_parameters=scaling)
  network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()
  network.save_pretrained(tmp_path)
  read = command.read(f"hf:{tmp_path}")
  assert read.model.rope_scaling.factor == 4.0 and read.model.rope_scaling.original_context == 9
  with torch.no_grad():
    expected = network(torch.tensor(checkpoints.TOKENS_BT)).logits.numpy()
  np.testing.assert_allclose(checkpoints.logits(read.model, read.variables), expected, rtol=0, atol=1e-5)
  plain = dataclasses.replace(read.model, rope_scaling=dataclasses.replace(read.model.rope_scaling, factor=1.0))
  assert np.abs(checkpoints.logits(plain, read.variables) - expected).max() > 1e-3
  hf_export.write_llama(tmp_path / "again", read.model, read.variables, tokenizer=None, chat_template=None, context=48,
                        dtype="float32", special_ids={})
  again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
  with torch.no_grad():
    np.testing.assert_allclose(again(torch.tensor(checkpoints.TOKENS_BT)).logits.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_widens_exactly(dtype, tmp_path):
  import torch
  model = checkpoints.llama()
  network = theirs(model, dtype)
  network.save_pretrained(tmp_path)
  read = command.read(f"hf:{tmp_path}")
  written = dict(layout.write(read.variables, read.model, "hf"))
  for key, value in network.state_dict().items():
    if key != "lm_head.weight":
      assert written[key].dtype == np.float32
      np.testing.assert_array_equal(written[key], value.float().numpy(), err_msg=key)
  number = np.dtype(getattr(ml_dtypes, dtype, dtype))
  checkpoints.write_folder(tmp_path / "again", checkpoints.hf_config(model),
                           {key: array.astype(number) for key, array in written.items()})
  torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
  (tmp_path / "model.safetensors").unlink()
  for path in (tmp_path / "again", tmp_path):  # read, written and read again; a pickle
    assert checkpoints.equal(command.read(f"hf:{path}").variables, read.variables)


def test_an_index_may_name_pickles(tmp_path):
  import torch
  model = checkpoints.llama()
  variables = checkpoints.hf_folder(tmp_path, model)
  (tmp_path / "model.safetensors").unlink()
  arrays = dict(layout.write(variables, model, "hf"))
  shards = {"a.bin": list(arrays)[:7], "b.bin": list(arrays)[7:]}
  for name, keys in shards.items():
    torch.save({key: torch.tensor(arrays[key]) for key in keys}, tmp_path / name)
  (tmp_path / "pytorch_model.bin.index.json").write_text(
      json.dumps(dict(weight_map={key: name for name, keys in shards.items() for key in keys})))
  assert checkpoints.equal(command.read(f"hf:{tmp_path}").variables, variables)


@pytest.mark.parametrize("fields", [
    dict(rope_theta=None, rope_parameters=dict(rope_type="default", rope_theta=300.0)),
    dict(rope_scaling=dict(type="default")),
    dict(head_dim=None, hidden_size=20, num_attention_heads=2, num_key_value_heads=None),
    dict(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=None),
    dict(architectures=None, hidden_act="swish"),
])
def test_configs_of_other_versions(fields, tmp_path):
  small = dict(num_heads=2, num_kv_heads=2, head_dim=10) if "head_dim" in fields else {}
  model = checkpoints.llama(**small)
  variables = checkpoints.hf_folder(tmp_path, model, **fields)
  read = command.read(f"hf:{tmp_path}")
  assert read.model == model and checkpoints.equal(read.variables, variables)


def test_defaults_are_those_of_transformers(tmp_path):
  import transformers
  config = checkpoints.hf_config(checkpoints.llama())
  for key in ("rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "num_key_value_heads"):
    config.pop(key)
  expected = transformers.LlamaConfig()
  model = checkpoints.llama(num_kv_heads=4, tie_embeddings=False)
  checkpoints.write_folder(tmp_path, config, dict(layout.write({"params": weights.draw(model)}, model, "hf")))
  read = command.read(f"hf:{tmp_path}")
  assert read.model.norm_eps == expected.rms_norm_eps and read.context == expected.max_position_embeddings
  assert read.model.rope_theta == 10000.0 and read.model.num_kv_heads == 4 and not read.model.tie_embeddings


@pytest.mark.parametrize("jinja", [True, False])
def test_tokenizer_comes_along(jinja, tmp_path):
  model = checkpoints.llama(vocab_size=300)
  checkpoints.hf_folder(tmp_path, model, eos_token_id=[0, 5], pad_token_id=-1)
  checkpoints.tokenizer().save(str(tmp_path / "tokenizer.json"))
  said = dict(chat_template=[dict(name="tool", template="no"), dict(name="default", template="{{a}}")],
              eos_token=dict(content="<|endoftext|>"), bos_token="<|im_start|>", pad_token=None, add_bos_token=True)
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
  if jinja:
    (tmp_path / "chat_template.jinja").write_text("{{b}}")
  read = command.read(f"hf:{tmp_path}")
  assert read.tokenizer == (tmp_path / "tokenizer.json").read_text()
  assert read.chat_template == ("{{b}}" if jinja else "{{a}}")
  assert read.special_ids == dict(bos=(1,), eos=(0, 5)) and read.context == 77 and read.add_bos
  assert read.special_tokens == dict(bos="<|im_start|>", eos="<|endoftext|>")


def test_harmless_tensors_are_passed_over(tmp_path):
  model = checkpoints.llama()
  arrays = dict(layout.write({"params": weights.draw(model)}, model, "hf"))
  arrays["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
  arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
  checkpoints.write_folder(tmp_path, checkpoints.hf_config(model), arrays)
  assert "head" not in command.read(f"hf:{tmp_path}").variables["params"]


@pytest.mark.parametrize("fields,message", [
    (dict(model_type="qwen2"), "config.json: model_type 'qwen2' is unsupported"),
    (dict(model_type=None), "model_type None is unsupported"),
    (dict(architectures=["LlamaForTokens"]), "architectures .'LlamaForTokens'. are unsupported"),
    (dict(model_type="mistral"), "sliding_window=4096 is unsupported"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor=None; give a number"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=1.0,
                            original_max_position_embeddings=16)), "use 0 < low < high"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "of type 'linear' is unsupported"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)), "rope_parameters of type 'yarn' is unsupported"),
    (dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
    (dict(attention_bias=True), "attention_bias=True is unsupported"),
    (dict(mlp_bias=True), "mlp_bias=True is unsupported"),
    (dict(hidden_act="gelu"), "hidden_act='gelu' is unsupported"),
    (dict(quantization_config=dict(bits=4)), "quantization_config"),
    (dict(hidden_size="20"), "config.json: hidden_size='20'; give a number"),
    (dict(num_hidden_layers=None), "num_hidden_layers=None"),
    (dict(num_attention_heads=0), "num_heads=0"),
    (dict(num_hidden_layers=2**70), "num_layers=1180591620717411303424 is no size of a model"),
    (dict(num_hidden_layers=60000), "has 29 tensors, its config says 60000 layers"),
    (dict(num_attention_heads=10**12), "num_heads=1000000000000 is no size of a model"),
    (dict(hidden_size=10**200), "hidden_size=10+.*0; give a number of type int"),
    (dict(rms_norm_eps=10**400), "rms_norm_eps=1.*; give a number of type float"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan; give a number"),
    (dict(rope_parameters="x"), "rope_parameters='x'; give a group"),
    (dict(rope_parameters=dict(full_attention=dict(rope_type="yarn"))), "use a model with one scaling"),
    (dict(rope_scaling=dict(factor=2.0)), "rope_scaling=.'factor': 2.0. is unsupported"),
    (dict(rope_scaling=dict(rope_type=["llama3"])), "rope_scaling of type .'llama3'. is unsupported"),
    (dict(rope_theta=[1.0]), "rope_theta=.1.0.; give a number"),
    (dict(max_position_embeddings=0), "max_position_embeddings=0; give a number of positions"),
    (dict(hidden_act=["silu"]), "hidden_act=.'silu'. is unsupported"),
    (dict(architectures=3), "architectures 3 are unsupported"),
    (dict(model_type=["llama"]), "model_type .'llama'. is unsupported"),
    (dict(rope_scaling=True), "rope_scaling=True; give a group"),
    (dict(eos_token_id=["x"]), "eos_token_id=.'x'.; give an id"),
    (dict(bos_token_id=1.5), "bos_token_id=1.5; give an id"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings='yes'"),
    (dict(num_key_value_heads=3), "config.json: model.num_heads=4 is not a multiple"),
    (dict(head_dim=7), "model.head_dim=7 is odd"),
    (dict(num_hidden_layers=4), "has no tensor 'model.layers.3.input_layernorm.weight', .* and 5 more"),
    (dict(num_hidden_layers=2), "has tensor 'model.layers.2.input_layernorm.weight', .* and 5 more, which a hf"),
    (dict(num_key_value_heads=1), r"'model.layers.0.self_attn.k_proj.weight' has shape \(12, 20\), .* says \(6, 20\)"),
    (dict(tie_word_embeddings=False), "has no tensor 'lm_head.weight'"),
])
def test_configs_that_are_refused(fields, message, tmp_path):
  checkpoints.hf_folder(tmp_path, checkpoints.llama(), **fields)
  refuses(tmp_path, message)


@pytest.mark.parametrize("change,message", [
    (lambda a: a.pop("model.norm.weight"), "has no tensor 'model.norm.weight'"),
    (lambda a: a.update({"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}),
     "model.safetensors has tensor 'model.layers.0.self_attn.q_proj.bias', which"),
    (lambda a: a.update({"lm_head.weight": np.ones((61, 20), np.float32)}),
     "'lm_head.weight' differs from the embedding"),
    (lambda a: a.update({"model.norm.weight": np.ones(20)}), "'model.norm.weight' has unsupported type F64"),
    (lambda a: a.update({"model.norm.weight": np.ones((1, 20), np.float32)}), r"has shape \(1, 20\), .* \(20,\)"),
])
def test_tensors_that_are_refused(change, message, tmp_path):
  model = checkpoints.llama()
  arrays = dict(layout.write({"params": weights.draw(model)}, model, "hf"))
  change(arrays)
  checkpoints.write_folder(tmp_path, checkpoints.hf_config(model), arrays)
  refuses(tmp_path, message)


@pytest.mark.parametrize("name,text,message", [
    ("config.json", "{", "config.json is not JSON"),
    ("config.json", "[1]", "config.json holds a list"),
    ("tokenizer.json", "{}", "tokenizer.json is not a tokenizers file"),
    ("config.json", "[" * 100000, "config.json is not JSON"),
    ("config.json", '{"vocab_size": 1' + "0" * 5000 + "}", "config.json is not JSON"),
    ("generation_config.json", "[]", "generation_config.json holds a list"),
    ("tokenizer_config.json", "x", "tokenizer_config.json is not JSON"),
    ("tokenizer_config.json", '{"chat_template": 3}', "tokenizer_config.json: chat_template is a int, not text"),
    ("tokenizer_config.json", '{"eos_token": ["a"]}', "tokenizer_config.json: eos is a list, not text"),
])
def test_files_that_are_refused(name, text, message, tmp_path):
  checkpoints.hf_folder(tmp_path, checkpoints.llama())
  (tmp_path / name).write_text(text)
  refuses(tmp_path, message)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                  "chat_template.jinja", "model.safetensors"])
@pytest.mark.parametrize("kind", ["directory", "loop", "nowhere", "bytes"])
def test_things_in_place_of_files_are_refused(name, kind, tmp_path):
  checkpoints.hf_folder(tmp_path, checkpoints.llama())
  path = tmp_path / name
  path.unlink(missing_ok=True)
  if kind == "directory":
    path.mkdir()
  elif kind == "bytes":
    path.write_bytes(b"\xff\xfe{")
  else:
    path.symlink_to(name if kind == "loop" else "absent")
  with pytest.raises((ValueError, OSError), match=path.stem) as caught:
    command.read(f"hf:{tmp_path}")
  assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
  checkpoints.hf_folder(tmp_path, checkpoints.llama())
  checkpoints.tokenizer().save(str(tmp_path / "tokenizer.json"))
  refuses(tmp_path, "the tokenizer has id 2.. and the embedding 61 rows")


@pytest.mark.parametrize("spec,error,message", [
    ("gguff:x", ValueError, "use hf:PATH, gguf:PATH, official_mor:PATH"),
    ("model", ValueError, "use hf:PATH"),
    ("hf:", ValueError, "use hf:PATH"),
    ("hf:/no/such/folder", FileNotFoundError, "there is no /no/such/folder"),
])
def test_sources_that_are_refused(spec, error, message):
  with pytest.raises(error, match=message):
    command.read(spec)


def test_a_folder_is_wanted(tmp_path):
  (tmp_path / "model.safetensors").write_bytes(b"")
  with pytest.raises(ValueError, match="is no folder"):
    command.read(f"hf:{tmp_path / 'model.safetensors'}")
  with pytest.raises(ValueError, match="holds no config.json; name the folder"):
    command.read(f"hf:{tmp_path}")
  checkpoints.hf_folder(tmp_path, checkpoints.llama())
  (tmp_path / "model.safetensors").unlink()
  refuses(tmp_path, "holds none of model.safetensors")


def refuses(folder: pathlib.Path, message: str) -> None:
  """Reading the folder is one line that says so."""
  with pytest.raises(ValueError, match=message) as caught:
    command.read(f"hf:{folder}")
  assert "\n" not in str(caught.value)
