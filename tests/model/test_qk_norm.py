"""The norm of queries and keys: one law for each reader of a parameter's row."""

import dataclasses

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import torch
import transformers

from mor import config as config_lib
from mor import costs
from mor import sharding
from mor.conversion import command
from mor.conversion import hf_export
from mor.conversion import hf_import
from mor.conversion import layout
from mor.conversion import recursive_init
from mor.model import transformer
from tests.helpers import checkpoints
from tests.helpers import decoding
from tests.helpers import exit_oracle
from tests.helpers import exiting
from tests.helpers import exported
from tests.helpers import serving
from tests.helpers import tiny
from tests.helpers import weights

NORMED = dict(qk_norm=True, num_layers=5)


def config(**model):
  return tiny.config(model=NORMED | model).model


@pytest.mark.parametrize("model", [dict(kv_plan="hybrid", lora=dict(q=2, k=1)), dict(router=tiny.TOKEN_CHOICE)],
                         ids=["expert, hybrid, lora", "token"])
def test_decoding_equals_forward(model):
  model = config(**model)
  variables, tokens_BT, whole = decoding.expected(model)
  decoder = decoding.decoder(model, "paged")
  decoding.assert_same(decoding.decode(decoder, variables, tokens_BT, decoding.CHUNKS["paged"]), whole)


def test_the_norm_matters_and_every_scale_has_a_gradient():
  model = config()
  variables, tokens_BT = decoding.draw(model), decoding.tokens(model)

  def loss(params):
    out = transformer.Transformer(model).apply({"params": params}, tokens_BT)
    return (transformer.unembed(params, out.hidden_BTD) ** 2).mean()

  grads = jax.jit(jax.grad(loss))(variables["params"])
  for group in ("prelude", "stack", "coda"):
    for name in ("q_norm", "k_norm"):
      assert grads[group]["attention"][name].shape[1:] == (model.head_dim,)
      assert np.all(np.any(np.abs(grads[group]["attention"][name]) > 1e-9, axis=1)), (group, name)


def test_a_scale_of_the_projections_changes_nothing():
  """The head is normed after its projection, so its length is lost."""
  model = config(norm_eps=1e-12, router=tiny.FIXED)
  variables, tokens_BT = decoding.draw(model), decoding.tokens(model)
  scaled = jax.tree.map(lambda x: x, variables)
  for name in "qk":
    scaled["params"]["stack"]["attention"][name] = 3.0 * scaled["params"]["stack"]["attention"][name]
  first, second = (decoding.forward(model, given, tokens_BT)[0] for given in (variables, scaled))
  np.testing.assert_allclose(first, second, rtol=0, atol=1e-4)
  without = dataclasses.replace(model, qk_norm=False)
  assert np.abs(decoding.forward(without, scaled, tokens_BT)[0] - first).max() > 0.1


@pytest.mark.slow
def test_engine_with_exits_equals_generate():
  model, requests = exiting.model("plain", qk_norm=True), serving.requests(16, **exiting.GREEDY)
  asked = [(prompt, options | dict(exit="verify", threshold=0.02)) for prompt, options in requests]
  engine = exiting.engine(model, "plain")
  got = exiting.answers(engine, asked)
  assert engine.metrics()["drafts"] > 0
  for completion, expected, request in zip(got, serving.reference(model, requests), requests):
    assert completion.tokens == expected.tokens, request


def test_keys_of_tokens_that_left_are_normed():
  """What is read from them is what a slow reference reads."""
  model, depths = exiting.model("plain", qk_norm=True), set()
  requests = serving.requests(6, **exiting.GREEDY, exit="trust", threshold=0.3, stop_tokens=[], repetition_penalty=1.0)
  got = exiting.answers(exiting.engine(model, "plain", dict(kv="copied")), requests)
  for (prompt, options), completion in zip(requests, got):
    num = min(options["max_tokens"], serving.CONTEXT + 1 - len(prompt))
    tokens, expected_depths, _ = exit_oracle.answer(model, exiting.KINDS["plain"][1], 0.3, prompt, num)
    assert (completion.tokens, completion.depths) == (tokens, expected_depths), prompt
    depths |= set(expected_depths)
  assert len(depths) > 1, "no token left early"


@torch.no_grad()
def test_the_torch_twin_is_ours_and_comes_back(tmp_path):
  case = exported.make(tmp_path / "model", **NORMED, lora=dict(q=2, k=1), kv_plan="hybrid")
  twin = exported.load_modeling().MorForCausalLM.from_pretrained(case.folder)
  tokens_BT = decoding.tokens(case.config)
  logits_BTV, depth_BT = decoding.forward(case.config, case.variables, tokens_BT)
  output = twin(torch.tensor(tokens_BT).long())
  np.testing.assert_array_equal(output.depths.numpy(), depth_BT)
  np.testing.assert_allclose(output.logits.numpy(), logits_BTV, rtol=0, atol=1e-4)
  fields, variables = hf_export.read(case.folder)
  assert fields["qk_norm"] is True
  jax.tree.map(np.testing.assert_array_equal, variables, case.variables)


def qwen3():
  torch.manual_seed(0)
  model = checkpoints.llama()
  fields = checkpoints.hf_config(model, rope_theta=300.0, initializer_range=0.2, attention_bias=False)
  for name in ("model_type", "architectures"):
    fields.pop(name)
  network = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields)).eval()
  with torch.no_grad():
    for name, value in network.named_parameters():
      if "norm" in name:
        value.normal_(1.0, 0.2)
  return network


@torch.no_grad()
def test_a_qwen3_is_theirs_and_comes_back_bitwise(tmp_path):
  network = qwen3()
  network.save_pretrained(tmp_path / "theirs")
  read = command.read(f"hf:{tmp_path / 'theirs'}")
  assert read.model.qk_norm and read.model == dataclasses.replace(checkpoints.llama(), qk_norm=True, init_std=0.2)
  expected_BTV = network(torch.tensor(checkpoints.TOKENS_BT)).logits.numpy()
  np.testing.assert_allclose(checkpoints.logits(read.model, read.variables), expected_BTV, rtol=0, atol=1e-5)
  hf_export.write_llama(tmp_path / "ours", read.model, read.variables, tokenizer=None, chat_template=None,
                        context=read.context, dtype="float32", special_ids={})
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
  assert type(again) is transformers.Qwen3ForCausalLM
  np.testing.assert_array_equal(again(torch.tensor(checkpoints.TOKENS_BT)).logits.numpy(), expected_BTV)
  second = hf_import.read(tmp_path / "ours")
  assert second.model == read.model
  jax.tree.map(np.testing.assert_array_equal, second.variables, read.variables)


def test_a_sliding_window_is_refused(tmp_path):
  checkpoints.hf_folder(tmp_path, config(**tiny.VANILLA), model_type="qwen3", architectures=["Qwen3ForCausalLM"],
                        use_sliding_window=True, sliding_window=8)
  with pytest.raises(ValueError, match="use_sliding_window=True is unsupported"):
    command.read(f"hf:{tmp_path}")


def test_a_gguf_of_qwen3_comes_back(tmp_path):
  """Its heads are not interleaved, unlike a Llama's."""
  model = checkpoints.llama(qk_norm=True)
  variables = {"params": weights.draw(model)}
  arrays = dict(layout.write(variables, model, "gguf_halves"))
  assert np.array_equal(arrays["blk.1.attn_q.weight"],
                        dict(layout.write(variables, model, "hf"))["model.layers.1.self_attn.q_proj.weight"])
  checkpoints.write_gguf(tmp_path / "m.gguf", model, arrays, family="qwen3")
  read = command.read(f"gguf:{tmp_path / 'm.gguf'}")
  assert read.model == model and checkpoints.equal(read.variables, variables)


def test_counts_are_of_the_tree_and_no_device_splits_a_scale():
  model = config(lora=dict(q=2))
  params = jax.eval_shape(transformer.Transformer(model).init, jax.random.key(0), np.zeros((1, 4), int))["params"]
  assert sum(costs.parameter_count(model)) == sum(leaf.size for leaf in jax.tree.leaves(params))
  assert sharding.spec("opt_state/1/mu/stack/attention/q_norm", 2) == P()


@pytest.mark.parametrize("method", recursive_init.METHODS)
def test_a_recursive_model_starts_from_a_normed_one(method):
  source = config(**tiny.VANILLA | dict(num_layers=5))
  target = config(router=tiny.FIXED)
  variables = {"params": weights.draw(source)}
  made = recursive_init.convert(target, config_lib.InitConfig(method=method), 0, source, variables)
  shapes = jax.eval_shape(transformer.Transformer(target).init, jax.random.key(0), np.zeros((1, 4), int))
  assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, dict(shapes))
  with pytest.raises(ValueError, match="model.qk_norm=False .there True."):
    recursive_init.check(source, dataclasses.replace(target, qk_norm=False))


def test_the_config_of_an_old_run_has_no_norm():
  fields = config_lib.default().to_dict()
  fields["model"].pop("qk_norm")
  assert config_lib.from_dict(config_lib.upgrade(fields)).model.qk_norm is False
