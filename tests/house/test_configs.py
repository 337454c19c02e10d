"""Every file of configs/ builds, and its model shape-evaluates at full size."""

import ast
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import pytest

from configs import exit_smollm2
from configs import paper
from configs import uptrain_smollm2
from mor import config
from mor import costs
from mor import experiments
from mor.model import transformer

DIRECTORY = experiments.directory()


def _check(made):
  """Full width, depth and row length; one row, since no shape depends on more."""
  model = transformer.Transformer(made.model)

  def init(key, tokens_BT):
    out, variables = model.init_with_output(key, tokens_BT)
    return out.hidden_BTD, out.keep_RBT, variables["params"]

  tokens_BT = jax.ShapeDtypeStruct((1, made.data.seq_len), jnp.int32)
  hidden_BTD, keep_RBT, params = jax.eval_shape(init, jax.random.key(0), tokens_BT)
  assert hidden_BTD.shape == (1, made.data.seq_len, made.model.d_model)
  assert keep_RBT.shape == (made.model.num_recursions, 1, made.data.seq_len)
  num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert num_params == sum(costs.parameter_count(made.model))


@pytest.mark.parametrize("name", experiments.names())
def test_file(name):
  _check(config.from_config_dict(experiments.read(name)))


@pytest.mark.parametrize("name", paper.members())
def test_paper_member(name):
  _check(config.from_config_dict(paper.get_config(name)))


@pytest.mark.parametrize("name", ["full", "r3", "r2-lora64", "r5-lora256-mor"])
def test_uptrained_member(name):
  made = config.from_config_dict(uptrain_smollm2.get_config(name))
  _check(made)
  assert bool(made.distill.teacher) == (name != "full")
  assert (made.model.router.gating == "residual") == name.endswith("mor")
  embedding, rest = costs.parameter_count(made.model)
  assert embedding == 28_311_552
  if name == "full":
    assert rest == 106_203_456  # the weights' own


def test_an_unknown_uptrained_member_is_refused():
  with pytest.raises(ValueError, match="r2, r3, r5"):
    uptrain_smollm2.get_config("r4")


@pytest.mark.parametrize("name, layers, teacher", [
    ("full", (10, 20), ""), ("r3", (10,), ""), ("full-gpu", (5, 10, 20), "runs/smollm2"),
    ("r3-gpu", (10, 20), "runs/smollm2")])
def test_exiting_member(name, layers, teacher):
  made = config.from_config_dict(exit_smollm2.get_config(name))
  _check(made)
  assert (made.exit.layers, made.distill.teacher) == (layers, teacher)
  assert made.model.num_recursions == (3 if name.startswith("r3") else 1)


def test_an_unknown_exiting_member_is_refused():
  with pytest.raises(ValueError, match="full, r3"):
    exit_smollm2.get_config("r2-gpu")


@pytest.mark.parametrize("name, layers, r, steps, warmup", [
    ("vanilla-360m", 32, 1, 9438, 57),
    ("recursive-360m-r4", 34, 4, 8883, 57),
    ("mor-360m-r2", 32, 2, 12619, 86),
    ("mor-360m-r4", 34, 4, 14216, 86),
    ("mor-135m-r3", 32, 3, 36326, 86),
    ("mor_share-360m-r3", 32, 3, 14672, 86),
    ("recursive-1.7b-r3", 26, 3, 1922, 57),  # steps by the calculator
])
def test_paper_recipe(name, layers, r, steps, warmup):
  made = config.from_config_dict(paper.get_config(name))
  assert (made.model.num_layers, made.model.num_recursions) == (layers, r)
  assert (made.train.steps, made.optim.warmup_steps) == (steps, warmup)
  assert (made.data.seq_len, made.data.batch_size, made.model.vocab_size) == (2048, 1024, 49152)
  optim = made.optim
  assert (optim.learning_rate, optim.schedule, optim.cooldown_fraction) == (3e-3, "wsd", 0.2)
  assert (optim.b1, optim.b2, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)
  assert made.model.compute_dtype == "bfloat16" and made.model.cross_documents


def test_paper_routers():
  def make(name):
    return config.from_config_dict(paper.get_config(name)).model

  expert, token = make("mor-360m-r3").router, make("mor_token-360m-r3").router
  assert (expert.name, expert.arch, expert.activation, expert.alpha) == (
      "expert_choice", "linear", "sigmoid", 0.1)
  assert (expert.sampling, expert.sampling_coef, expert.z_loss_coef) == ("aux_loss", 0.001, 0.0)
  assert (token.name, token.arch, token.activation, token.alpha) == (
      "token_choice", "linear", "softmax", 1.0)
  assert (token.balancing, token.balance_coef, token.z_loss_coef) == ("loss", 0.1, 0.0)
  assert make("mor_share-360m-r3").router == expert
  assert make("mor_share-360m-r3").kv_plan == "shared"
  assert make("recursive-360m-r3").router.name == make("vanilla-360m").router.name == "fixed"


def test_three_recursions_are_the_default():
  assert paper.get_config("mor-730m").to_dict() == paper.get_config("mor-730m-r3").to_dict()


@pytest.mark.parametrize("name", [
    "", "mor", "mor-3b", "moe-360m-r3", "mor-360m-r5", "mor-360m-r", "mor-360m-r33", "MOR-360m-r3",
    "mor-360m-r3 ", "mor-360m-r3-x", "vanilla-360m-r3", "vanilla-360m-r1"])
def test_paper_argument_out_of_the_family_is_named(name):
  with pytest.raises(ValueError) as caught:
    paper.get_config(name)
  message = str(caught.value)
  for part in [f"configs/paper.py:{name} ", *paper.MODELS, *paper.SIZES, "R in 2, 3, 4"]:
    assert part in message
  assert "\n" not in message


def test_command_line_takes_the_argument_and_overrides(monkeypatch):
  argv = ["main", f"--config={DIRECTORY / 'paper.py'}:mor-730m-r2", "--config.train.steps=7000",
          "--config.model.router.capacity=(1.0, 0.25)"]
  monkeypatch.setattr(sys, "argv", argv)  # where config_flags looks for overrides
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  values(argv)
  made = config.from_config_dict(values.config)
  assert (made.model.d_model, made.train.steps, made.model.capacity) == (1536, 7000, (1.0, 0.25))


@pytest.mark.parametrize("name", experiments.names())
def test_a_file_imports_only_mor(name):
  """So that it runs from any directory, and in a wheel, where `configs` is `mor.configs`."""
  tree = ast.parse((DIRECTORY / f"{name}.py").read_text(encoding="utf-8"))
  for node in ast.walk(tree):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      package = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
      assert package in {"mor", "ml_collections"} | sys.stdlib_module_names, f"line {node.lineno}"


def test_an_experiment_is_found_by_name_and_by_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = f"{DIRECTORY}/paper.py"
  assert experiments.find("paper") == path and experiments.find("paper:mor-360m-r3") == f"{path}:mor-360m-r3"
  assert experiments.find("pretrained:hf:a/b") == f"{DIRECTORY}/pretrained.py:hf:a/b"
  (tmp_path / "paper").write_text("from mor import config\nget_config = config.default\n")  # nearer than the name
  assert experiments.find("paper:x") == "paper:x" and experiments.find(f"{path}:x") == f"{path}:x"
  assert experiments.read(f"{path}:mor-730m-r2").to_dict() == paper.get_config("mor-730m-r2").to_dict()
  for wrong in ("papers", "paper.py", "configs/paper.py", ""):
    with pytest.raises(ValueError, match="use one of base, exit_smollm2, paper"):
      experiments.find(wrong)


WHEEL = """
import sys
sys.path.insert(0, {root!r})
import mor
from mor import main
assert mor.__file__.startswith({root!r}), mor.__file__
sys.argv = ["main", "--config=paper:mor-360m-r3", "--config.model.vocab_size=1000", "--mode=info"]
main.run()
"""


@pytest.mark.slow  # builds a wheel
def test_a_wheel_carries_the_experiments(tmp_path):
  pytest.importorskip("setuptools")
  root = pathlib.Path(__file__).parents[2]
  source = shutil.copytree(root, tmp_path / "source", ignore=shutil.ignore_patterns(
      ".*", "tests", "benchmarks", "docs", "notebooks", "build", "*.egg-info", "__pycache__"))
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
  subprocess.run([*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)], check=True)
  wheel, = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    members = set(archive.namelist())
    archive.extractall(tmp_path / "site")
  assert {f"mor/configs/{name}.py" for name in [*experiments.names(), "__init__"]} <= members
  assert not any(name.startswith(("configs/", "tests/")) for name in members)
  done = subprocess.run([sys.executable, "-c", WHEEL.format(root=str(tmp_path / "site"))], cwd="/", check=True,
                        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
  assert json.loads(done.stdout)["params_embedding"] == 1000 * 960
