"""The sum of many numbers, digit by digit.

  "2" "1" "+" "9" "3" "=" "1" "5" end     12 + 39 = 51, the least significant digit first

The difficulty is the number of operands. Every digit of the sum is an answer, and so is the end of a problem
behind its last digit, because a sum has no leading zeros. Operands have a fixed number of digits.
A digit of the sum adds one digit of each operand and a carry, which depends on all digits before it.
"""

import numpy as np

from mor import config as config_lib
from mor import fields
from mor.data.tasks import base

_SIZE, _HARDEST = 2, 4
_PLUS, _EQUALS = 10, 11


class Addition(base.Task):
  """See the module docstring."""

  def __init__(self, config: config_lib.TaskConfig):
    base.refuse(config, "addition", "questions", "packed")
    size, hardest = config.size or _SIZE, config.hardest or _HARDEST
    fields.require(size <= 9, f"data.task.size={size}", "use at most 9 digits")
    fields.require(hardest >= 2, f"data.task.hardest={hardest}", "use at least 2 operands")
    self._digits = size
    self.levels, self.beyond = range(2, hardest + 1), range(hardest + 1, 2 * hardest + 1)
    self.settings = {"size": size, "hardest": hardest}
    self.symbols = (*map(str, range(10)), "+", "=")

  def longest(self, levels: range) -> int:
    """Returns the number of symbols if all operands are as large as they may be."""
    most = levels.stop - 1
    return most * (self._digits + 1) + len(str(most * (10**self._digits - 1)))

  def make(self, draws: base.Draws, levels: range) -> base.Problem:
    """Draws how many operands there are, then each of them."""
    num = draws.integer(levels.start, levels.stop)
    operands = draws.integers(0, 10**self._digits, num).tolist()
    total = [int(digit) for digit in reversed(str(sum(operands)))]
    question = []
    for operand in operands:
      question += [*(int(digit) for digit in reversed(f"{operand:0{self._digits}}")), _PLUS]
    question[-1] = _EQUALS
    tokens = np.array([*question, *total], np.int32)
    target, difficulty = np.zeros_like(tokens), np.zeros_like(tokens)
    first = len(question) - 1  # the "=", behind which the first digit is due
    target[first:], difficulty[first:] = [*total, self.opening], num
    return base.Problem(tokens, target, difficulty)
