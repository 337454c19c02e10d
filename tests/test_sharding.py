"""Every parameter has one rule, and a mesh that does not fit says so."""

import jax
from jax.sharding import PartitionSpec as P
import pytest

from mor import config as config_lib
from mor import sharding
from mor.train import step
from tests import tiny


@pytest.mark.parametrize("router", [
    tiny.FIXED, dict(arch="wide_mlp", sampling="aux_router"), dict(tiny.TOKEN_CHOICE, balancing="loss_free")])
def test_every_leaf_of_the_state_matches_one_rule(router):
  shapes = step.state_shapes(tiny.config(model=dict(router=router)))
  for path, _ in jax.tree_util.tree_leaves_with_path(shapes):
    name = sharding.path_name(path)
    assert sum(bool(sharding.re.search(pattern, name)) for pattern, _ in sharding.RULES) == 1, name


def test_specs_split_heads_widths_and_vocabulary():
  assert sharding.spec("params/embedding", 2) == P("model", None)
  assert sharding.spec("opt_state/1/mu/stack/attention/q", 4) == P(None, None, "model", None)
  assert sharding.spec("params/coda/ffw/down", 3) == P(None, "model", None)
  assert sharding.spec("params/stack/ffw_norm", 2) == P()


def test_unknown_parameter_raises():
  with pytest.raises(ValueError, match="no sharding rule for 'params/mystery'.*RULES"):
    sharding.spec("params/mystery", 2)


def test_indivisible_axis_raises_with_the_remedy():
  config = tiny.config(model=dict(num_heads=3, num_kv_heads=3), mesh=dict(data=1, model=4))
  with pytest.raises(ValueError, match="does not split 4 ways over mesh.model; use a mesh.model that divides"):
    step.state_shardings(config, sharding.make_mesh(config.mesh))


def test_mesh_takes_what_is_left():
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=-1, model=2))
  assert dict(mesh.shape) == {"data": 4, "model": 2}


@pytest.mark.parametrize("data,model", [(16, 1), (-1, 3)])
def test_mesh_that_does_not_fit_raises(data, model):
  with pytest.raises(ValueError, match="does not fit 8 device"):
    sharding.make_mesh(config_lib.MeshConfig(data=data, model=model))


def test_a_mesh_without_a_process_is_refused():
  class Device:
    def __init__(self, process_index):
      self.process_index = process_index

  with pytest.raises(ValueError, match=r"leaves process 1 without a device; use axis sizes whose product is 4"):
    sharding.make_mesh(config_lib.MeshConfig(data=2, model=1), [Device(0), Device(0), Device(1), Device(1)])
