"""What a task is: problems that are made, never read, with the difficulty of each answer.

A *problem* is a short text of symbols and some questions about it. An *answer* is the target of
the position at which its question is complete. Its *difficulty* says how many results must be found
one after the other, so a model whose depth follows need spends depth by it.

  train       rows of stream 0, of the levels `Task.levels`
  held out    rows of stream 1, of the same levels
  beyond      rows of stream 2, of the levels `Task.beyond`, which no training row has

A row is a function of (seed, stream, index) alone, so a training row never comes twice and
the position in the data is one integer. The numbers are raw bits of Philox, whose values NumPy
promises for all versions, as it does not for its distributions.

The vocabulary: ids 0 .. n-1 are the symbols of the task, n is a word that is no symbol, which training
never has, and n + 1 opens every problem. A prompt is written as problems are printed: "a>b b>c c>a a^2".
"""

import abc
from collections.abc import Sequence
import dataclasses

import numpy as np
import tokenizers

from mor import config as config_lib
from mor import fields

TRAIN, HELD_OUT, BEYOND = range(3)
_UNKNOWN, _OPENING = "<unk>", "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Problem:
  """The symbols of a problem and its answers, position by position.

  Attributes:
    tokens_T: ids of the symbols.
    target_T: id of the answer that is due behind each position; 0 where none is.
    difficulty_T: difficulty of that answer, from 1; 0 where none is due.
  """

  tokens_T: np.ndarray
  target_T: np.ndarray
  difficulty_T: np.ndarray


class Draws:
  """The random numbers of one row.

  Args:
    seed: seed of the stream.
    stream: TRAIN, HELD_OUT or BEYOND.
    index: row of the stream.
  """

  def __init__(self, seed: int, stream: int, index: int):
    key, counter = np.array([seed, stream], np.uint64), np.array([0, 0, 0, index], np.uint64)
    self._bits = np.random.Philox(key=key, counter=counter)

  def integers(self, low: int, high: int, size: int) -> np.ndarray:
    """Draws integers of low .. high - 1; of 2**64 values, so no one is likelier by more than (high - low) / 2**64."""
    return (self._bits.random_raw(size) % np.uint64(high - low)).astype(np.int32) + low

  def integer(self, low: int, high: int) -> int:
    """Draws one of low .. high - 1."""
    return low + self._bits.random_raw() % (high - low)

  def permutation(self, num: int) -> np.ndarray:
    """Draws a permutation of range(num)."""
    return np.argsort(self._bits.random_raw(num)).astype(np.int32)


class Task(abc.ABC):
  """A kind of problem. A new task is one file and one line in `table.py`.

  Attributes:
    symbols: the vocabulary, in the order of the ids.
    levels: difficulties of training.
    beyond: harder ones, for which every symbol is trained; empty where no such problem exists.
    settings: what the rows depend on besides seed and length, by name of the field of `data`.
  """

  symbols: tuple[str, ...]
  levels: range
  beyond: range
  settings: dict[str, int | bool]

  @abc.abstractmethod
  def __init__(self, config: config_lib.TaskConfig):
    """Reads the fields; raises ValueError if one does not suit the task."""

  @abc.abstractmethod
  def longest(self, levels: range) -> int:
    """Returns the number of symbols of the longest problem of these levels."""

  @abc.abstractmethod
  def make(self, draws: Draws, levels: range) -> Problem:
    """Makes a problem whose answers have these levels."""

  @property
  def opening(self) -> int:
    """Id of the token that opens every problem, behind the symbols and the unknown one."""
    return len(self.symbols) + 1

  @property
  def num_levels(self) -> int:
    """One more than the largest difficulty of any answer."""
    return max(self.levels.stop, self.beyond.stop)


def ask_last(tokens: Sequence[int], answer: int, difficulty: int) -> Problem:
  """Returns a problem of which the only answer is due behind its last symbol."""
  tokens_T = np.array(tokens, np.int32)
  target_T, difficulty_T = np.zeros_like(tokens_T), np.zeros_like(tokens_T)
  target_T[-1], difficulty_T[-1] = answer, difficulty
  return Problem(tokens_T, target_T, difficulty_T)


def refuse(config: config_lib.TaskConfig, task: str, *names: str) -> None:
  """Raises ValueError if a field that a task does not have is set."""
  for name in names:
    value, default = getattr(config, name), getattr(config_lib.TaskConfig(), name)
    fields.require(value == default, f"data.task.{name}={value} with data.source=task:{task}, which has no such choice",
                   f"leave it at {default}")


def serialize(symbols: Sequence[str]) -> str:
  """Returns a tokenizer whose words are symbols, as a `tokenizers` .json.

  The opening token is an added one alone, so text that spells it never becomes it.

  Args:
    symbols: words without spaces, in the order of their ids.
  """
  words = {symbol: index for index, symbol in enumerate((*symbols, _UNKNOWN))}
  assert len(words) == len(symbols) + 1, "a symbol occurs twice"
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=_UNKNOWN))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens([_UNKNOWN, _OPENING])
  return made.to_str()
