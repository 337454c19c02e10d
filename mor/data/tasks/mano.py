"""Nested arithmetic modulo m: the value of an expression in prefix notation.

  "+" "*" "3" "5" "-" "1" "6" "="     (3 * 5) + (1 - 6), so 3 for m = 7

The operations are +, - and *, the leaves 0 .. m-1. The difficulty is the height of the expression: so many
operations wait for each other's result. One operand of each operation has the height that makes the
whole as high as was drawn, the other any height below. A product with 0 may need less than its height.

Source: the task Mano of Z. Allen-Zhu, "Physics of language models: part 4.1", 2025, whose difficulty is the number
of operations and whose m is 23.
"""

from mor import config as config_lib
from mor import fields
from mor.data.tasks import base

_SIZE, _HARDEST = 7, 3
_HIGHEST, _MORE = 8, 2  # trained height; heights beyond it that are asked
_OPERATORS = ("+", "-", "*")


class Mano(base.Task):
  """See the module docstring."""

  def __init__(self, config: config_lib.TaskConfig):
    base.refuse(config, "mano", "questions", "packed")
    size, hardest = config.size or _SIZE, config.hardest or _HARDEST
    fields.require(2 <= size <= 1000, f"data.task.size={size}", "use a modulus of 2 to 1000")
    fields.require(hardest <= _HIGHEST, f"data.task.hardest={hardest}",
                   f"use at most {_HIGHEST}: an expression of height h may have 2**(h + 1) symbols")
    self._modulus = size
    self.levels, self.beyond = range(1, hardest + 1), range(hardest + 1, hardest + 1 + _MORE)
    self.settings = {"size": size, "hardest": hardest}
    self.symbols = (*map(str, range(size)), *_OPERATORS, "=")

  def longest(self, levels: range) -> int:
    """Returns the number of symbols of a full tree of the greatest height, with its "="."""
    return 2**levels.stop

  def make(self, draws: base.Draws, levels: range) -> base.Problem:
    """Draws a height, then an expression of that height."""
    height = draws.integer(levels.start, levels.stop)
    symbols, value = self._draw(draws, height)
    return base.ask_last([*symbols, len(self.symbols) - 1], value, height)

  def _draw(self, draws: base.Draws, height: int) -> tuple[list[int], int]:
    """Draws an expression of this height; returns its symbols and its value."""
    if height == 0:
      leaf = draws.integer(0, self._modulus)
      return [leaf], leaf
    operator, swapped = divmod(draws.integer(0, 2 * len(_OPERATORS)), 2)
    parts = [self._draw(draws, height - 1), self._draw(draws, draws.integer(0, height))]
    (left, a), (right, b) = reversed(parts) if swapped else parts
    return [self._modulus + operator, *left, *right], (a + b, a - b, a * b)[operator] % self._modulus
