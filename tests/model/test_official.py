"""The reference vectors of the official PyTorch MoR, and the check that reads them.

The vectors lie beside a checkout that has ../shared; without them, the options
of the check are tested on files written here from the oracle.
"""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

from mor.model import schedule
from tests import check_official
from tests.helpers import official
from tests.helpers import oracle
from tests.helpers import tiny
from tests.helpers import weights

VECTORS = pathlib.Path(__file__).parents[3] / "shared" / "reference" / "official_mor"
NONE = pytest.param(None, marks=pytest.mark.skip(f"no vectors in {VECTORS}"))
FILES = sorted(VECTORS.glob("*.npz")) or [NONE]
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
uncompiled = lambda function: function

ROUTERS = dict(expert=dict(capacity=(1.0, 0.7)), token=tiny.TOKEN_CHOICE, recursive=tiny.FIXED)
OPTIONS = {  # kind, what the file says, what the model is
    "mlp": ("expert", dict(router="mlp"), dict(router=dict(arch="mlp"))),
    "official_wide_mlp": ("expert", dict(router="wide_mlp"), dict(router=dict(arch="mlp"))),
    "paper_wide_mlp": ("expert", dict(router="wide_mlp"), dict(router=dict(arch="wide_mlp"))),
    "tanh": ("expert", dict(func="tanh", temp=2.0, alpha=0.5),
             dict(router=dict(activation="tanh", temperature=2.0, alpha=0.5))),
    "no_activation": ("expert", dict(func="none", alpha=0.1),
                      dict(router=dict(activation="none", alpha=1.0))),
    "additive": ("expert", dict(gating="additive", z=True), dict(router=dict(gating="additive"))),
    "aux_router": ("expert", dict(sampling="aux_router"), dict(router=dict(sampling="aux_router"))),
    "shared": ("expert", dict(kvshare=True), dict(kv_plan="shared")),
    "hybrid": ("expert", dict(kvshare=True, update_cache=True), dict(kv_plan="hybrid")),
    "token_sigmoid": ("token", dict(func="sigmoid"),
                      dict(router=dict(activation="sigmoid", alpha=0.1))),
    "token_loss_free": ("token", dict(balancing="loss_free"),
                        dict(router=dict(balancing="loss_free"))),
    "token_additive": ("token", dict(gating="additive", router="mlp", z=True),
                       dict(router=dict(gating="additive", arch="mlp"))),
    "token_shared": ("token", dict(kvshare=True), dict(kv_plan="shared")),
    "recursive_shared": ("recursive", dict(sharing="middle_sequence", kvshare=True),
                         dict(sharing="middle_sequence", num_layers=6, kv_plan="shared")),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path and path.stem)
def test_model_agrees(path):
  report = check_official.check(path, fast_jit)
  assert report["ok"], report


@pytest.mark.parametrize("path", FILES, ids=lambda path: path and path.stem)
def test_oracle_agrees(path):
  vector = official.read(path)
  arrays = vector.arrays
  result = oracle.forward(vector.model, vector.params, arrays["input_ids"])
  np.testing.assert_allclose(result.logits_BTV, arrays["logits_eval"], rtol=0, atol=4e-5)
  for r in range(vector.model.num_recursions * (vector.kind == "expert")):
    selected_BC = [np.flatnonzero(keep_T) for keep_T in result.keep_RBT[r]]
    np.testing.assert_array_equal(selected_BC, arrays[f"selected/{r}"])
  if "token_logits" in arrays:
    score_BTR = np.moveaxis(result.score_RBT, 0, -1)
    np.testing.assert_allclose(score_BTR, arrays["token_logits"], rtol=0, atol=4e-5)
  losses = dict(sampling_loss=result.sampling, balancing_loss=result.balance,
                router_z_loss=result.z if vector.has_z else 0.0)
  for name in set(losses) & set(arrays):
    np.testing.assert_allclose(losses[name], arrays[name], rtol=1e-5, err_msg=name)
  if "logits_causal" in arrays:
    causal = oracle.forward(vector.model, vector.params, arrays["input_ids"], routing="decide")
    np.testing.assert_allclose(causal.logits_BTV, arrays["logits_causal"], rtol=0, atol=4e-5)
    np.testing.assert_array_equal(causal.keep_RBT, arrays["active_causal"])


@pytest.mark.parametrize("option", OPTIONS)
def test_options_are_read(option, tmp_path):
  path = write(tmp_path, option)
  with jax.disable_jit():
    report = check_official.check(path, uncompiled)
  assert report["ok"], report
  assert set(report["relative_errors"]) == set(official.read(path).arrays) & set(official.COEFFS)


@pytest.mark.parametrize("key,change,reason", [
    ("logits_eval", lambda x: x + 3e-4, None),
    ("selected/1", lambda x: x[:, ::-1], None),
    ("active_causal", np.logical_not, None),
    ("sampling_loss", lambda x: x * (1 + 3e-5), None),
    ("logits_causal", lambda x: x * np.nan, "not finite"),
    ("w/layers.3.mlp.up_proj.weight", lambda x: x + 1e-3, "layer 3 differs"),
    ("w/norm", None, "'w/norm'"),
    ("input_ids", None, "'input_ids'"),
    ("meta", lambda x: json.dumps(dict(json.loads(str(x)), lora=4)), "lora"),
    ("meta", lambda x: json.dumps(dict(json.loads(str(x)), func="relu")), "relu"),
    ("w/extra", lambda x: np.ones(3), "extra"),
])
def test_a_wrong_file_is_not_ok(key, change, reason, tmp_path, capsys):
  path = write(tmp_path, "mlp")
  with np.load(path) as file:
    arrays = dict(file)
  old = arrays.pop(key, None)
  if change is not None:
    arrays[key] = change(old)
  np.savez(path, **arrays)
  with jax.disable_jit():
    assert check_official.main([path], uncompiled) == 1
  report = json.loads(capsys.readouterr().out)
  assert report["ok"] is False
  assert reason is None or reason in report["reason"]


def test_an_unreadable_file_does_not_stop_the_others(tmp_path, capsys):
  good, truncated = write(tmp_path, "recursive_shared"), tmp_path / "truncated.npz"
  truncated.write_bytes(pathlib.Path(good).read_bytes()[:-500])
  with jax.disable_jit():
    files = [str(truncated), str(tmp_path / "absent.npz"), good]
    assert check_official.main(files, uncompiled) == 1
  reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [report["ok"] for report in reports] == [False, False, True]


def write(directory: pathlib.Path, option: str) -> str:
  """Writes a vector with `option` whose outputs are the oracle's."""
  kind, said, fields = OPTIONS[option]
  base = dict(sharing="cycle", num_recursions=2, num_layers=4, router=ROUTERS[kind])
  model = tiny.config(dict(model=base), model=fields).model
  meta = dict(
      kind=kind, num_recursions=2, num_unrolled_layers=model.num_layers, sharing=model.sharing,
      heads=model.num_heads, kv=model.num_kv_heads, d=model.d_model, ff=model.d_ff,
      V=model.vocab_size, rope_theta=model.rope_theta, rms_norm_eps=model.norm_eps,
      capacity=[1.0, 0.7]) | said
  params, bias_R = weights.draw(model), None
  arrays = official_weights(model, params)
  if model.router.balancing == "loss_free":
    bias_R = arrays["w/router.0.router_bias"] = np.array([-0.2, 0.2], np.float32)
  arrays["input_ids"] = np.random.default_rng(0).integers(0, model.vocab_size, (4, 12))
  arrays |= outputs(model, params, arrays["input_ids"], bias_R, kind, said.get("z", False))
  path = str(directory / f"{option}.npz")
  np.savez(path, meta=json.dumps(meta), **arrays)
  return path


def official_weights(model, params) -> dict[str, np.ndarray]:
  """Inverse of the reading in tests/helpers/official.py."""
  arrays = {"w/embed": params["embedding"], "w/norm": params["final_norm"]}
  names = {name: f"self_attn.{name}_proj" for name in "qkvo"}
  names |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
  for i, (group, row) in enumerate(schedule.make(model).unrolled()):
    layer = params[group]
    arrays[f"w/layers.{i}.input_layernorm.weight"] = layer["attention_norm"][row]
    arrays[f"w/layers.{i}.post_attention_layernorm.weight"] = layer["ffw_norm"][row]
    for ours, theirs in names.items():
      weight = (layer["attention"] | layer["ffw"])[ours][row]
      ins = model.num_heads * model.head_dim if ours == "o" else weight.shape[0]
      arrays[f"w/layers.{i}.{theirs}.weight"] = weight.reshape(ins, -1).T
  for name in {"router", "aux_router"} & set(params):
    linear = "hidden" not in params[name]
    theirs = {"out": "router"} if linear else {"hidden": "router.0", "out": "router.2"}
    for ours, inner in theirs.items():
      for r, weight in enumerate(params[name][ours]):
        arrays[f"w/{name}.{r}.{inner}.weight"] = weight.T
  return arrays


def outputs(model, params, tokens_BT, bias_R, kind, has_z) -> dict[str, np.ndarray]:
  """What the oracle says, by the official names."""
  result = oracle.forward(model, params, tokens_BT, bias_R=bias_R)
  arrays = dict(logits_eval=result.logits_BTV)
  if kind != "recursive":
    arrays |= dict(sampling_loss=result.sampling, balancing_loss=result.balance,
                   router_z_loss=result.z if has_z else 0.0)
  if kind == "token":
    arrays["token_logits"] = np.moveaxis(result.score_RBT, 0, -1)
  if kind == "expert":
    causal = oracle.forward(model, params, tokens_BT, routing="decide")
    arrays |= dict(logits_causal=causal.logits_BTV, active_causal=causal.keep_RBT)
    for r, keep_BT in enumerate(result.keep_RBT):
      arrays[f"selected/{r}"] = np.stack([np.flatnonzero(keep_T) for keep_T in keep_BT])
  return arrays
