"""`mor.load` gives what was trained, reads no more than that, and says where nothing is."""

import shutil
import subprocess
import sys

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mor
from mor import checkpoint
from mor import sharding
from mor.decode import prefill
from mor.decode import tick
from mor.train import loop
from tests.helpers import tiny

ROUTING = tiny.TOKEN_CHOICE | dict(balancing="loss_free", bias_update_rate=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir whose router has a bias that training moved, its config and its state."""
  directory = tmp_path_factory.mktemp("load")
  data = dict(source=tiny.write_text(directory), cache_dir=str(directory / "cache"))
  config = tiny.config(tiny.BYTES, data=data, model=dict(router=ROUTING), train=dict(steps=3, sample_prompt=""))
  loop.train(config, directory / "run")
  with checkpoint.Checkpoints(directory / "run", read_only=True) as checkpoints:
    state, _ = loop.restore_or_init(config, sharding.make_mesh(config.mesh), checkpoints)
  return directory / "run", config, state


def test_variables_are_those_of_the_checkpoint_bit_for_bit(run):
  workdir, config, state = run
  model = mor.load(str(workdir))
  assert set(model.variables) == {"params", "balance"} and np.any(model.variables["balance"]["bias_R"] != 0)
  chex.assert_trees_all_equal(model.variables["params"], state.params)
  chex.assert_trees_all_equal(model.variables["balance"], state.balance)
  assert isinstance(model, mor.Model) and model.config == config.model and model.context == 12
  assert model.tokenizer.decode(model.tokenizer.encode("of")) == "of" and model.vocab_size == 257


def test_a_model_is_shown_in_one_line(run):
  shown = repr(mor.load(run[0]))
  assert shown.startswith("<mor.Model of ") and "router token_choice" in shown and len(shown) < 200


def test_only_the_variables_are_read(run, monkeypatch):
  """The optimizer's state is twice as large as the model."""
  read, restore = [], ocp.PyTreeCheckpointHandler.restore

  def spy(self, path, args):
    read.append((set(args.item), args.partial_restore))
    return restore(self, path, args=args)

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", spy)
  mor.load(run[0])
  assert read == [({"params", "balance"}, True)]


def test_an_engine_of_a_loaded_model_compiles_once(run):
  """What is restored is committed to its device; were the slots not, the second prefill would compile again."""
  engine = mor.Engine(mor.load(run[0]), num_slots=2)
  before = prefill.store._cache_size(), tick.run._cache_size()
  for _ in range(2):
    engine.generate(["an"], max_tokens=2)
  assert (prefill.store._cache_size(), tick.run._cache_size()) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_directory_without_a_checkpoint_is_named(name, tmp_path):
  with pytest.raises(ValueError, match=f"{tmp_path / name}/checkpoints holds no checkpoint; train first"):
    mor.load(tmp_path / name)
  assert not list(tmp_path.iterdir())


def test_of_a_damaged_checkpoint_the_one_before_is_loaded(run, tmp_path, capsys):
  shutil.copytree(run[0], tmp_path / "run")
  (tmp_path / "run" / "checkpoints" / "3" / "state" / "_METADATA").write_text("{")
  assert mor.load(tmp_path / "run").step == 2
  said = capsys.readouterr().err
  assert "checkpoints/3: the hash of state/_METADATA" in said and said.endswith("checkpoints/2\n") and said.count("\n") == 1
  (tmp_path / "run" / "checkpoints" / "2" / "state" / "_METADATA").unlink()
  with pytest.raises(OSError, match="cannot read the checkpoint .*; remove that directory") as error:
    mor.load(tmp_path / "run")
  assert "\n" not in str(error.value)


def test_an_unknown_name_says_which_there_are():
  with pytest.raises(AttributeError, match="no attribute 'nonexistent'; it has load, Model, Engine"):
    mor.nonexistent
  assert not hasattr(mor, "Decoder")


def test_importing_the_package_imports_no_jax():
  code = "import sys, mor; print(sorted({'jax', 'flax', 'numpy', 'ml_collections'} & set(sys.modules)))"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout == "[]\n"
