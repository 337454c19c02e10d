"""A step does not depend on how its batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor import sharding
from mor.model import depths
from mor.train import step
from tests.helpers import tiny

MODELS = {
    "aux_router": dict(router=dict(sampling="aux_router", z_loss_coef=0.1, sampling_coef=0.1)),
    "token_loss": dict(router=dict(tiny.TOKEN_CHOICE, z_loss_coef=0.1), kv_plan="shared"),
    "halting": dict(router=tiny.router("halting"), kv_plan="hybrid"),
    "drawn_steps": dict(router=tiny.FIXED, recursions_train=dict(distribution="uniform", values=(1, 3), backprop=2)),
}
CUTS = {
    "accumulation": dict(train=dict(accumulation=4)),
    "data": dict(mesh=dict(data=8)),
    "data_tensor": dict(mesh=dict(data=4, tensor=2)),
    "tensor": dict(mesh=dict(data=1, tensor=2)),  # nothing left to be split by hand
    "fsdp": dict(mesh=dict(data=2, fsdp=4)),
    "fsdp_tensor": dict(mesh=dict(data=2, fsdp=2, tensor=2)),
    "fsdp_sequence": dict(mesh=dict(data=2, fsdp=2, sequence=2)),
    "fsdp_accumulation": dict(mesh=dict(fsdp=2), train=dict(accumulation=4)),
}
QUICK = {
    *(("aux_router", cut) for cut in ("accumulation", "fsdp_tensor")),
    ("token_loss", "fsdp_sequence"),
}


def run(config, steps=2):
  mesh = sharding.make_mesh(config.mesh)
  state, train_step = step.init_state(config, mesh), step.make_train_step(config, mesh)
  for i in range(steps):
    state, metrics = train_step(state, sharding.put_batch(mesh, tiny.batch(config, i)), step=i)
  return jax.device_get((state, metrics))


def config(model, cut=None):
  # A large eps, so that Adam does not turn the rounding of tiny gradients into steps.
  return tiny.config(
      dict(model=dict(vocab_size=62, num_layers=5) | model, data=dict(batch_size=8), optim=dict(warmup_steps=0, eps=1e-3)),
      *([CUTS[cut]] if cut else []))


@functools.cache
def whole(model):
  return run(config(MODELS[model]))


@pytest.mark.parametrize("model, cut", [
    pytest.param(model, cut, marks=() if (model, cut) in QUICK else pytest.mark.slow) for model in MODELS for cut in CUTS])
def test_cut_batch_equals_whole(model, cut):
  state, metrics = whole(model)
  cut_state, cut_metrics = run(config(MODELS[model], cut))
  for name, value in metrics.items():
    np.testing.assert_allclose(cut_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(cut_state.params), jax.tree.leaves(state.params)):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=sharding.path_name(path))


def test_loss_free_bias_moves_toward_the_underloaded_depth():
  cfg = config(dict(router=dict(tiny.TOKEN_CHOICE, balancing="loss_free", bias_update_rate=0.5)))
  state, metrics = run(cfg, steps=1)
  load_R = [metrics[f"load_{r}"] for r in (1, 2, 3)]
  chosen_R = np.array([load_R[0] - load_R[1], load_R[1] - load_R[2], load_R[2]])
  np.testing.assert_allclose(state.balance["bias_R"], 0.5 * np.sign(1 / 3 - chosen_R))
  warm = config(dict(router=dict(tiny.TOKEN_CHOICE, balancing="loss_free", balance_warmup_steps=2)))
  state, metrics = run(warm, steps=1)
  np.testing.assert_array_equal(state.balance["bias_R"], 0.0)
  assert metrics["load_3"] == 1.0, "every token goes to the last depth during the warm-up"


def test_capacity_warmup_narrows_to_the_configured_width():
  cfg = config(dict(router=dict(capacity_warmup_steps=4)))
  mesh = sharding.make_mesh(cfg.mesh)
  state, train_step = step.init_state(cfg, mesh), step.make_train_step(cfg, mesh)
  loads = []
  for i in (0, 2, 4, 5):  # each bucket is a program
    state = state.replace(step=jnp.asarray(i))
    state, metrics = train_step(state, sharding.put_batch(mesh, tiny.batch(cfg, i)), step=i)
    loads.append([float(metrics[f"load_{r}"]) for r in (1, 2, 3)])
  assert loads[0] == [1.0, 1.0, 1.0]
  assert all(a[2] >= b[2] for a, b in zip(loads, loads[1:]))
  assert loads[2][2] == loads[3][2] < 0.34


@pytest.mark.parametrize("name", ["fixed", pytest.param("halting", marks=pytest.mark.slow)])
def test_a_step_with_a_drawn_number_of_recursions_is_that_of_the_model_built_with_it(name):
  router = tiny.router(name)
  drawing = tiny.config(model=dict(router=router, num_layers=5, recursions_train=dict(
      distribution="uniform", values=(1, 2))))
  mesh = sharding.make_mesh(drawing.mesh)
  train_step, drawn_S = step.make_train_step(drawing, mesh), [depths.draw(drawing.model, drawing.seed, i) for i in range(6)]
  first = drawn_S.index(2)
  batch = sharding.put_batch(mesh, tiny.batch(drawing))
  start = step.init_state(drawing, mesh).replace(step=jnp.asarray(first))
  state, metrics = train_step(start, batch)
  assert metrics.pop("recursions") == 2
  assert [train_step.must_compile(i) for i in range(6)] == [drawn == 1 for drawn in drawn_S]
  built = tiny.config(model=dict(router=router, num_layers=4, num_recursions=2))
  start = step.init_state(drawing, mesh).replace(step=jnp.asarray(first))
  jax.tree.map(np.testing.assert_array_equal, (state, metrics), step.make_train_step(built, mesh)(start, batch))


def test_same_seed_same_state():
  cfg = config({})
  a, b = (jax.device_get(step.init_state(cfg, sharding.make_mesh(cfg.mesh)).params) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_rows_that_do_not_divide_raise():
  cfg = tiny.config(mesh=dict(data=8))
  with pytest.raises(ValueError, match=r"4 rows is not a multiple of mesh.data \* mesh.fsdp = 8; use 8 or"):
    step.make_train_step(cfg, sharding.make_mesh(cfg.mesh))


def test_vanilla_reports_no_routing():
  assert step.router_metrics(tiny.config(model=tiny.VANILLA).model, {}) == {}


def test_metrics_read_the_sums():
  sums = dict(tokens=jnp.float32(10), kept=jnp.array([10., 6., 3.]), candidates=jnp.array([10., 10., 6.]),
              correct=jnp.array([10., 7., 3.]), last_T=jnp.array([0., 2., 1., 0.]))
  metrics = step.router_metrics(tiny.config().model, sums)
  np.testing.assert_allclose([metrics["load_2"], metrics["sampling_accuracy"], metrics["dead_tokens"]],
                             [0.6, 20 / 26, 0.5])
  sums = dict(tokens=jnp.float32(10), kept=jnp.array([10., 6., 3.]), last_T=jnp.array([1.]),
              chosen_R=jnp.array([4., 3., 3.]), entropy=jnp.float32(5))
  metrics = step.router_metrics(tiny.config(model=dict(router=tiny.TOKEN_CHOICE)).model, sums)
  np.testing.assert_allclose([metrics["max_vio"], metrics["entropy"]], [0.2, 0.5], rtol=1e-6)
