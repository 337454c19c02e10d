"""A GPU's kernels are summed by the part of the model and the pass that they are of."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profile

SPACE = """
planes {
  id: 1 name: "/device:GPU:0"
  lines { id: 1 name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 4000000000 stats { metadata_id: 1 str_value: "dot.1" } }
    events { metadata_id: 1 duration_ps: 2000000000 stats { metadata_id: 1 str_value: "dot.1" } }
    events { metadata_id: 2 duration_ps: 1000000000 stats { metadata_id: 1 str_value: "dot.2" } }
    events { metadata_id: 2 duration_ps: 500000000 } }
  lines { id: 2 name: "XLA Modules" events { metadata_id: 1 duration_ps: 9000000000 } }
  event_metadata { key: 1 value { id: 1 name: "gemm" } }
  event_metadata { key: 2 value { id: 2 name: "copy" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
planes { id: 2 name: "/host:CPU" lines { id: 3 name: "Stream" events { metadata_id: 1 duration_ps: 7 } } }
"""
TEXT = """
  %dot.1 = f32[] dot(%a), metadata={op_name="jit(step)/transpose(jvp(ffw))/dot_general" source_file="x"}
  %dot.2 = f32[] dot(%a), metadata={op_name="jit(step)/jvp(recursion)/while/body/attention/attend/dot_general"}
"""


@pytest.fixture
def recorded(monkeypatch, tmp_path):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "host.xplane.pb").write_bytes(b"")
  space = jax.profiler.ProfileData.from_text_proto(SPACE)
  monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: space)
  return str(tmp_path)


def test_events_are_those_of_the_streams(recorded):
  assert profile.events(recorded) == [("gemm", "dot.1", 4.0), ("gemm", "dot.1", 2.0), ("copy", "dot.2", 1.0),
                                      ("copy", "", 0.5)]


def test_no_profile_is_an_error(tmp_path):
  with pytest.raises(OSError, match="no profile"):
    profile.events(str(tmp_path))


def test_breakdown_is_of_one_run_and_greatest_first(recorded, monkeypatch):
  found, runs = profile.events(recorded), []
  monkeypatch.setattr(profile, "events", lambda directory: found)
  shares = profile.breakdown(lambda: runs.append(1), TEXT, times=2)
  assert len(runs) == 2
  assert shares["parts"] == [["ffw backward", 3.0], ["attend", 0.5], ["unknown", 0.25]]
  assert shares["kernels"] == [["gemm", "ffw backward", 3.0], ["copy", "attend", 0.5], ["copy", "unknown", 0.25]]


@pytest.mark.parametrize("op_name,expected", [
    ("jit(f)/jvp(ffw)/dot_general", "ffw"),
    ("jit(f)/transpose(jvp(recursion))/attention/cudnn/dot", "cudnn backward"),
    ("jit(f)/transpose(jvp(x))/checkpoint/rematted_computation/ffw/mul", "ffw again"),
    ("jit(f)/optimizer/add", "optimizer"),
    ("jit(f)/add", "rest"),
])
def test_part(op_name, expected):
  assert profile.part(op_name) == expected


def test_a_program_names_its_parts():
  def total(x):
    with jax.named_scope("ffw"):
      return jnp.sum(jnp.sin(x @ x))
  text = jax.jit(jax.grad(total)).lower(jnp.ones((8, 8))).compile().as_text()
  assert {"ffw", "ffw backward"} <= set(profile.parts(text).values())
