"""A program's traffic is counted as often as its loops run."""

import textwrap

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import pytest

from mor.aot import hlo

PROGRAM = textwrap.dedent("""\
    HloModule small

    %add (a: f32[], b: f32[]) -> f32[] {
      %a = f32[] parameter(0)
      %b = f32[] parameter(1)
      ROOT %sum = f32[] add(%a, %b)
    }

    %body (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
      %carry = (s32[], f32[8,4]{1,0}) parameter(0)
      %x = f32[8,4]{1,0} get-tuple-element(%carry), index=1
      %part = f32[2,4]{1,0} reduce-scatter(%x), dimensions={0}, to_apply=%add
      %whole = f32[8,4]{1,0} all-gather(%part), dimensions={0}
      ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%carry, %whole)
    }

    %condition (carry: (s32[], f32[8,4])) -> pred[] {
      %carry = (s32[], f32[8,4]{1,0}) parameter(0)
      ROOT %less = pred[] constant(true)
    }

    ENTRY %main (start: (s32[], f32[8,4])) -> f32[8,4] {
      %start = (s32[], f32[8,4]{1,0}) parameter(0)
      %loop = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
      %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
      %begun = (f32[8,4]{1,0}, f32[8,4]{1,0}) all-reduce-start(%out), to_apply=%add
      ROOT %done = f32[8,4]{1,0} all-reduce-done(%begun)
    }
    """)


def test_collectives_of_a_loop_count_as_often_as_it_runs():
  counted = hlo.measure(PROGRAM)
  assert counted.collectives == {
      "reduce-scatter": hlo.Collective(5, 5 * 128), "all-gather": hlo.Collective(5, 5 * 128),
      "all-reduce": hlo.Collective(1, 128)}
  assert counted.unknown_loops == 0


def test_a_loop_of_unknown_length_is_said():
  counted = hlo.measure(PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', ""))
  assert counted.unknown_loops == 1
  assert counted.collectives["all-gather"].count == 1


def test_the_condition_says_how_often_a_loop_runs():
  condition = """\
      %i = s32[] get-tuple-element(%carry), index=0
      %n = s32[]{:T(128)} constant(7)
      ROOT %less = pred[] compare(%i, %n), direction=LT"""
  counted = hlo.measure(PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "").replace(
      "  ROOT %less = pred[] constant(true)", condition))
  assert counted.unknown_loops == 0
  assert counted.collectives["all-gather"].count == 7


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.measure("HloModule nothing")


def test_compiled_loops_are_multiplied_out():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  gather = lambda x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ jax.lax.all_gather(w, "data", tiled=True)), None), x[0], x)[0]
  by_rows = jax.shard_map(gather, mesh=mesh, in_specs=P(None, "data", None), out_specs=P("data"), check_vma=False)
  given = jax.ShapeDtypeStruct((7, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "data", None)))
  counted = hlo.measure(jax.jit(by_rows).lower(given).compile().as_text())
  assert counted.collectives == {"all-gather": hlo.Collective(7, 7 * 16 * 16 * 4)}


def test_a_slice_of_an_array_moves_the_slice():
  def first_rows(x, i):
    return jax.lax.dynamic_slice(x, (i, 0), (1, 64)).sum()
  counted = hlo.measure(jax.jit(first_rows).lower(jnp.zeros((1000, 64)), 3).compile().as_text())
  assert counted.bytes < 4 * 64 * 10
