"""Every parameter has one rule, and a mesh that does not fit says so."""

import re

import jax
from jax.sharding import PartitionSpec as P
import pytest

from mor import config as config_lib
from mor import parameters
from mor import sharding
from mor.aot import hlo
from mor.model.routers import table as router_table
from mor.train import step
from tests.helpers import tiny


@pytest.mark.parametrize("router", [
    tiny.FIXED, dict(arch="wide_mlp", sampling="aux_router"), dict(tiny.TOKEN_CHOICE, balancing="loss_free")])
def test_every_leaf_of_the_state_has_one_row(router):
  """`spec` raises where a leaf has no row, or several."""
  config = tiny.config(model=dict(router=router))
  shapes, rows = step.state_shapes(config), router_table.make(config.model).parameters
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    assert len(sharding.spec(sharding.path_name(path), leaf.ndim, rows)) in (0, leaf.ndim)


def test_a_row_that_a_router_declares_is_split_as_it_says():
  row = parameters.Parameter("gauge/width", "D", "I", ("model", None), widths=(("I", 3),))
  assert sharding.spec("params/gauge/width", 2, (row,)) == P("fsdp", None)
  with pytest.raises(ValueError, match="'params/gauge/width' is 0 parameters"):
    sharding.spec("params/gauge/width", 2)


def test_every_axis_of_a_row_has_its_logical_axis():
  with pytest.raises(ValueError, match="give one for each letter"):
    parameters.Parameter("gauge", "D", "NH", ("model",))


def test_specs_split_heads_widths_and_vocabulary():
  assert sharding.spec("params/embedding", 2) == P("tensor", "fsdp")
  assert sharding.spec("opt_state/1/mu/stack/attention/q", 4) == P(None, "fsdp", "tensor", None)
  assert sharding.spec("params/coda/ffw/down", 3) == P(None, "tensor", "fsdp")
  assert sharding.spec("params/stack/ffw_norm", 2) == P()


def test_unknown_parameter_raises():
  with pytest.raises(ValueError, match="'params/mystery' is 0 parameters.*declare it in mor/parameters.py"):
    sharding.spec("params/mystery", 2)


def test_indivisible_axis_raises_with_the_remedy():
  config = tiny.config(model=dict(num_heads=3, num_kv_heads=3), mesh=dict(data=1, tensor=4))
  with pytest.raises(ValueError, match="does not split 4 ways over mesh.tensor; use a mesh.tensor that divides"):
    step.state_shardings(config, sharding.make_mesh(config.mesh))


def test_mesh_takes_what_is_left():
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=-1, fsdp=1, tensor=2, sequence=1))
  assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1}


@pytest.mark.parametrize("data,tensor", [(16, 1), (-1, 3)])
def test_mesh_that_does_not_fit_raises(data, tensor):
  with pytest.raises(ValueError, match="does not fit 8 device"):
    sharding.make_mesh(config_lib.MeshConfig(data=data, fsdp=1, tensor=tensor, sequence=1))


def compile_step(model, **mesh):
  """What the compiled step of eight devices moves."""
  config = tiny.config(
      dict(model={**dict(vocab_size=64, sharing="cycle", num_layers=6), **model}, data=dict(batch_size=8), mesh=mesh))
  made = sharding.make_mesh(config.mesh)
  state = step.init_state(config, made)
  with jax.set_mesh(made):
    text = step.make_train_step(config, made).jitted.lower(
        state, sharding.put_batch(made, tiny.batch(config)), None, None).compile().as_text()
  return hlo.measure(text)


def gathered_shapes(counted):
  return {shape for kind, shape, _ in counted.shapes if kind == "all-gather"}


def of_layers(counted):
  """Bytes of the all-gathers of layers' parameters, in all; the embedding's left out."""
  return sum(times * hlo.size(shape) for kind, shape, times in counted.shapes
             if kind == "all-gather" and not re.match(r"f32\[64,20\]", shape))


@pytest.mark.parametrize("mesh", [dict(data=8), dict(data=2, fsdp=4)], ids=["data", "fsdp"])
def test_expert_choice_gathers_no_activations(mesh):
  shapes = gathered_shapes(compile_step(dict(num_recursions=3), **mesh))
  layer = {"[20,4,6]", "[20,2,6]", "[4,6,20]", "[20,28]", "[28,20]"}  # of the parameters of a layer, whole
  rest = {shape for shape in shapes if not any(shape.split("{")[0].endswith(end[1:]) for end in layer)}
  assert rest <= {shape for shape in rest if shape.startswith("f32[64,20]")}, rest
  assert bool(shapes) == ("fsdp" in mesh)


def test_a_shared_stack_is_gathered_once_for_all_recursions():
  mesh = dict(data=2, fsdp=4)
  recursive = of_layers(compile_step(dict(num_recursions=3), **mesh))
  vanilla = of_layers(compile_step(tiny.VANILLA, **mesh))
  assert recursive / vanilla == pytest.approx(1 / 3)


def test_a_mesh_without_a_process_is_refused():
  class Device:
    def __init__(self, process_index):
      self.process_index = process_index

  with pytest.raises(ValueError, match=r"leaves process 1 without a device; use axis sizes whose product is 4"):
    sharding.make_mesh(config_lib.MeshConfig(data=2, fsdp=1, tensor=1, sequence=1), [Device(0), Device(0), Device(1), Device(1)])
