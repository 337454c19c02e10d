"""Composition of permutations: after each one, which permutation are all so far together?

A problem is a sequence of permutations of n elements. Behind the k-th the answer is the first
applied first, the k-th last; k is the difficulty. One after the other that takes k compositions, and no
constant number of layers does it for every k if n is 5, for the group is not solvable (unless TC0 = NC1).

  "10234" "20134" ...     element j goes where digit j says

Source: the word problem of S5 in W. Merrill, J. Petty, A. Sabharwal, "The illusion of state in state-space
models", ICML 2024.
"""

import itertools

import numpy as np

from mor import config as config_lib
from mor import fields
from mor.data.tasks import base

_SIZE, _HARDEST = 5, 8
_SIZES = (3, 4, 5)


class S5(base.Task):
  """See the module docstring."""

  def __init__(self, config: config_lib.TaskConfig):
    base.refuse(config, "s5", "questions", "packed")
    size, hardest = config.size or _SIZE, config.hardest or _HARDEST
    fields.require(size in _SIZES, f"data.task.size={size}", "use 3, 4 or 5 elements, of 6, 24 or 120 permutations")
    self.levels, self.beyond = range(1, hardest + 1), range(hardest + 1, 2 * hardest + 1)
    self.settings = {"size": size, "hardest": hardest}
    all_ = list(itertools.permutations(range(size)))
    self.symbols = tuple("".join(map(str, one)) for one in all_)
    index = {one: i for i, one in enumerate(all_)}
    self._then = np.array([[index[tuple(after[j] for j in first)] for after in all_] for first in all_], np.int32)

  def longest(self, levels: range) -> int:
    """Returns the number of permutations, which all problems share."""
    return levels.stop - 1

  def make(self, draws: base.Draws, levels: range) -> base.Problem:
    """Draws each permutation from all."""
    tokens = draws.integers(0, len(self.symbols), levels.stop - 1)
    product = np.array(list(itertools.accumulate(tokens.tolist(), lambda first, after: self._then[first, after])))
    length = np.arange(1, levels.stop)
    due = length >= levels.start
    return base.Problem(tokens, np.where(due, product, 0).astype(np.int32), np.where(due, length, 0).astype(np.int32))
