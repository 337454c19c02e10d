"""Checkpoints of the official MoR: the same model comes out, or a line says why not."""

import copy
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from mor import parameters
from mor.conversion import layout
from mor.conversion import command
from tests import check_official
from tests.helpers import checkpoints
from tests.helpers import official
from tests.helpers import official_files
from tests.helpers import tiny
from tests.helpers import weights
from tests.model import test_official

KINDS = {
    "vanilla": dict(tiny.VANILLA, num_layers=3),
    "cycle": dict(sharing="cycle", num_layers=6, router=tiny.FIXED),
    "middle_cycle": dict(router=tiny.FIXED, kv_plan="shared"),
    "sequence": dict(sharing="sequence", num_layers=6, router=tiny.FIXED, tie_embeddings=False),
    "middle_sequence": dict(sharing="middle_sequence", router=tiny.FIXED),
    "expert": dict(router=dict(sampling_coef=0.003)),
    "expert_cycle": dict(sharing="cycle", num_layers=6, router=dict(capacity=(1.0, 0.7, 0.3), activation="tanh")),
    "expert_mlp": dict(kv_plan="hybrid", router=dict(arch="mlp", sampling="aux_router", alpha=0.5, temperature=2.0)),
    "expert_wide": dict(router=dict(arch="wide_mlp", activation="none", alpha=1.0, gating="additive", sampling="none")),
    "expert_random": dict(router=dict(arch="random", sampling="none", activation="none")),
    "token": dict(kv_plan="shared", router=tiny.TOKEN_CHOICE | dict(z_loss_coef=1e-5, balance_coef=0.2)),
    "token_cycle": dict(sharing="cycle", num_layers=6, router=tiny.TOKEN_CHOICE | dict(
        balancing="loss_free", activation="sigmoid", alpha=0.1, arch="mlp", gating="additive", bias_update_rate=0.01)),
}


def make(kind):
  """A model and variables of it."""
  model = tiny.config(model=KINDS[kind]).model
  variables = {"params": weights.draw(model)}
  if model.router.arch == "random":
    variables["params"].pop("router", None)
  if model.router.balancing == "loss_free":
    variables["balance"] = {"bias_R": np.array([-0.2, 0.1, 0.3], np.float32)}
  return model, variables


@pytest.mark.parametrize("kind", KINDS)
def test_config_and_parameters_come_back(kind, tmp_path):
  model, variables = make(kind)
  official_files.write(tmp_path, model, variables)
  read = command.read(f"official_mor:{tmp_path}")
  assert read.model == model and read.context == 77 and read.special_ids["eos"] == (2,)
  assert checkpoints.equal(read.variables, variables)
  assert checkpoints.equal(command.read(f"official_mor:{tmp_path / 'model.safetensors'}", model).variables, variables)


@pytest.mark.parametrize("path", test_official.FILES, ids=lambda path: path and path.stem)
def test_vectors_come_back(path):
  """So they agree as they do in test_official; `python -m tests.helpers.official_files` runs them."""
  same(official.read(path), official_files.read(path))


@pytest.mark.parametrize("option", ["aux_router", "token_loss_free"])
def test_vectors_agree(option, tmp_path):
  path = test_official.write(tmp_path, option)
  with jax.disable_jit():
    report = check_official.check(path, lambda function: function, official_files.read)
  assert report["ok"], report
  same(official.read(path), official_files.read(path))


def same(before: official.Vector, after: official.Vector) -> None:
  """Nothing of a vector changed on its way through a checkpoint."""
  plain = lambda model: dataclasses.replace(model, router=dataclasses.replace(model.router, capacity=()))
  assert plain(before.model) == plain(after.model) and before.model.capacity == after.model.capacity
  assert checkpoints.equal(before.params, after.params)
  assert (before.bias_R is None) == (after.bias_R is None)
  if before.bias_R is not None:
    np.testing.assert_array_equal(before.bias_R, after.bias_R)


def test_one_copy_of_what_is_shared_is_enough(tmp_path):
  """Writers of safetensors keep any one."""
  model, variables = make("expert")
  entries = layout.layout(model, "official_mor")
  arrays = dict(layout.write(variables, model, "official_mor"))
  for number, row in enumerate(parameters.layer(model)):
    copies = [entry.key for entry in entries if entry.path == f"params/stack/{row.path}" and entry.index == (1,)]
    copies.pop(number % len(copies))
    for key in copies:
      arrays.pop(key)
  official_files.write(tmp_path, model, variables)
  checkpoints.write_folder(tmp_path, json.loads((tmp_path / "config.json").read_text()), arrays)
  assert checkpoints.equal(command.read(f"official_mor:{tmp_path}").variables, variables)
  arrays = {key: array for key, array in arrays.items() if ".block.1.self_attn.q_proj" not in key}
  checkpoints.write_folder(tmp_path, json.loads((tmp_path / "config.json").read_text()), arrays)
  refuses(tmp_path, "has no tensor 'model.layers.1.block.1.self_attn.q_proj.weight'; is it whole")


@pytest.mark.parametrize("kind", ["expert", "token"])
def test_a_pickle_with_a_tied_head(kind, tmp_path):
  import torch
  model, variables = make(kind)
  official_files.write(tmp_path, model, variables)
  (tmp_path / "model.safetensors").unlink()
  state = {key: torch.tensor(array) for key, array in layout.write(variables, model, "official_mor")}
  state["lm_head.weight"] = state["model.embed_tokens.weight"]
  torch.save(state, tmp_path / "pytorch_model.bin")
  assert checkpoints.equal(command.read(f"official_mor:{tmp_path}").variables, variables)
  assert command.read(f"official_mor:{tmp_path / 'pytorch_model.bin'}").model == model


def test_the_config_tells_what_files_do_not(tmp_path):
  model, variables = make("expert")
  official_files.write(tmp_path, model, variables)
  (tmp_path / "config.json").unlink()
  refuses(tmp_path, "has no config.json; put it there, or say in the config")
  assert command.read(f"official_mor:{tmp_path}", model).model is model
  (tmp_path / "tiny.yaml").unlink()
  read = command.read(f"official_mor:{tmp_path}", model)
  assert read.model is model and checkpoints.equal(read.variables, variables) and read.context == 2048
  official_files.write(tmp_path, model, variables)
  (tmp_path / "tiny.yaml").unlink()
  refuses(tmp_path, "has no .yaml of its training")
  assert checkpoints.equal(command.read(f"official_mor:{tmp_path}", model).variables, variables)


def test_the_config_may_train_otherwise(tmp_path):
  model, variables = make("token")
  official_files.write(tmp_path, model, variables)
  other = tiny.config(dict(model=KINDS["token"]), model=dict(
      compute_dtype="bfloat16", init_std=0.5, remat="full", execution="masked",
      router=dict(balance_coef=0.7, z_loss_coef=0.0, balancing="none"))).model
  assert command.read(f"official_mor:{tmp_path}", other).model is other


@pytest.mark.parametrize("kind,changes,message", [
    ("expert", dict(model=dict(num_layers=11, d_ff=29)),
     r"d_ff 28 \(config: 29\), num_layers 8 \(config: 11\); set what it says"),
    ("expert", dict(model=dict(num_recursions=2)), r"num_recursions 3 \(config: 2\)"),
    ("expert", dict(model=dict(sharing="cycle", num_layers=6)), r"sharing 'middle_cycle' \(config: 'cycle'\)"),
    ("expert", dict(model=dict(kv_plan="shared")), r"kv_plan 'recursion_wise' \(config: 'shared'\)"),
    ("expert", dict(model=dict(rope_theta=1e5)), r"rope_theta 10000.0 \(config: 100000.0\)"),
    ("expert", dict(model=dict(router=dict(alpha=0.2, gating="additive"))),
     r"router.alpha 0.1 \(config: 0.2\), router.gating 'weighted' \(config: 'additive'\)"),
    ("expert", dict(model=dict(router=dict(capacity=(1.0, 0.5, 0.5)))), "router.capacity"),
    ("expert", dict(model=dict(router=dict(sampling="aux_router"))), "aux_router' False .config: True"),
    ("expert", dict(model=dict(router=tiny.TOKEN_CHOICE)), r"router.name 'expert_choice' \(config: 'token_choice'\)"),
    ("expert", dict(model=dict(router=tiny.FIXED)), r"router.name 'expert_choice' \(config: 'fixed'\)"),
    ("expert_mlp", dict(model=dict(router=dict(arch="wide_mlp"))), r"router.arch 'mlp' \(config: 'wide_mlp'\)"),
    ("token", dict(model=dict(router=dict(balancing="loss_free"))), "loss_free' False .config: True"),
    ("expert", dict(model=dict(lora=dict(q=2))), "model.lora=.'q': 2.; import without LoRA"),
])
def test_a_config_of_another_model_is_refused(kind, changes, message, tmp_path):
  model, variables = make(kind)
  official_files.write(tmp_path, model, variables)
  refuses(tmp_path, message, tiny.config(dict(model=KINDS[kind]), changes).model)


@pytest.mark.parametrize("kind,changes,message", [
    ("expert", dict(mor=dict(type="choice")), "tiny.yaml: mor.type='choice'"),
    ("expert", dict(mor=dict(expert=dict(router_func="relu"))), "tiny.yaml: mor.activation='relu'"),
    ("expert", dict(mor=dict(router_type="conv")), "tiny.yaml: mor.arch='conv'"),
    ("expert", dict(mor=dict(capacity="1.0,0.5")), "has 2 entries for 3 recursions"),
    ("expert", dict(mor=dict(temp=10**400)), "tiny.yaml: "),
    ("expert", dict(mor=dict(temp=[1])), "tiny.yaml: "),
    ("expert", dict(mor=dict(router_type=["linear"])), "tiny.yaml: mor.arch"),
    ("expert", dict(recursive=dict(num_recursion=10**12)), "does not fit|is another model"),
    ("expert", dict(mor=dict(capacity="all")), "tiny.yaml: .*'all'"),
    ("token", dict(mor=dict(rand_router=True)), "mor.rand_router with type 'token' is unsupported"),
    ("expert", dict(relaxation=dict(enable=True)), "tiny.yaml: relaxation is unsupported"),
    ("expert", dict(recursive=dict(ln_share=False)), "ln_share=false is unsupported"),
    ("expert", dict(recursive=dict(sharing="spiral")), "recursive.sharing='spiral'"),
    ("expert", dict(recursive=dict(sharing=[1])), "recursive.sharing=.1."),
    ("expert", dict(recursive=dict(num_recursion=2**70)), "does not fit middle_cycle with 1180591620717411303424"),
    ("expert", dict(recursive=dict(enable=False)), "without recursive is unsupported"),
    ("expert", dict(recursive=3), "recursive=3; give a group of options"),
    ("expert", dict(recursive=dict(num_recursion=4)), "num_layers=8 does not fit middle_cycle with 4 recursions"),
    ("vanilla", dict(kv_sharing=dict(enable=True)), "mor or kv_sharing without recursive"),
])
def test_recipes_that_are_refused(kind, changes, message, tmp_path):
  model, variables = make(kind)
  said = official_files.recipe(model)
  for name, group in changes.items():
    if isinstance(group, dict):
      for key, value in group.items():
        said[name][key] = said[name][key] | value if isinstance(value, dict) else value
    else:
      said[name] = group
  official_files.write(tmp_path, model, variables, said)
  refuses(tmp_path, message)


@pytest.mark.parametrize("kind,said", [
    ("expert", dict(mor=dict(enable=True, type="expert"), recursive=dict(num_recursion=3, sharing="middle_cycle"))),
    ("expert", dict(mor=dict(enable=True, type="expert", capacity=None, temp=None, expert=dict(alpha=None))) | dict(
        recursive=dict(enable=True, num_recursion=3, sharing="middle_cycle"), kv_sharing=None)),
    ("expert_wide", dict(mor=dict(enable=True, type="expert", router_type="wide_mlp", expert=dict(
        router_func=None, alpha=0.3, gating="additive", sampling=None)), recursive=dict(
            num_recursion=3, sharing="middle_cycle"))),
    ("token", dict(mor=dict(enable=True, type="token", z_loss=True, z_coeff=1e-5, token=dict(
        coeff=0.2, balancing="loss")), recursive=dict(num_recursion=3, sharing="middle_cycle"),
                   kv_sharing=dict(enable=True))),
    ("vanilla", dict(recursive=dict(enable=True, num_recursion=1, base_depth=3, sharing="cycle"))),
])
def test_what_a_recipe_need_not_say(kind, said, tmp_path):
  """Upstream's defaults; alpha is ignored without activation."""
  model, variables = make(kind)
  official_files.write(tmp_path, model, variables, said)
  read = command.read(f"official_mor:{tmp_path}").model
  assert read == dataclasses.replace(model, router=dataclasses.replace(
      model.router, sampling=read.router.sampling, sampling_coef=read.router.sampling_coef))


def test_recipes_that_are_no_recipes(tmp_path):
  model, variables = make("expert")
  official_files.write(tmp_path, model, variables)
  for text, message in [("a: [", "tiny.yaml is not YAML"), ("3", "tiny.yaml holds a int"),
                        ("[" * 20000, "tiny.yaml is not YAML"), ("a: " + "9" * 5000, "tiny.yaml is not YAML"),
                        ("a: &x [1]\nb: *x", "tiny.yaml is not YAML .it has aliases"),
                        ("a: 2001-99-99", "tiny.yaml is not YAML")]:
    (tmp_path / "tiny.yaml").write_text(text)
    refuses(tmp_path, message)
  (tmp_path / "other.yaml").write_text("")
  refuses(tmp_path, "has 2 recipes, other.yaml, tiny.yaml")


@pytest.mark.parametrize("kind,key,message", [
    ("expert", "model.layers.2.block.1.self_attn.k_proj.weight", "untied attention, a defect of upstream's"),
    ("expert", "model.layers.3.block.0.input_layernorm.weight", "recursive.ln_share=false"),
    ("expert", "model.layers.3.block.0.mlp.up_proj.weight", "does not share parameters as the config says"),
    ("token", "model.layers.1.block_list.2.1.self_attn.o_proj.weight", "untied attention"),
    ("middle_cycle", "model.layers.5.mlp.down_proj.weight", "does not share parameters as the config says"),
])
def test_copies_that_differ_are_refused(kind, key, message, tmp_path):
  model, variables = make(kind)
  official_files.write(tmp_path, model, variables)
  arrays = {name: array.copy() for name, array in layout.write(variables, model, "official_mor")}
  arrays[key].flat[-1] += 1e-3
  checkpoints.write_folder(tmp_path, json.loads((tmp_path / "config.json").read_text()), arrays)
  refuses(tmp_path, f"model.safetensors: tensor '{key}' differs from 'model.layers.*, to which it is tied: .*{message}")


@pytest.mark.parametrize("change,message", [
    (lambda a: a.pop("model.layers.2.mor_router.router.weight"), "has no tensor 'model.layers.2.mor_router.router"),
    (lambda a: a.update({"model.layers.1.mlp_router.router.weight": np.ones((1, 20), np.float32)}),
     "has tensor 'model.layers.1.mlp_router.router.weight'"),
    (lambda a: a.update({"model.layers.1.mor_router.router.weight": np.ones((3, 20), np.float32)}),
     r"'model.layers.1.mor_router.router.weight' has shape \(3, 20\), its config says \(1, 20\)"),
    (lambda a: a.update({"model.layers.1.recursion_encoding": np.ones(20, np.float32)}), "recursion_encoding"),
])
def test_tensors_that_are_refused(change, message, tmp_path):
  model, variables = make("expert")
  official_files.write(tmp_path, model, variables)
  arrays = copy.copy(dict(layout.write(variables, model, "official_mor")))
  change(arrays)
  checkpoints.write_folder(tmp_path, json.loads((tmp_path / "config.json").read_text()), arrays)
  refuses(tmp_path, message)


def test_a_router_wider_than_the_config_says(tmp_path):
  """Upstream's wide_mlp is no wider than its mlp: the weights decide, and the remedy says so."""
  model, variables = make("expert_mlp")
  said = official_files.recipe(model)
  said["mor"]["router_type"] = "wide_mlp"
  official_files.write(tmp_path, model, variables, said)
  assert command.read(f"official_mor:{tmp_path}").model == model
  (tmp_path / "tiny.yaml").unlink()
  wide = tiny.config(dict(model=KINDS["expert_mlp"]), model=dict(router=dict(arch="wide_mlp"))).model
  refuses(tmp_path, "its router is as wide as arch 'mlp' is, the config says 'wide_mlp'; set router.arch='mlp'", wide)


def refuses(folder: pathlib.Path, message: str, target=None) -> None:
  """Reading is one line that says so."""
  with pytest.raises(ValueError, match=message) as caught:
    command.read(f"official_mor:{folder}", target)
  assert "\n" not in str(caught.value)
