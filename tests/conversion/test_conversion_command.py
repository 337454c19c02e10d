"""From a folder of Hugging Face to a run, uptrained, and back to a folder."""

import json

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from configs import pretrained
import mor
from mor import checkpoint
from mor import config as config_lib
from mor import sharding
from mor.conversion import command
from mor.data import tokenizer as tokenizer_lib
from mor.train import loop
from mor.train import step as step_lib
from tests.helpers import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A tiny Llama with a tokenizer of bytes, whose text begins with one token and ends with another."""
  directory = tmp_path_factory.mktemp("source")
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
      vocab_size=263, hidden_size=20, intermediate_size=28, num_hidden_layers=6, num_attention_heads=4,
      num_key_value_heads=2, head_dim=6, max_position_embeddings=48, rms_norm_eps=1e-5, tie_word_embeddings=True,
      bos_token_id=257, eos_token_id=258, pad_token_id=258)
  model = transformers.LlamaForCausalLM(config)
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1.0)
  model.save_pretrained(directory / "hf")
  tokenizer = tokenizers.Tokenizer.from_str(tokenizer_lib.ByteTokenizer().serialized)
  tokenizer.add_special_tokens(["<s>", "<end>"])
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<end>")
  fast.chat_template = "{{ messages[0]['content'] }}"
  fast.save_pretrained(directory / "hf")
  return directory


def config(source, workdir, groups=(), **model):
  data = dict(source=tiny.write_text(source), cache_dir=str(source / "cache"), tokenizer=f"{workdir}/tokenizer.json")
  fields = dict(vocab_size=263, num_layers=6, router=tiny.FIXED, tie_embeddings=True)
  train = dict(steps=3, sample_prompt="")
  return tiny.config(dict(model=tiny.VANILLA | fields | model, data=data, train=train), *groups)


def recursive(source, workdir, **groups):
  lora = dict(q=2, down=3)
  return config(source, workdir, (groups,), sharing="cycle", num_recursions=2, lora=lora)


def test_convert_generates_as_the_source_does(source):
  workdir = source / "plain"
  given = command.convert(config(source, workdir), f"hf:{source}/hf", workdir)
  assert given["source"] == given["model"] and given["model"]["embedding_parameters"] == 263 * 20
  model = mor.load(workdir)
  request = model.request("of it", temperature=0.0, max_tokens=6)
  assert request.prompt[-5:] == tuple(b"of it") and 258 in request.stop_tokens
  ours = model.generate_requests([request])[0].tokens
  theirs = transformers.AutoModelForCausalLM.from_pretrained(source / "hf")
  ids = torch.tensor([request.prompt])
  expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=258)
  assert ours == expected[0, len(request.prompt):].tolist()


def test_uptraining_goes_on_from_the_converted_model(source):
  """The teacher's divergence falls, the teacher stays, and a restart goes on."""
  teacher, workdir = source / "teacher", source / "student"
  command.convert(config(source, teacher), f"hf:{source}/hf", teacher)
  made = recursive(source, workdir, distill=dict(teacher=str(teacher), weight=0.7, temperature=1.5))
  command.convert(made, f"mor:{teacher}", workdir)
  _, _, before = checkpoint.load_variables(workdir)
  outcome = loop.train(made, workdir)
  assert outcome.step == 3
  _, step, after = checkpoint.load_variables(workdir)
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before["params"], after["params"])
  assert step == 3 and all(jax.tree.leaves(moved))
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  trained = [line for line in lines if "train/kl" in line or "kl" in line]
  assert trained, lines[0]
  assert checkpoint.load_variables(teacher)[1] == 0


def test_a_step_learns_from_its_teacher_alone_where_asked(source):
  """With all of the weight on the divergence, a student equal to its teacher has nothing to learn."""
  teacher = source / "teacher_alone"
  made = config(source, teacher, (dict(distill=dict(teacher=str(teacher), weight=1.0)),))
  command.convert(made, f"hf:{source}/hf", teacher)
  mesh = sharding.make_mesh(made.mesh)
  with checkpoint.Checkpoints(teacher, read_only=True) as checkpoints:
    state, _ = loop.restore_or_init(made, mesh, checkpoints)
  batch = sharding.put_batch(mesh, tiny.batch(made))
  _, metrics = step_lib.make_train_step(made, mesh, step_lib.load_teacher(made, mesh))(state, batch)
  assert abs(float(metrics["kl"])) < 1e-5 and float(metrics["grad_norm"]) < 1e-4 < float(metrics["nll"])


def test_any_llama_needs_no_sizes(source):
  """`configs/pretrained.py` reads them from the source, and the command line shares the layers."""
  workdir = source / "unsized"
  fields = pretrained.get_config(f"hf:{source}/hf")
  fields.model.update(sharing="cycle", num_recursions=3)
  fields.data.update(source=tiny.write_text(source), tokenizer=f"{workdir}/tokenizer.json")
  command.convert(config_lib.from_config_dict(fields), f"hf:{source}/hf", workdir)
  model = mor.load(workdir)
  assert model.config.d_ff == 28 and model.variables["params"]["stack"]["attention_norm"].shape == (2, 20)


def test_an_export_comes_back_bit_for_bit(source):
  """With its routers, as a run that goes on."""
  workdir, output, again = source / "routed", source / "out_routed", source / "again"
  router = dict(name="expert_choice", gating="residual", alpha=2.0)
  command.convert(recursive(source, workdir, model=dict(router=router)), f"hf:{source}/hf", workdir)
  command.export(workdir, "hf", output, "float32")
  made = recursive(source, again, model=dict(router=router))
  command.convert(made, f"hf:{output}", again)
  (_, _, first), (_, _, second) = checkpoint.load_variables(workdir), checkpoint.load_variables(again)
  assert set(first["params"]) == {"embedding", "stack", "final_norm", "lora", "router"}
  jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("target", ["hf", "llama"])
def test_export_is_loaded_with_its_tokenizer(source, target):
  workdir, output = source / f"relaxed_{target}", source / f"out_{target}"
  command.convert(recursive(source, workdir), f"hf:{source}/hf", workdir)
  command.export(workdir, target, output, "float32")
  theirs = transformers.AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
  tokenizer = transformers.AutoTokenizer.from_pretrained(output)
  assert tokenizer.eos_token_id == 258 and tokenizer.chat_template == "{{ messages[0]['content'] }}"
  assert theirs.config.max_position_embeddings == 48
  ids = tokenizer("of it", return_tensors="pt", add_special_tokens=False)["input_ids"]
  assert ids[0].tolist() == list(b"of it")
  ours = mor.load(workdir).generate([ids[0].tolist()], temperature=0.0, max_tokens=6, stop_tokens=[])[0].tokens
  expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6,
                             eos_token_id=None, pad_token_id=258)
  assert ours == expected[0, 5:].tolist()


def test_what_is_wrong_is_said_and_nothing_is_written(source):
  workdir = source / "wrong"
  made = config(source, workdir)
  with pytest.raises(ValueError, match="gguf:PATH"):
    command.convert(made, f"onnx:{source}/hf", workdir)
  with pytest.raises(ValueError, match="mor:WORKDIR"):
    command.convert(made, "mor:", workdir)
  with pytest.raises(ValueError, match=r"d_model=24 \(there 20\)"):
    command.convert(config(source, workdir, d_model=24), f"hf:{source}/hf", workdir)
  with pytest.raises(ValueError, match="not the source's tokenizer.*--config.data.tokenizer="):
    command.convert(config(source, source / "elsewhere"), f"hf:{source}/hf", workdir)
  with pytest.raises(ValueError, match="holds no checkpoint"):
    command.convert(made, f"mor:{source}/nowhere", workdir)
  assert not workdir.exists()
  command.convert(made, f"hf:{source}/hf", workdir)
  with pytest.raises(ValueError, match="target='onnx'; use one of hf, llama, gguf"):
    command.export(workdir, "onnx", source / "none", "float32")
  with pytest.raises(ValueError, match="dtype='int8'; use 'float32', 'float16', 'bfloat16'"):
    command.export(workdir, "gguf", source / "none.gguf", "int8")
  with pytest.raises(ValueError, match="already"):
    command.convert(made, f"hf:{source}/hf", workdir)


def test_a_teacher_of_another_vocabulary_is_refused(source):
  teacher = source / "other"
  made = tiny.config(model=tiny.VANILLA, data=dict(source=tiny.write_text(source), cache_dir=str(source / "cache")),
                     train=dict(steps=2))
  with checkpoint.Checkpoints(teacher) as checkpoints:
    checkpoints.save(0, step_lib.init_state(made, sharding.make_mesh(made.mesh)), made)
  student = config(source, teacher, (dict(distill=dict(teacher=str(teacher))),))
  with pytest.raises(ValueError, match="vocab_size=61, this model 263"):
    step_lib.load_teacher(student, sharding.make_mesh(student.mesh))
  missing = config(source, teacher, (dict(distill=dict(teacher=str(source / "none"))),))
  with pytest.raises(ValueError, match="distill.teacher=.*holds no checkpoint"):
    step_lib.load_teacher(missing, sharding.make_mesh(missing.mesh))
