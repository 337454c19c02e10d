"""Collectives and memory traffic of a compiled program, loops multiplied out.

XLA itself counts the body of a loop once. Here each instruction counts as often as the
loops around it run, according to the compiler or to the condition of the loop. A loop of
unknown length counts once, and `Traffic.unknown_loops` is the number of such loops.

The size of a collective is that of the whole array: the output of an all-gather, the
input of a reduce-scatter, the array of any other collective.
"""

from collections.abc import Iterator
import dataclasses
import functools
import math
import re

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8, "c64": 8}
_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
                   "after-all", "opt-barrier", "partition-id", "iota"))
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count[^\d]*(\d+)')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of collective in a whole program: number of runs, and bytes of all its arrays."""

  count: float
  bytes: float


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Traffic of one device.

  Attributes:
    collectives: collectives by kind.
    shapes: `(kind, type, times)` of every collective instruction.
    bytes: bytes that fusions, and instructions outside of fusions, read and write.
    unknown_loops: number of loops of unknown length.
  """

  collectives: dict[str, Collective]
  shapes: tuple[tuple[str, str, float], ...]
  bytes: float
  unknown_loops: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  op: str
  rest: str

  @functools.cached_property
  def operands(self) -> list[str]:
    """Names of the operands, up to the closing parenthesis."""
    depth, end = 1, len(self.rest)
    for i, letter in enumerate(self.rest):
      depth += {"(": 1, ")": -1}.get(letter, 0)
      if not depth:
        end = i
        break
    return re.findall(r"%([\w.\-]+)", self.rest[:end])


def measure(text: str) -> Traffic:
  """Measures the traffic of a compiled program from its text (`jax.stages.Compiled.as_text`)."""
  computations, entry = _parse(text)
  totals: dict[str, list[float]] = {}
  shapes, moved, unknown = [], 0.0, 0
  for computation, times in _runs(computations, entry):
    types = {i.name: i.type for i in computation}
    for instruction in computation:
      kind = _kind(instruction.op)
      if kind:
        sizes = [_largest(types.get(name, "")) for name in instruction.operands] + [_largest(instruction.type)]
        total = totals.setdefault(kind, [0.0, 0.0])
        total[0] += times
        total[1] += times * max(sizes)
        shapes.append((kind, instruction.type, times))
      if instruction.op not in _FREE and not instruction.op.endswith("-done"):
        moved += times * _traffic(instruction, types, computations)
      unknown += instruction.op == "while" and not _trips(instruction, computations)
  return Traffic({kind: Collective(*total) for kind, total in totals.items()}, tuple(shapes), moved, unknown)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  """Parses the instructions by computation, and the name of the first computation."""
  computations: dict[str, list[_Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header and " = " not in line.split("(")[0]:
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(_Instruction(*match.groups()))
  if not entry:
    raise ValueError("no ENTRY in the text of the program; give that of a compiled one")
  return computations, entry


def _runs(computations, name: str, times: float = 1.0) -> Iterator[tuple[list[_Instruction], float]]:
  """Yields each computation and its number of runs; a fusion belongs to the instruction that calls it."""
  yield computations[name], times
  for instruction in computations[name]:
    if instruction.op == "fusion" or _kind(instruction.op):
      continue
    trips = _trips(instruction, computations) if instruction.op == "while" else None
    called = _CALLED.findall(instruction.rest)
    if instruction.op == "conditional":  # one branch runs; take the last one, which has the largest width
      called += re.findall(r"%?([\w.\-]+)", "".join(_BRANCHES.findall(instruction.rest)))[-1:]
    elif instruction.op not in ("while", "call", "async-start"):
      continue
    for callee in called:
      yield from _runs(computations, callee, times * (trips or 1))


def _trips(loop: _Instruction, computations) -> int | None:
  """Returns the number of rounds of a loop, from a note of the compiler or a condition `counter < constant`."""
  noted = _TRIPS.search(loop.rest)
  if noted:
    return int(noted[1])
  condition = {i.name: i for i in computations[_CONDITION.search(loop.rest)[1]]}
  last = list(condition.values())[-1]
  if last.op != "compare" or "direction=LT" not in last.rest:
    return None
  bounds = [condition[name].rest for name in last.operands if name in condition and condition[name].op == "constant"]
  return int(bounds[0].split(")")[0]) if len(bounds) == 1 else None


def _kind(op: str) -> str | None:
  """Returns the kind of a collective; of a pair of start and done, only the start has one."""
  op = op.removesuffix("-start")
  return op if op in _COLLECTIVES else None


def _traffic(instruction: _Instruction, types: dict[str, str], computations) -> float:
  """Returns the bytes that an instruction reads and writes."""
  if instruction.op == "dynamic-slice":
    return 2 * size(instruction.type)
  if instruction.op == "dynamic-update-slice":
    return 2 * size(types.get(instruction.operands[1], ""))
  read = [size(types.get(name, "")) for name in instruction.operands]
  written = size(instruction.type)
  called = _CALLED.search(instruction.rest) if instruction.op == "fusion" else None
  if called:
    body = computations[called[1]]
    sliced = _sliced(body)
    read = [min(size, sliced.get(i, size)) for i, size in enumerate(read)]
    if body and body[-1].op == "dynamic-update-slice":  # in place
      inner = {i.name: i.type for i in body}
      written = size(inner.get(body[-1].operands[1], "")) if len(body[-1].operands) > 1 else written
  return sum(read) + written


def _sliced(body: list[_Instruction]) -> dict[int, float]:
  """Returns the bytes read of each parameter of a fusion that is only sliced."""
  read = {}
  for parameter in body:
    if parameter.op != "parameter":
      continue
    users = [i for i in body if parameter.name in i.operands]
    if users and all(u.op in ("dynamic-slice", "dynamic-update-slice", "gather") for u in users):
      read[int(parameter.rest.split(")")[0])] = sum(
          size(u.type) if u.op != "dynamic-update-slice" else 0 for u in users)
  return read


def size(kind: str) -> float:
  """Returns the bytes of the type of an array or of a tuple."""
  return sum(_arrays(kind))


def _largest(kind: str) -> float:
  return max(_arrays(kind), default=0.0)


def _arrays(kind: str) -> list[float]:
  return [_BYTES.get(name, 4) * math.prod(int(n) for n in shape.split(",") if n)
          for name, shape in _ARRAY.findall(kind)]
