"""Names that a wrapper has changed are read as they were."""

import pathlib

import pytest

from mor.conversion import command
from mor.conversion import layout
from tests.helpers import checkpoints
from tests.helpers import weights

MODEL = checkpoints.llama(num_layers=2, tie_embeddings=False)
VARIABLES = {"params": weights.draw(MODEL)}
ARRAYS = dict(layout.write(VARIABLES, MODEL, "hf"))


def save(folder: pathlib.Path, rename, leave_out=(), model=MODEL) -> str:
  arrays = {rename(key): array for key, array in ARRAYS.items() if key not in leave_out}
  return f"hf:{checkpoints.write_folder(folder, checkpoints.hf_config(model), arrays)}"


@pytest.mark.parametrize("rename", [
    lambda key: f"_orig_mod.{key}", lambda key: f"module.{key}", lambda key: f"module._orig_mod.{key}",
    lambda key: f"base_model.model.{key}", lambda key: f"student.{key}",
    lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
    lambda key: key.replace("layers.", "layers._fsdp_wrapped_module.").replace("mlp", "_checkpoint_wrapped_module.mlp"),
    lambda key: key.removeprefix("model."), lambda key: f"module.{key.removeprefix('model.')}",
])
def test_names_of_wrappers_are_taken_back(rename, tmp_path, caplog):
  assert checkpoints.equal(command.read(save(tmp_path, rename)).variables, VARIABLES)
  assert "a wrapper has changed the names" in caplog.text


def test_a_model_without_its_head(tmp_path):
  """As `AutoModel` saves it."""
  model = checkpoints.llama(num_layers=2)
  spec = save(tmp_path, lambda key: key.removeprefix("model."), leave_out=["lm_head.weight"], model=model)
  assert "head" not in command.read(spec).variables["params"]


def test_plain_names_are_not_touched(tmp_path, caplog):
  assert checkpoints.equal(command.read(save(tmp_path, str)).variables, VARIABLES)
  assert not caplog.text


@pytest.mark.parametrize("rename,message", [
    (lambda key: key.replace("layers.1", "layers.5"), "has no tensor 'model.layers.1.input_layernorm.weight'"),
    (lambda key: f"module.{key}" if "layers.1" not in key else f"other.{key}", "has no tensor 'model.embed_tokens"),
    (lambda key: f"base_model.model.{key}".replace("q_proj", "q_proj.lora_A.default"),
     "'base_model.model.*lora_A.default.weight' of a LoRA adapter that is not merged"),
])
def test_other_names_are_named(rename, message, tmp_path):
  with pytest.raises(ValueError, match=message) as caught:
    command.read(save(tmp_path, rename))
  assert "\n" not in str(caught.value)
