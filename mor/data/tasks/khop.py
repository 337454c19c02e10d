"""k hops along a map that every row draws anew.

A map is one cycle through all n entities. Its n facts come in random order, then the questions:
which entity lies k hops behind a? Each hop looks up one fact, and which one is known only after
the hop before, so k hops need k lookups one after the other, and k is the difficulty.

  packed      "c>a" "a>b" ... "a^3"      a symbol for each fact, and for each question (a, k)
  unpacked    "c" "a" "a" "b" ... "a" "^" "^" "^"

In an unpacked question every "^" asks for one hop more, and may read the answer of the "^" before it.
Its symbols do not depend on k, so k may exceed the trained range; a packed question of an
untrained k has an untrained symbol. Packed problems are learnt in minutes by a small model; unpacked
ones need a head that copies first.

Source: the task Depo of Z. Allen-Zhu, "Physics of language models: part 4.1", 2025, in which k is mixed as here.
"""

import string

import numpy as np

from mor import config as config_lib
from mor import fields
from mor.data.tasks import base

_SIZE, _HARDEST, _QUESTIONS = 12, 4, 8
_MOST = 128  # entities: n * n facts are symbols


class Khop(base.Task):
  """See the module docstring."""

  def __init__(self, config: config_lib.TaskConfig):
    size, hardest = config.size or _SIZE, config.hardest or _HARDEST
    fields.require(3 <= size <= _MOST, f"data.task.size={size}", f"use 3 to {_MOST} entities")
    fields.require(hardest < size, f"data.task.hardest={hardest} hops on a cycle of data.task.size={size}",
                   f"use at most {size - 1}: {size} hops lead back to the start")
    self._size, self._questions, self._packed = size, config.questions or _QUESTIONS, config.packed
    self.levels = range(1, hardest + 1)
    self.beyond = range(0) if config.packed else range(hardest + 1, min(2 * hardest, size - 1) + 1)
    self.settings = {"size": size, "hardest": hardest, "questions": self._questions, "packed": config.packed}
    names = string.ascii_lowercase[:size] if size <= 26 else [f"e{i}" for i in range(size)]
    others = [f"{a}>{b}" for a in names for b in names] if config.packed else ["^"]
    if config.packed:
      others += [f"{a}^{k}" for a in names for k in self.levels]
    self.symbols = (*names, *others)

  def longest(self, levels: range) -> int:
    """Returns the number of symbols, if every question is one of the largest k."""
    return self._size + self._questions if self._packed else 2 * self._size + self._questions * levels.stop

  def make(self, draws: base.Draws, levels: range) -> base.Problem:
    """Draws a cycle, the order of its facts, and the questions."""
    n = self._size
    cycle, head = draws.permutation(n), draws.permutation(n)
    place = np.argsort(cycle)
    tail = cycle[(place[head] + 1) % n]
    asked = draws.integers(0, n, self._questions)
    hops = draws.integers(levels.start, levels.stop, self._questions)
    if self._packed:
      tokens = np.concatenate([n + head * n + tail, n + n * n + asked * len(self.levels) + hops - 1])
      target, difficulty = np.zeros_like(tokens), np.zeros_like(tokens)
      target[n:], difficulty[n:] = cycle[(place[asked] + hops) % n], hops
      return base.Problem(tokens, target, difficulty)
    facts = np.stack([head, tail], 1).reshape(-1)
    count = np.concatenate([np.arange(k + 1) for k in hops])  # hops asked so far, at each symbol of the questions
    start = np.repeat(asked, hops + 1)
    nothing, due = np.zeros_like(facts), count >= levels.start
    return base.Problem(
        np.concatenate([facts, np.where(count > 0, n, start)]).astype(np.int32),
        np.concatenate([nothing, np.where(due, cycle[(place[start] + count) % n], 0)]).astype(np.int32),
        np.concatenate([nothing, np.where(due, count, 0)]).astype(np.int32))
