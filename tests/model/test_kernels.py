"""Fused attention equals XLA's; the TPU program holds the kernel and no scores."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import types as python_types

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
import numpy as np
import pytest

from mor.model import block
from mor.model import kernels
from mor.model import recursion
from mor.model import transformer
from mor.model.kv import view as kv_view
from tests.helpers import tiny
from tests.helpers import weights

ROOT = pathlib.Path(__file__).parents[2]
EXPERT_CHOICE = dict(sharing="cycle", num_layers=2, num_recursions=2,
                     router=dict(name="expert_choice", capacity=(0.9, 0.6)))
MODELS = {
    "vanilla": tiny.VANILLA | dict(num_layers=1),
    "cycle": dict(sharing="cycle", num_layers=4, num_recursions=2, router=tiny.FIXED),
    "sequence": dict(sharing="sequence", num_layers=4, num_recursions=2, router=tiny.FIXED),
    "expert_choice": EXPERT_CHOICE,
    "masked": EXPERT_CHOICE | dict(execution="masked"),
    "middle_cycle": dict(router=dict(name="expert_choice", capacity=(1.0, 0.7, 0.4)), num_layers=5),
    "token_choice": EXPERT_CHOICE | dict(router=tiny.TOKEN_CHOICE),
    "hybrid": EXPERT_CHOICE | dict(kv_plan="hybrid"),
    "shared": EXPERT_CHOICE | dict(kv_plan="shared"),
}
QUICK = ("vanilla", "cycle", "expert_choice", "masked")


def draw(batch=3, seq_len=150, num_heads=4, num_kv_heads=2, head_dim=6, seed=0):
  """Queries, keys, values; and segments of several documents, with padding at the end and amid."""
  rng = np.random.default_rng(seed)
  normal = lambda heads: jnp.asarray(rng.normal(size=(batch, seq_len, heads, head_dim)), jnp.float32)
  segment_BT = np.ones((batch, seq_len), np.int32)
  for row in range(1, batch):
    segment_BT[row, seq_len // (row + 1):] = 2
    segment_BT[row, seq_len - 2 * row:] = 0
  segment_BT[-1, 12:17] = 0
  segment_BT[-1, :4] = 0
  return normal(num_heads), normal(num_kv_heads), normal(num_kv_heads), jnp.asarray(segment_BT)


def xla(q, k, v, segment_BT):
  position_BT = jnp.broadcast_to(jnp.arange(q.shape[1])[None, :], segment_BT.shape)
  mask_BTS = kv_view.visible(position_BT, segment_BT, position_BT, segment_BT)
  return kernels.xla(q, k, v, mask_BTS)


def value_and_grads(attend, q, k, v, segment_BT):
  """Of a loss that reads the rows that are not padding, as the model's does."""
  def total(q, k, v):
    out_BTNH = attend(q, k, v, segment_BT)
    kept_BTNH = jnp.where((segment_BT != 0)[:, :, None, None], out_BTNH, 0.0)
    return jnp.sum(jnp.sin(3 * kept_BTNH)), (kept_BTNH, out_BTNH)

  (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)
  return out, grads


def assert_equal(ours, theirs, message=""):
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(b).max())), err_msg=message)


@pytest.mark.parametrize("seq_len,heads", [(150, (4, 2)), (20, (4, 4)), (256, (3, 1)), (521, (2, 1))])
def test_splash_equals_xla(seq_len, heads):
  inputs = draw(2 if seq_len > 500 else 3, seq_len, *heads)
  (ours, all_rows), our_grads = value_and_grads(kernels.splash, *inputs)
  (theirs, _), their_grads = value_and_grads(xla, *inputs)
  assert np.isfinite(all_rows).all()
  assert_equal(ours, theirs)
  assert_equal(our_grads, their_grads)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_view_shows_both_kernels_the_same_keys(gathered):
  q, k, v, segment_BT = draw(seq_len=22)
  position_BT = jnp.broadcast_to(jnp.arange(22)[None, :], segment_BT.shape)
  seen_BT = jnp.where(jnp.asarray(np.random.default_rng(1).random(segment_BT.shape) < 0.6), segment_BT, 0)
  if gathered:  # the 22 places hold up to 22 of 60 tokens
    keep_BT = np.random.default_rng(2).random((3, 60)) < np.array([[0.6], [0.3], [0.2]])
    position_BT = recursion.compact(jnp.asarray(keep_BT), 22)
    segment_BT = seen_BT = jnp.where(position_BT < 60, 1 + position_BT // 25, 0)
    assert (seen_BT == 0).any() and (seen_BT[0] != 0).all()

  def attend(kernel):
    view = kv_view.make_view(kernel, (q, q), position_BT, segment_BT, position_BT, seen_BT)
    assert (view.mask_BTS is None) == (kernel == "splash")
    run = lambda q, k, v, _: block.attend(q, kv_view.KV(k, v), view)
    return value_and_grads(run, q, k, v, seen_BT)

  (ours, _), our_grads = attend("splash")
  (theirs, _), their_grads = attend("xla")
  assert_equal(ours, theirs)
  assert_equal(our_grads, their_grads)


def test_blocks_are_equal_and_cover_the_sequence():
  for seq_len in range(1, 3000, 7):
    block, length = kernels._blocks(seq_len)
    assert block % 128 == 0 and block <= 512 and length % block == 0
    assert seq_len <= length < seq_len + 128 * (length // block)


@pytest.mark.parametrize("seq_len", [40, 41])
def test_padding_for_cudnn_changes_nothing(seq_len):
  q, k, v, segment_BT = (x[:, :seq_len] for x in draw())
  position_BT = jnp.broadcast_to(jnp.arange(seq_len)[None, :], segment_BT.shape)
  mask_BTS = kv_view.visible(position_BT, segment_BT, position_BT, segment_BT)
  lengths = []

  def padded(q, k, v, segment_BT):
    out_BTNH = kernels.cudnn(q, k, v, mask_BTS, implementation="xla")
    lengths.append(out_BTNH.shape[1])
    return out_BTNH

  assert_equal(value_and_grads(padded, q, k, v, segment_BT)[1], value_and_grads(xla, q, k, v, segment_BT)[1])
  assert lengths == [seq_len]


@pytest.mark.parametrize("axes", [dict(data=2, model=2), dict(data=2, model=4), dict(data=2, fsdp=2, tensor=2),
                                  dict(data=3, tensor=2), dict(data=1)])
def test_splash_on_a_mesh_equals_one_device(axes):
  inputs = draw(4, 21)
  sizes = tuple(axes.values())
  devices = np.array(jax.devices()[:np.prod(sizes)]).reshape(sizes)
  theirs = value_and_grads(kernels.splash, *inputs)
  with jax.set_mesh(Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))):
    assert_equal(value_and_grads(kernels.splash, *inputs), theirs)
    text = str(jax.make_jaxpr(kernels.splash)(*inputs))
  assert ("shard_map" in text) == (len(sizes) > 1)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_model_with_splash_equals_one_with_xla(name):
  config = tiny.config(model=dict(attention="xla") | MODELS[name]).model
  seq_len = 77
  rng = np.random.default_rng(0)
  tokens_BT = jnp.asarray(rng.integers(0, config.vocab_size, (2, seq_len)))
  segment_BT = np.ones((2, seq_len), np.int32)
  segment_BT[1, 30:] = 2
  segment_BT[1, 61:] = 0
  params = jax.tree.map(jnp.asarray, weights.draw(config))

  def run(attention):
    model = transformer.Transformer(dataclasses.replace(config, attention=attention))

    def total(params):
      out = model.apply({"params": params}, tokens_BT, jnp.asarray(segment_BT))
      hidden_BTD = jnp.where((segment_BT != 0)[:, :, None], out.hidden_BTD, 0.0)
      return jnp.sum(jnp.sin(hidden_BTD)), (hidden_BTD, out.keep_RBT)

    text = str(jax.make_jaxpr(total)(params))
    (_, (hidden_BTD, keep_RBT)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return hidden_BTD, keep_RBT, grads, text

  ours, our_keep, our_grads, our_text = run("splash")
  theirs, their_keep, their_grads, their_text = run("xla")
  assert "splash" in our_text and "splash" not in their_text
  np.testing.assert_array_equal(our_keep, their_keep)
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(our_grads), jax.tree.leaves(their_grads), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1.0, float(jnp.abs(b).max())), err_msg=str(path))
  if config.kv_plan == "recursion_wise":  # and no mask was built
    assert re.search(r"bool\[2,(\d+),\1\]", their_text)
    assert not re.search(r"bool\[2,(\d+),\1\]", our_text)


@pytest.mark.parametrize("name", [
    "vanilla", "expert_choice", "masked", "shared",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("cycle", "middle_cycle", "token_choice"))])
@pytest.mark.parametrize("cross_documents", [False, True])
def test_a_model_with_cudnn_masks_only_what_is_not_causal_by_place(monkeypatch, name, cross_documents):
  """cuDNN's calls stand in XLA here; `tests/check_gpu.py` runs them on a GPU."""
  config = tiny.config(model=dict(attention="xla", cross_documents=cross_documents, scan_layers=False) | MODELS[name]).model
  tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 21)))
  segment_BT = np.ones((2, 21), np.int32)
  segment_BT[1, 9:] = 2
  segment_BT[1, 17:] = 0
  params = jax.tree.map(jnp.asarray, weights.draw(config))

  def run():
    out = transformer.Transformer(config).apply({"params": params}, tokens_BT, jnp.asarray(segment_BT))
    return jnp.where((segment_BT != 0)[:, :, None], out.hidden_BTD, 0.0)

  theirs, masked = run(), []
  real = kernels.cudnn

  def cudnn(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    masked.append(mask_BTS is not None)
    return real(q_BTNH, k_BSKH, v_BSKH, mask_BTS, implementation="xla")

  monkeypatch.setattr(kernels, "choose", lambda config, in_order: "cudnn")
  monkeypatch.setattr(kernels, "cudnn", cudnn)
  np.testing.assert_allclose(run(), theirs, rtol=0, atol=1e-5)
  some_hidden = name in ("masked", "token_choice", "shared")  # a step that runs all tokens but shows the kept ones'
  assert len(masked) >= config.num_layers
  assert all(masked) if not cross_documents else any(masked) == some_hidden
  assert not (cross_documents and all(masked) and name != "masked")


def test_dots_keep_what_a_kernel_gives():
  config = tiny.config(model=dict(attention="splash", scan_layers=False) | MODELS["vanilla"]).model
  params = jax.tree.map(jnp.asarray, weights.draw(config))

  def kernels_run(remat):
    model = transformer.Transformer(dataclasses.replace(config, remat=remat))
    total = lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, jnp.zeros((2, 20), jnp.int32)).hidden_BTD))
    return str(jax.make_jaxpr(jax.grad(total))(params)).count("pallas_call[")

  assert kernels_run("none") == kernels_run("dots") == kernels_run("full") - 1


@pytest.mark.slow
def test_splash_under_remat_and_unrolled():
  config = tiny.config(model=dict(attention="splash") | MODELS["vanilla"]).model
  tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, 20)))
  params = jax.tree.map(jnp.asarray, weights.draw(config))

  def grads(**changes):
    model = transformer.Transformer(dataclasses.replace(config, **changes))
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, tokens_BT).hidden_BTD))))(params)

  plain = grads()
  assert_equal(grads(remat="full"), plain)
  assert_equal(grads(remat="dots", scan_layers=False), plain)


@pytest.mark.parametrize("platform,changes,in_order,expected", [
    ("cpu", {}, True, "xla"),
    ("cpu", dict(attention="splash"), True, "splash"),
    ("cpu", dict(attention="splash"), False, "xla"),
    ("tpu", {}, True, "splash"),
    ("tpu", {}, False, "xla"),
    ("tpu", dict(head_dim=6), True, "xla"),
    ("tpu", dict(attention="xla"), True, "xla"),
    ("gpu", {}, True, "cudnn"),
    ("gpu", {}, False, "cudnn"),
    ("gpu", dict(compute_dtype="float32"), True, "xla"),
    ("gpu", dict(head_dim=192), True, "xla"),
    ("gpu", dict(head_dim=12), True, "xla"),
    ("gpu", dict(attention="cudnn"), False, "cudnn"),
    ("gpu", dict(attention="xla"), True, "xla"),
    ("rocm", {}, True, "xla"),
])
def test_choice(monkeypatch, platform, changes, in_order, expected):
  monkeypatch.setattr(kernels, "platform", lambda: "gpu" if platform == "rocm" else platform)
  monkeypatch.setattr(kernels, "_has_cuda", lambda: platform == "gpu")
  config = tiny.config(model=dict(head_dim=64, compute_dtype="bfloat16") | changes).model
  assert kernels.choose(config, in_order) == expected


def test_a_split_sequence_runs_in_xla(monkeypatch):
  monkeypatch.setattr(kernels, "platform", lambda: "tpu")
  config = tiny.config(model=dict(head_dim=64)).model
  with jax.set_mesh(jax.make_mesh((1, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)):
    assert kernels.choose(config, True) == "xla"


@pytest.mark.parametrize("platform,changes,words", [
    ("cpu", dict(attention="cudnn"), ["'cudnn' on cpu", "NVIDIA", "'xla'"]),
    ("tpu", dict(attention="cudnn"), ["'cudnn' on tpu"]),
    ("rocm", dict(attention="cudnn"), ["NVIDIA"]),
    ("gpu", dict(attention="cudnn", compute_dtype="float32"), ["'float32'", "'bfloat16'"]),
    ("gpu", dict(attention="splash"), ["TPU kernel", "'cudnn'"]),
])
def test_what_cannot_run_is_refused(monkeypatch, platform, changes, words):
  if platform != "cpu":  # which is what this is
    monkeypatch.setattr(kernels, "platform", lambda: "gpu" if platform == "rocm" else platform)
    monkeypatch.setattr(kernels, "_has_cuda", lambda: platform == "gpu")
  config = tiny.config(model=dict(compute_dtype="bfloat16") | changes).model
  with pytest.raises(ValueError) as caught:
    transformer.Transformer(config).init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
  assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_platform_is_that_of_the_mesh(monkeypatch):
  assert kernels.platform() == "cpu"
  for found, expected in [("tpu", "tpu"), ("cuda", "gpu"), ("rocm", "gpu"), ("gpu", "gpu")]:
    device = python_types.SimpleNamespace(platform=found)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: python_types.SimpleNamespace(abstract_device=device))
    assert kernels.platform() == expected


_COMPILE = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from mor.model import transformer
from tests.helpers import tiny
devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = Mesh(np.array(devices).reshape(2, -1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
fields = json.loads(sys.argv[2])
config = tiny.config(model=fields).model
B, T = 4, int(sys.argv[3])
model = transformer.Transformer(config)
place = lambda spec: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
tokens_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
params = jax.tree.map(place(P()), jax.eval_shape(model.init, jax.random.key(0), tokens_BT)["params"])
def total(params, tokens_BT, segment_BT):
  hidden_BTD = model.apply({"params": params}, tokens_BT, segment_BT).hidden_BTD
  return jnp.sum(jnp.where((segment_BT != 0)[:, :, None], jnp.sin(hidden_BTD.astype(jnp.float32)), 0.0))
with jax.set_mesh(mesh):
  compiled = jax.jit(jax.grad(total)).lower(params, *(place(P("data"))(tokens_BT),) * 2).compile()
text = compiled.as_text()
widths = {T, *map(int, sys.argv[4:])}
square = [s for s in set(re.findall(r"\\w+\\[[\\d,]+\\]", text)) if any(f"{w},{w}]" in s for w in widths)]
print(json.dumps(dict(kernels=len(re.findall(r"custom_call_target=.tpu_custom_call", text)), square=square,
                      temp=compiled.memory_analysis().temp_size_in_bytes)))
"""


def compile_for_tpu(topology, fields, seq_len, *widths):
  """What a sharded gradient compiles to, in a process that may load libtpu."""
  pytest.importorskip("libtpu")
  environment = os.environ | dict(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
                                  PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]))
  done = subprocess.run([sys.executable, "-c", _COMPILE, topology, json.dumps(fields), *map(str, (seq_len, *widths))],
                        env=environment, capture_output=True, text=True, check=False, timeout=500)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


BIG = dict(num_heads=4, num_kv_heads=2, head_dim=64, compute_dtype="bfloat16", remat="full")


@pytest.mark.parametrize("name", ["vanilla", pytest.param("expert_choice", marks=pytest.mark.slow)])
def test_a_program_for_tpu_has_the_kernel_and_no_scores(name):
  seq_len, padded = 600, 2 * 384
  widths = [seq_len, padded, *([540, 360, 384, 640] if name == "expert_choice" else [])]
  found = compile_for_tpu("v5e:2x2", MODELS[name] | BIG, *widths)
  assert found["kernels"] >= 3 and not found["square"], found
  plain = compile_for_tpu("v5e:2x2", MODELS[name] | BIG | dict(attention="xla"), *widths)
  assert plain["kernels"] == 0 and plain["square"], "the search for scores finds none in a program that has them"
