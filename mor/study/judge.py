"""All held-out figures of a trained model, for comparisons between models.

  val     validation split of the training corpus
  beyond  of a task: questions that are harder than any of training
  texts   other files, packed into rows with the tokenizer of the corpus
  blimp   accuracy on minimal pairs, causal routing

`missing` lists the files that do not exist; they are not measured.
"""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

from jax.sharding import Mesh
import numpy as np

from mor import config as config_lib
from mor.data import blimp
from mor.data import readers
from mor.data import rows as rows_lib
from mor.data import text
from mor.data.tasks import corpus as task_corpus
from mor.study import plan as study_plan
from mor.train import evaluate as evaluate_lib
from mor.train import minimal_pairs


class Judge:
  """The held-out sets of a study, tokenised once."""

  def __init__(self, study: study_plan.Study, data: config_lib.DataConfig, corpus: text.AnyCorpus,
               directory: pathlib.Path):
    """Reads the sets.

    Args:
      study: names and sizes of the sets.
      data: row length and batch size.
      corpus: tokenizer and validation rows.
      directory: directory for the tokenised texts.
    """
    self._study, self._data, self._corpus = study, data, corpus
    paths = {name: pathlib.Path(path).expanduser() for name, path in study.texts.items()}
    pairs = pathlib.Path(study.blimp).expanduser()
    asked = paths | ({"blimp": pairs} if study.blimp else {})
    self.missing = {name: str(path) for name, path in asked.items() if not path.is_file()}
    self._texts = {name: self._pack(path, directory / f"{name}.array_record")
                   for name, path in paths.items() if name not in self.missing}
    self._pairs = blimp.read(pairs, study.blimp_pairs) if study.blimp and "blimp" not in self.missing else []

  def make(self, config: config_lib.Config, mesh: Mesh) -> Callable[[dict, dict], dict[str, Any]]:
    """Makes `measure(params, balance) -> {set: metrics}`, compiled once for all states of a model."""
    tokenizer, batch_size = self._corpus.tokenizer, self._data.batch_size
    evaluate = evaluate_lib.make(config, mesh, tokenizer.num_bytes_V)
    log_prob = minimal_pairs.make(config, mesh, tokenizer.eos_id)

    def measure(params: dict, balance: dict) -> dict[str, Any]:
      found = {"val": evaluate(params, balance, self._corpus.validation.in_order(batch_size, self._study.final_rows))}
      if isinstance(self._corpus, task_corpus.TaskCorpus) and self._corpus.beyond is not None:
        found["beyond"] = evaluate(params, balance, self._corpus.beyond.in_order(batch_size, self._study.final_rows))
      for name, rows in self._texts.items():
        found[name] = evaluate(params, balance, rows.in_order(batch_size, self._study.text_rows))
      if self._pairs:
        score = functools.partial(log_prob, params, balance)
        found["blimp"] = {"accuracy": minimal_pairs.accuracy(self._pairs, tokenizer.encode, score),
                          "pairs": len(self._pairs)}
      return found

    return measure

  def _pack(self, path: pathlib.Path, target: pathlib.Path) -> rows_lib.PackedRows:
    tokenizer, dtype = self._corpus.tokenizer, np.uint32
    documents = tokenizer.encode_batch([text for text in readers.read(path, self._data.text_key) if text is not None])
    target.parent.mkdir(parents=True, exist_ok=True)
    rows_lib.write(target, documents, tokenizer.eos_id, self._data.seq_len, dtype)
    return rows_lib.PackedRows(target, eos_id=tokenizer.eos_id, seq_len=self._data.seq_len,
                         batch_size=self._data.batch_size, seed=0, dtype=dtype)
