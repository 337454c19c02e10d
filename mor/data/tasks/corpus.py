"""A task as the data of a run: the interface of `text.Corpus`, with nothing on disk."""

from collections.abc import Iterator
import dataclasses

from mor import config as config_lib
from mor.data import identity as identity_lib
from mor.data import tokenizer as tokenizer_lib
from mor.data.tasks import base
from mor.data.tasks import rows as rows_lib
from mor.data.tasks import table

_VERSION = 1  # raise it when the rows of the same settings change
NUM_HELD_OUT = 1024  # rows of the held-out streams, of which an evaluation reads `train.eval_rows`


@dataclasses.dataclass(frozen=True)
class TaskCorpus:
  """Rows ready for training and evaluation.

  Attributes:
    tokenizer: the symbols of the task.
    train: training rows; every one is new.
    validation: held-out rows, the same for every `data.shuffle_seed`, so models are compared on them.
    beyond: rows of greater difficulty than training has, as long as they need; None if the task has none.
    identity: the task and its settings.
  """

  tokenizer: tokenizer_lib.Tokenizer
  train: rows_lib.TaskRows
  validation: rows_lib.TaskRows
  beyond: rows_lib.TaskRows | None
  identity: identity_lib.Identity

  def validation_text(self) -> str:
    """Returns the held-out problems, one on each line."""
    return "".join(f"{self.tokenizer.decode(problem.tokens_T)}\n" for problem in self._held_out())

  def _held_out(self) -> Iterator[base.Problem]:
    for index in range(NUM_HELD_OUT):
      yield from self.validation.problems(index)


def load(config: config_lib.DataConfig, vocab_size: int,
         tokenizer: tokenizer_lib.Tokenizer | None = None) -> TaskCorpus:
  """Opens the task of a config.

  Args:
    config: `data.source`, the fields of the task, and the row length.
    vocab_size: vocabulary size of the model.
    tokenizer: the tokenizer of a run; None makes that of the task.

  Raises:
    ValueError: the fields do not suit the task, or the model or the row does not fit it.
  """
  task = table.make(config)
  if tokenizer is None:
    tokenizer = tokenizer_lib.load(config, None)
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(f"data.source={config.source!r} has {tokenizer.vocab_size} symbols, more than "
                     f"model.vocab_size={vocab_size}; set model.vocab_size={tokenizer.vocab_size} or more")
  train, validation = (_open(config, task, stream, task.levels, config.seq_len)
                       for stream in (base.TRAIN, base.HELD_OUT))
  beyond = None
  if task.beyond:
    needed = 1 + task.longest(task.beyond)
    beyond = _open(config, task, base.BEYOND, task.beyond, max(config.seq_len, needed))
  return TaskCorpus(tokenizer, train, validation, beyond, identify(config))


def identify(config: config_lib.DataConfig) -> identity_lib.Identity:
  """Returns the identity of a task: its name and everything that its rows depend on."""
  settings = {f"task.{name}": value for name, value in table.make(config).settings.items()}
  settings |= dict(source=config.source, version=_VERSION, shuffle_seed=config.shuffle_seed)
  return identity_lib.Identity(config.source, "", settings, (), ())


def _open(config: config_lib.DataConfig, task: base.Task, stream: int, levels: range,
          seq_len: int) -> rows_lib.TaskRows:
  seed = config.shuffle_seed if stream == base.TRAIN else 0
  return rows_lib.TaskRows(task, stream=stream, levels=levels, seed=seed, seq_len=seq_len,
                           batch_size=config.batch_size, num_rows=NUM_HELD_OUT)
