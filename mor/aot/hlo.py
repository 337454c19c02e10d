"""The text of a compiled program: its collectives and memory traffic, loops multiplied out.

XLA itself counts the body of a loop once. Here each instruction counts as often as the
loops around it run, according to the compiler or to the condition of the loop. A loop of
unknown length counts once, and `Traffic.unknown_loops` is the number of such loops.
`executed.py` counts operations of the same text.

The size of a collective is that of the whole array: the output of an all-gather, the
input of a reduce-scatter, the array of any other collective.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import math
import re

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8, "c64": 8}
_FREE = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
                   "after-all", "opt-barrier", "partition-id", "replica-id", "iota", "async-start", "async-update",
                   "add-dependency"))
_MARKS = frozenset(("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked"))
_TARGET = re.compile(r'custom_call_target="([^"]*)"')  # those of _MARKS tell the TPU compiler something
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_VMEM = "S(1)"  # of a TPU, in the layout of an array
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_FALSE_TRUE = (re.compile(r"false_computation=%?([\w.\-]+)"), re.compile(r"true_computation=%?([\w.\-]+)"))
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
class Instruction:
  """One line of a program: `name = type op(rest`."""

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

  @property
  def called(self) -> str | None:
    """Name of the computation that a fusion, a call or the body of a loop runs."""
    found = _CALLED.search(self.rest)
    return found and found[1]

  @property
  def branches(self) -> list[str]:
    """Names of a conditional's computations; of two, the first one runs where the predicate is False."""
    listed = _BRANCHES.search(self.rest)
    if listed:
      return re.findall(r"%?([\w.\-]+)", listed[1])
    return [pattern.search(self.rest)[1] for pattern in _FALSE_TRUE]

  @property
  def condition(self) -> str:
    """Name of a loop's condition."""
    return _CONDITION.search(self.rest)[1]


@dataclasses.dataclass(frozen=True)
class Program:
  """Instructions by computation, and the name of the computation that runs first."""

  computations: dict[str, list[Instruction]]
  entry: str

  def find_trips(self, loop: Instruction) -> int | None:
    """Returns the number of rounds of a loop, from a note of the compiler or a condition `counter < constant`."""
    noted = _TRIPS.search(loop.rest)
    if noted:
      return int(noted[1])
    condition = {i.name: i for i in self.computations[loop.condition]}
    last = list(condition.values())[-1]
    if last.op != "compare" or "direction=LT" not in last.rest:
      return None
    bounds = [condition[name].rest for name in last.operands if name in condition and condition[name].op == "constant"]
    return int(bounds[0].split(")")[0]) if len(bounds) == 1 else None


def parse(text: str) -> Program:
  """Parses the text of a compiled program (`jax.stages.Compiled.as_text`).

  Raises:
    ValueError: the text is no program.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header and " = " not in line.split("(")[0]:
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(Instruction(*match.groups()))
  if not entry:
    raise ValueError("no ENTRY in the text of the program; give that of a compiled one")
  return Program(computations, entry)


def runs(program: Program, name: str, times: float = 1.0, *, turns: Callable[[Instruction], float] = lambda loop: 1,
         choose: Callable[[list[str]], str] = lambda branches: branches[-1]) -> Iterator[tuple[list[Instruction], float]]:
  """Yields each computation below one and its number of runs; a fusion belongs to the instruction that calls it.

  Args:
    program: the program.
    name: the computation to begin with.
    times: its number of runs.
    turns: rounds of a loop whose length is unknown.
    choose: the branch of a conditional that runs; by default the last one, which has the largest width.
  """
  yield program.computations[name], times
  for instruction in program.computations[name]:
    inner, often = None, times
    if instruction.op == "while":
      inner, trips = instruction.called, program.find_trips(instruction)
      if trips is None:
        trips = turns(instruction)
        yield program.computations[instruction.condition], times * (trips + 1)
      often = times * trips
    elif instruction.op == "conditional":
      inner = choose(instruction.branches)
    elif instruction.op in ("call", "async-start") and not _kind(instruction.op):
      inner = instruction.called
    if inner is not None:
      yield from runs(program, inner, often, turns=turns, choose=choose)


def measure(text: str) -> Traffic:
  """Measures the traffic of a compiled program from its text (`jax.stages.Compiled.as_text`)."""
  program = parse(text)
  totals: dict[str, list[float]] = {}
  shapes, moved, unknown = [], 0.0, 0
  for computation, times in runs(program, program.entry):
    types = {i.name: i.type for i in computation}
    for instruction in computation:
      kind = _kind(instruction.op)
      if kind:
        sizes = [largest(types.get(name, "")) for name in instruction.operands] + [largest(instruction.type)]
        total = totals.setdefault(kind, [0.0, 0.0])
        total[0] += times
        total[1] += times * max(sizes)
        shapes.append((kind, instruction.type, times))
      moved += times * traffic(instruction, types, program)
      unknown += instruction.op == "while" and program.find_trips(instruction) is None
  return Traffic({kind: Collective(*total) for kind, total in totals.items()}, tuple(shapes), moved, unknown)


def is_free(instruction: Instruction) -> bool:
  """Returns True for an instruction that only names, groups or waits."""
  if instruction.op == "custom-call":
    target = _TARGET.search(instruction.rest)
    return bool(target) and target[1] in _MARKS
  return instruction.op in _FREE or instruction.op.endswith("-done")


def _kind(op: str) -> str | None:
  """Returns the kind of a collective; of a pair of start and done, only the start has one."""
  op = op.removesuffix("-start")
  return op if op in _COLLECTIVES else None


def traffic(instruction: Instruction, types: dict[str, str], program: Program) -> float:
  """Returns the bytes of HBM that an instruction reads and writes; `types` are those of its computation."""
  op, given = instruction.op, [types.get(name, "") for name in instruction.operands]
  if is_free(instruction):
    return 0.0
  if op in ("dynamic-slice", "gather", "slice"):
    return size(instruction.type) + min(size(instruction.type), size(given[0]))
  if op in ("dynamic-update-slice", "scatter"):
    return 2 * size(given[1 if op == "dynamic-update-slice" else -1])
  read, written = [size(one) for one in given], size(instruction.type)
  if op.endswith("-start") and not _kind(op):  # its type holds its operands, too, and a slice reads a part of them
    part = sum(_arrays(instruction.type)) - sum(sum(_arrays(one)) for one in given)
    return min(sum(read), part) + max(written - sum(read), 0)
  if op == "fusion":
    body = program.computations[instruction.called]
    sliced = _sliced(body)
    read = [min(size, sliced.get(i, size)) for i, size in enumerate(read)]
    written = min(written, _updated(body, written))
  return sum(read) + written


def _updated(body: list[Instruction], written: float) -> float:
  """Returns the bytes that a fusion writes, of which an update in place is only a part."""
  root = body[-1] if body else None
  inner = {i.name: i for i in body}
  while root and root.op == "bitcast" and root.operands and root.operands[0] in inner:
    root = inner[root.operands[0]]
  if root and root.op in ("dynamic-update-slice", "scatter") and len(root.operands) > 1:
    update = root.operands[1 if root.op == "dynamic-update-slice" else -1]
    return size(inner[update].type) if update in inner else written
  return written


def _sliced(body: list[Instruction]) -> dict[int, float]:
  """Returns the bytes read of each parameter of a fusion that is only sliced."""
  read = {}
  for parameter in body:
    if parameter.op != "parameter":
      continue
    users = [i for i in body if parameter.name in i.operands]
    if users and all(u.op in ("dynamic-slice", "slice", "gather", "dynamic-update-slice", "scatter")
                     and u.operands[0] == parameter.name for u in users):
      read[int(parameter.rest.split(")")[0])] = sum(
          size(u.type) if u.op in ("dynamic-slice", "slice", "gather") else 0 for u in users)
  return read


def size(kind: str) -> float:
  """Returns the bytes in HBM of the type of an array or of a tuple."""
  return sum(_arrays(kind, vmem=False))


def largest(kind: str) -> float:
  """Returns the bytes of the largest array of a type, wherever it lies."""
  return max(_arrays(kind), default=0.0)


def _arrays(kind: str, vmem: bool = True) -> list[float]:
  return [_BYTES.get(name, 4) * math.prod(int(n) for n in shape.split(",") if n)
          for name, shape, layout in _ARRAY.findall(kind) if vmem or _VMEM not in layout]
