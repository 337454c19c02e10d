"""Reference vectors of the official MoR, rewritten as that project's own checkpoints.

  python -m tests.helpers.official_files FILE.npz ...

writes each vector as a folder in upstream's names, imports it with
`mor.conversion.command`, and lets `tests.check_official` compare what comes out.
Prints its JSON lines; the exit status is 1 if any is not ok.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
from typing import Any

import yaml

from mor import config as config_lib
from mor.conversion import layout
from mor.conversion import command
from tests import check_official
from tests.helpers import checkpoints
from tests.helpers import official

_KINDS = {"expert_choice": "expert", "token_choice": "token"}


def recipe(model: config_lib.ModelConfig) -> dict[str, Any]:
  """The .yaml of a model's training, by upstream's options."""
  router = model.router
  routed, shared = router.name != "fixed", model.sharing != "vanilla"
  own = dict(router_func=None if router.activation == "none" else router.activation, alpha=router.alpha,
             gating=router.gating)
  expert = own | dict(sampling=None if router.sampling == "none" else router.sampling, coeff=router.sampling_coef,
                      cap_warmup_step=0, include_first=True)
  token = own | dict(balancing=router.balancing, coeff=router.balance_coef, u=router.bias_update_rate)
  return dict(
      name="tiny", precision="fp32",
      recursive=dict(enable=shared, num_recursion=model.num_recursions, sharing=model.sharing, ln_share=True),
      kv_sharing=dict(enable=model.kv_plan != "recursion_wise", update_cache=model.kv_plan == "hybrid"),
      relaxation=dict(enable=False, method="lora"),
      mor=dict(enable=routed, type=_KINDS.get(router.name, "expert"), rand_router=router.arch == "random",
               capacity=",".join(map(str, router.capacity)) or None, router_type=router.arch,
               z_loss=router.z_loss_coef > 0, z_coeff=router.z_loss_coef, temp=router.temperature,
               expert=expert, token=token))


def write(folder: pathlib.Path, model: config_lib.ModelConfig, variables: dict[str, Any],
          said: dict[str, Any] | None = None) -> pathlib.Path:
  """A checkpoint in upstream's names: config.json, the recipe and every tied copy."""
  config = checkpoints.hf_config(model, architectures=["MoRLlamaForCausalLM"], initializer_range=model.init_std)
  checkpoints.write_folder(folder, config, dict(layout.write(variables, model, "official_mor")))
  (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe(model) if said is None else said))
  return folder


def read(path: str) -> official.Vector:
  """A vector whose config and parameters went through a checkpoint in upstream's names."""
  vector = official.read(path)
  balance = {} if vector.bias_R is None else {"balance": {"bias_R": vector.bias_R}}
  with tempfile.TemporaryDirectory() as folder:
    write(pathlib.Path(folder), vector.model, {"params": vector.params, **balance})
    imported = command.read(f"official_mor:{folder}")
  return dataclasses.replace(vector, model=imported.model, params=imported.variables["params"],
                             bias_R=imported.variables.get("balance", {}).get("bias_R"))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("files", nargs="+", metavar="FILE.npz")
  sys.exit(check_official.main(parser.parse_args().files, read=read))
