"""Executed operations: loops multiplied out, what a GPU's host drives, and copies of the pool."""

import textwrap

import jax
import jax.numpy as jnp
import pytest

from mor.aot import executed
from mor.aot import hlo

POOL = 8 * 4 * 4.0  # bytes of f32[8,4]
PROGRAM = textwrap.dedent("""\
    HloModule tick

    %moved (x: f32[8,4]) -> f32[4,8] {
      %x = f32[8,4]{1,0} parameter(0)
      ROOT %turned = f32[4,8]{1,0} transpose(%x), dimensions={1,0}
    }

    %written (x: f32[8,4], row: f32[1,4], i: s32[]) -> f32[8,4] {
      %x.1 = f32[8,4]{1,0} parameter(0)
      %row = f32[1,4]{1,0} parameter(1)
      %i.1 = s32[] parameter(2)
      ROOT %updated = f32[8,4]{1,0} dynamic-update-slice(%x.1, %row, %i.1, %i.1)
    }

    %narrow (x: f32[8,4]) -> f32[1,4] {
      %x.2 = f32[8,4]{1,0} parameter(0)
      ROOT %first = f32[1,4]{1,0} slice(%x.2), slice={[0:1], [0:4]}
    }

    %page (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
      %carry = (s32[], f32[8,4]{1,0}) parameter(0)
      %n = s32[] get-tuple-element(%carry), index=0
      %more = s32[] add(%n, %n)
      %y = f32[8,4]{1,0} get-tuple-element(%carry), index=1
      %z = f32[8,4]{1,0} negate(%y), backend_config={"estimated_cycles":"10"}
      ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%more, %z)
    }

    %on (carry: (s32[], f32[8,4])) -> pred[] {
      %carry.1 = (s32[], f32[8,4]{1,0}) parameter(0)
      %n.1 = s32[] get-tuple-element(%carry.1), index=0
      %end = s32[] get-tuple-element(%carry.1), index=0
      ROOT %less = pred[] compare(%n.1, %end), direction=NE
    }

    %one_tick (slots: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
      %slots = (s32[], f32[8,4]{1,0}) parameter(0)
      %pool = f32[8,4]{1,0} get-tuple-element(%slots), index=1
      %i = s32[] get-tuple-element(%slots), index=0
      %pages = (s32[], f32[8,4]{1,0}) while(%slots), condition=%on, body=%page
      %copied = f32[8,4]{0,1} copy(%pool), backend_config={"estimated_cycles":"100"}
      %turned.1 = f32[4,8]{1,0} fusion(%copied), kind=kLoop, calls=%moved
      %row.1 = f32[1,4]{1,0} conditional(%i, %copied, %copied), branch_computations={%narrow, %narrow}
      %new = f32[8,4]{1,0} fusion(%copied, %row.1, %i), kind=kLoop, calls=%written
      %attended = f32[8,2]{1,0} custom-call(%new, %row.1), custom_call_target="kernel"
      ROOT %slots.1 = (s32[], f32[8,4]{1,0}) tuple(%i, %new)
    }

    %until (slots: (s32[], f32[8,4])) -> pred[] {
      %slots.2 = (s32[], f32[8,4]{1,0}) parameter(0)
      ROOT %yes = pred[] constant(true)
    }

    ENTRY %main (start: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
      %start = (s32[], f32[8,4]{1,0}) parameter(0)
      ROOT %ticks = (s32[], f32[8,4]{1,0}) while(%start), condition=%until, body=%one_tick, backend_config={"known_trip_count":{"n":"6"}}
    }
    """)


@pytest.fixture(name="program")
def parsed():
  return hlo.parse(PROGRAM)


def test_a_tick_is_the_body_of_the_outer_loop(program):
  loop = executed.find_loop(program)
  assert loop.called == "one_tick" and program.find_trips(loop) == 6


@pytest.mark.parametrize("turns", [1, 5])
def test_pages_are_multiplied_out(program, turns):
  a_tick = executed.count(program, "one_tick", turns=lambda loop: turns, pool={POOL})
  in_a_turn, conditions = 2, turns + 1
  assert a_tick.operations == 4 + 1 + turns * in_a_turn + conditions  # four of the tick, one of the branch
  assert (a_tick.loops, a_tick.known_loops, a_tick.conditionals) == (1, 0, 1)
  assert a_tick.predicates == turns + 1 + 1
  assert a_tick.cycles == 100 + 10 * turns


def test_what_only_moves_a_buffer_of_the_pool_is_a_copy(program):
  a_tick = executed.count(program, "one_tick", pool={POOL})
  assert a_tick.pool_copies == 2  # the copy and the transpose; the write in place is none
  assert executed.count(program, "one_tick", pool={POOL + 4}).pool_copies == 0
  assert a_tick.copy_bytes == 2 * 2 * POOL  # each is read and written


def test_a_kernel_reads_what_it_needs_of_the_pool(program):
  a_tick = executed.count(program, "one_tick", pool={POOL})
  whole = executed.count(program, "one_tick")
  assert (a_tick.pool_reads, whole.pool_reads) == (1, 0) and whole.bytes - a_tick.bytes == POOL
  assert a_tick.unestimated == 1


def test_a_dispatch_is_its_ticks_and_the_rest(program):
  whole, a_tick = executed.count(program), executed.count(program, "one_tick")
  beside = whole.minus(a_tick.times(6))
  assert beside == executed.Executed(known_loops=1)


def test_a_write_in_place_moves_one_row(program):
  types = {"copied": "f32[8,4]{1,0}", "row.1": "f32[1,4]{1,0}", "i": "s32[]"}
  write = next(i for i in program.computations["one_tick"] if i.name == "new")
  assert hlo.traffic(write, types, program) == 16 + 16 + 4  # row read, row written, index


@pytest.mark.parametrize("line,moved", [
    ("%a = f32[8,4]{1,0:T(8,128)S(1)} negate(%x)", 128),  # to VMEM: only read
    ("%a = (f32[8,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]) copy-start(%x)", 128 + 4),
    ("%a = ((f32[8,4]{1,0}), f32[2,4]{1,0}, s32[]) slice-start(%x), slice={[0:2], [0:4]}", 36 + 36),
    ("%a = f32[2,4]{1,0} gather(%x, %i), slice_sizes={1,4}", 32 + 32),
    ("%a = f32[8,4]{1,0} scatter(%x, %i, %u), to_apply=%add", 32),
    ("%a = f32[8,4]{1,0} bitcast(%x)", 0),
    ('%a = f32[8,4]{1,0} custom-call(%x), custom_call_target="ConcatBitcast"', 0),  # tells the TPU compiler something
    ('%a = f32[8,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"', 128 + 128),
])
def test_only_what_crosses_hbm_is_traffic(line, moved):
  text = ("ENTRY %main (x: f32[8,4]) -> f32[8,4] {\n  %x = f32[8,4]{1,0} parameter(0)\n  %i = s32[1]{0} parameter(1)\n"
          f"  %u = f32[1,4]{{1,0}} parameter(2)\n  {line}\n}}\n")
  program = hlo.parse(text)
  body = program.computations["main"]
  assert hlo.traffic(body[-1], {i.name: i.type for i in body}, program) == moved


def test_a_compiled_loop_over_data_has_predicates():
  def halve(x):
    return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2 - x.mean(), x)
  program = hlo.parse(jax.jit(halve).lower(jnp.zeros((64, 64))).compile().as_text())
  once, often = executed.count(program), executed.count(program, turns=lambda loop: 10)
  assert (once.loops, once.predicates, often.predicates) == (1, 2, 11)
  assert often.operations > 5 * once.operations / 2


def test_a_program_without_a_loop_has_no_tick():
  program = hlo.parse(jax.jit(jnp.sin).lower(jnp.zeros(4)).compile().as_text())
  with pytest.raises(ValueError, match="no loop outside of others"):
    executed.find_loop(program)
