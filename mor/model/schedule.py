"""Sharing schemes as integer tables.

A scheme says, for every unrolled layer, which parameter set it uses. The first
`prelude` and the last `coda` unrolled layers own their parameters and see every
token; between them lie R steps of `depth` layers each, whose parameter sets are
rows of the shared stack. The model, the FLOP and memory calculators, conversion
and the engine all read these tables.

With b = inner layers / R, unrolled inner layer l uses stack row
  cycle, middle_cycle        l mod b       (the whole stack, R times)
  sequence, middle_sequence  l // R        (each layer R times in a row)
and step r is the inner layers r*b .. (r+1)*b - 1.

Source: MoR paper Table 5; raymin0223/mixture_of_recursions
model/sharing_strategy/llama.py.
"""

import dataclasses
import itertools

from mor import config as config_lib


@dataclasses.dataclass(frozen=True)
class LayerSchedule:
  """Which parameters every unrolled layer uses.

  Attributes:
    prelude: number of unshared layers before the recursion.
    coda: number of unshared layers after it.
    rows: for each recursion step, the stack row of each of its layers.
  """

  prelude: int
  coda: int
  rows: tuple[tuple[int, ...], ...]

  @property
  def num_steps(self) -> int:
    return len(self.rows)

  @property
  def depth(self) -> int:
    """Layers in one step, or in the longest one of a `cut` schedule."""
    return max(len(row) for row in self.rows)

  @property
  def num_stack_rows(self) -> int:
    """Parameter sets in the shared stack."""
    return 1 + max(max(row) for row in self.rows)

  @property
  def num_unrolled(self) -> int:
    return self.prelude + sum(len(row) for row in self.rows) + self.coda

  @property
  def num_unique(self) -> int:
    return self.prelude + self.num_stack_rows + self.coda

  @property
  def cyclic(self) -> bool:
    """True where every step runs the whole stack in order."""
    return all(row == tuple(range(self.depth)) for row in self.rows)

  def boundaries(self) -> tuple[int, ...]:
    """Returns the number of unrolled layers after each step but the last."""
    return tuple(self.prelude + n for n in itertools.accumulate(len(row) for row in self.rows[:-1]))

  def cut(self, after: tuple[int, ...]) -> "LayerSchedule":
    """Returns one step cut into several, the first of which ends after `after[0]` unrolled layers."""
    (row,), ends = self.rows, tuple(n - self.prelude for n in after)
    starts, ends = (0, *ends), (*ends, len(row))
    return dataclasses.replace(self, rows=tuple(row[i:j] for i, j in zip(starts, ends)))

  def unrolled(self) -> tuple[tuple[str, int], ...]:
    """Returns (group, index of the parameter set) of every unrolled layer; groups: prelude, stack, coda."""
    return (tuple(("prelude", i) for i in range(self.prelude))
            + tuple(("stack", i) for row in self.rows for i in row)
            + tuple(("coda", i) for i in range(self.coda)))


def _vanilla(inner: int, num_recursions: int):
  del num_recursions
  return (tuple(range(inner)),)


def _cycle(inner: int, num_recursions: int):
  return (tuple(range(inner // num_recursions)),) * num_recursions


def _sequence(inner: int, num_recursions: int):
  b = inner // num_recursions
  flat = [i // num_recursions for i in range(inner)]
  return tuple(tuple(flat[r * b:(r + 1) * b]) for r in range(num_recursions))


SCHEMES = {  # name -> (unshared layers at each end, rows of the inner layers)
    "vanilla": (0, _vanilla),
    "cycle": (0, _cycle),
    "sequence": (0, _sequence),
    "middle_cycle": (1, _cycle),
    "middle_sequence": (1, _sequence),
}


def make(config: config_lib.ModelConfig) -> LayerSchedule:
  """Returns the schedule of a validated model config."""
  edge, rows = SCHEMES[config.sharing]
  return LayerSchedule(edge, edge, rows(config.num_layers - 2 * edge, config.num_recursions))
