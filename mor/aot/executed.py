"""What a compiled program does when it runs, counted from its text with loops multiplied out.

An *operation* is an instruction outside of fusions that does work: a kernel or a copy on
a GPU, a step of the schedule on a TPU. What depends on data is assumed, and can be given:
a loop of unknown length (`turns`) and the branch of a conditional (`choose_usual`).

On a GPU the host drives such loops and conditionals: it waits for their predicate, once a
round and once more at the end. A loop of known length is only launched by the host.

A *pool copy* only moves numbers, and its result is as large as a buffer of the pool of
keys and values: what a format does that the compiler cannot update in place. A TPU
program carries the compiler's own estimate of the cycles of each instruction, but of
Pallas kernels (`unestimated`).
"""

from collections.abc import Callable, Collection
import dataclasses
import re

from mor.aot import hlo

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_MOVES = frozenset(("copy", "copy-start", "transpose", "reshape", "bitcast", "bitcast-convert", "convert", "parameter",
                    "tuple", "get-tuple-element"))


@dataclasses.dataclass
class Executed:
  """Counts of what one run of a computation executes.

  Attributes:
    operations: operations.
    loops: loops of unknown length.
    known_loops: loops of known length.
    conditionals: conditionals.
    predicates: predicates of loops of unknown length, and of conditionals; a GPU's host waits for each.
    bytes: bytes of HBM that the operations read and write, but of the pool in custom calls.
    copy_bytes: the part of them that copies move.
    pool_copies: copies of a buffer of the pool.
    cycles: the TPU compiler's estimate, where the program has one.
    unestimated: custom calls without such an estimate.
    pool_reads: buffers of the pool that custom calls take; their text does not say how much they read.
  """

  operations: float = 0.0
  loops: float = 0.0
  known_loops: float = 0.0
  conditionals: float = 0.0
  predicates: float = 0.0
  bytes: float = 0.0
  copy_bytes: float = 0.0
  pool_copies: float = 0.0
  cycles: float = 0.0
  unestimated: float = 0.0
  pool_reads: float = 0.0

  def times(self, number: float) -> "Executed":
    """Returns the counts of so many runs."""
    return Executed(*(number * a for a in dataclasses.astuple(self)))

  def minus(self, other: "Executed") -> "Executed":
    """Returns the difference, field by field."""
    return Executed(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def count(program: hlo.Program, name: str | None = None, *, turns: Callable[[hlo.Instruction], float] = lambda loop: 1,
          pool: Collection[float] = ()) -> Executed:
  """Counts what a computation of a program executes.

  Args:
    program: the program.
    name: the computation; None is the whole program.
    turns: rounds of a loop of unknown length.
    pool: bytes of each buffer of the pool.
  """
  found = Executed()
  for computation, times in hlo.runs(program, name or program.entry, turns=turns, choose=choose_usual):
    types = {i.name: i.type for i in computation}
    for instruction in computation:
      if instruction.op == "while":
        trips = program.find_trips(instruction)
        found.known_loops += times * (trips is not None)
        found.loops += times * (trips is None)
        found.predicates += times * (turns(instruction) + 1) * (trips is None)
      elif instruction.op == "conditional":
        found.conditionals += times
        found.predicates += times
      elif not hlo.is_free(instruction):
        _add(found, instruction, times, types, program, pool)
  return found


def choose_usual(branches: list[str]) -> str:
  """Returns the branch that usually runs: of two the first (False), of more, which are widths, the middle one."""
  return branches[0] if len(branches) == 2 else branches[len(branches) // 2]


def find_loop(program: hlo.Program) -> hlo.Instruction:
  """Returns the loop that the program is made around: that of the first computation which carries most.

  Raises:
    ValueError: the first computation has no loop.
  """
  loops = [i for i in program.computations[program.entry] if i.op == "while"]
  if not loops:
    raise ValueError("the program has no loop outside of others; compile more than one tick a dispatch")
  return max(loops, key=lambda loop: len(loop.type))


def _add(found: Executed, instruction: hlo.Instruction, times: float, types: dict[str, str], program: hlo.Program,
         pool: Collection[float]) -> None:
  """Adds an operation to the counts."""
  found.operations += times
  if instruction.op == "custom-call":
    read = [types.get(name, "") for name in instruction.operands]
    found.pool_reads += times * sum(hlo.largest(one) in pool for one in read)
    moved = sum(hlo.size(one) for one in (*read, instruction.type) if hlo.largest(one) not in pool)
  else:
    moved = hlo.traffic(instruction, types, program)
  found.bytes += times * moved
  if _is_copy(instruction, program):
    found.copy_bytes += times * moved
    found.pool_copies += times * (hlo.largest(instruction.type) in pool)
  estimate = _CYCLES.search(instruction.rest)
  if estimate:
    found.cycles += times * int(estimate[1])
  elif instruction.op == "custom-call":
    found.unestimated += times


def _is_copy(instruction: hlo.Instruction, program: hlo.Program) -> bool:
  """Returns True if an operation only moves numbers, or writes them another way."""
  if instruction.op != "fusion":
    return instruction.op in _MOVES
  return all(inner.op in _MOVES for inner in program.computations[instruction.called])
