"""`--mode=calibrate`: fits the threshold of a run's exits on a text, and stores it with the run.

  text -> rows -> confidence and agreement of each exit (`exits/pairs.py`) -> method -> exits.json

The text is the held-out part of the run's data, or a file. Text that the model was
trained on would make its exits look better than they are.
"""

from collections.abc import Iterator, Mapping
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from mor import config as config_lib
from mor import run as run_lib
from mor.data import lines as lines_lib
from mor.exits import calibration
from mor.exits import pairs
from mor.exits import policy as exits_lib
from mor.exits import stored as stored_lib
from mor.serve import model as model_lib

METHOD, TOKENS = "learn_then_test", 65536  # where the flags say nothing
TARGETS = {"learn_then_test": ("risk", "delta"), "beta_mixture": ("agreement", "precision")}  # flag, its argument
_BATCH = 4  # rows of a pass


def run(workdir: str | os.PathLike, exits: Mapping[str, Any], settings: Mapping[str, Any]) -> stored_lib.StoredExits:
  """Calibrates the exits of a run; writes and returns what is stored.

  Args:
    workdir: run directory.
    exits: fields of `policy.Exits`; without "after" the exits are those that the run was trained with.
    settings: "method", "risk" or "agreement", "text" (a file), "tokens" and
      "accept_new_data", each optional.

  Raises:
    ValueError: a setting is wrong, or the text is too short; nothing is written then.
    OSError: a file cannot be read or written.
  """
  method, options = choose_method(settings)
  if exits.get("kv", "exact") != "exact":
    raise ValueError(f"--exit_kv={exits['kv']} changes no pair of a given text; leave it out, and give it to "
                     "--mode=generate")
  model, config = model_lib.open_run(workdir)
  after = exits.get("after") or config.exit.layers
  if not after:
    raise ValueError("the run was trained without exits; give --exit_after=LAYERS")
  made = exits_lib.Exits(**{**exits, "after": tuple(after)})
  rows, name, digest = _read_rows(workdir, model, config, settings)
  found = pairs.collect(model.config, model.variables, made, rows, model.vocab_size)
  confidence_M, agreed_M = pairs.reduce_to_tokens(*found)
  threshold = calibration.METHODS[method](confidence_M, agreed_M, **options)
  leaves_M = confidence_M > threshold
  stored = stored_lib.StoredExits(
      after=made.after, measure=made.measure, first=made.first, method=method, options=options, threshold=threshold,
      num_pairs=len(agreed_M), exit_rate=float(np.mean(leaves_M)) if len(agreed_M) else 0.0,
      agreement=float(np.mean(agreed_M[leaves_M])) if leaves_M.any() else None, text=name, text_sha256=digest,
      step=model.step)
  stored_lib.write(workdir, stored)
  return stored


def choose_method(settings: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
  """Returns the method and its options.

  Raises:
    ValueError: a target of another method, or outside (0, 1).
  """
  method, options = settings.get("method", METHOD), {}
  for owner, (flag, argument) in TARGETS.items():
    if flag in settings:
      if owner != method:
        raise ValueError(f"--calibration_{flag} with --calibration_method={method}; give --calibration_method={owner}, "
                         "or leave it out")
      options[argument] = settings[flag]
  calibration.Calibrator(method, **options)  # checks the values before the run is read
  return method, options


def _read_rows(workdir: str | os.PathLike, model: model_lib.Model, config: config_lib.Config,
               settings: Mapping[str, Any]) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], str, str]:
  """Returns batches of tokens and segments, the name of the text, and its hash."""
  path, num_tokens = settings.get("text"), settings.get("tokens", TOKENS)
  if num_tokens < 1:
    raise ValueError(f"--calibration_tokens={num_tokens}; use a count >= 1")
  num_rows = -(-num_tokens // model.context)
  if path is None:
    corpus = run_lib.load_corpus(workdir, config, settings.get("accept_new_data", False),
                                 "or give another text with --calibration_text=FILE")
    batches = ((batch["tokens_BT"], batch["segment_BT"]) for batch in corpus.validation.in_order(_BATCH, num_rows))
    return batches, "held-out", _hash(corpus.validation_text())
  text = _read_text(path)
  if not text.strip():
    raise ValueError(f"--calibration_text={path}: no text in it")
  ids = np.asarray(model.request(text).prompt, np.int32)[:num_rows * model.context]
  return _cut(ids, model.context), str(path), _hash(text)


def _read_text(path: str) -> str:
  """Returns the text of a file as a source of training has it: without a byte order mark, with its line ends."""
  try:
    return lines_lib.decode(lines_lib.without_mark(pathlib.Path(path).read_bytes()))
  except ValueError as error:
    raise ValueError(f"--calibration_text={path}: {error}") from error


def _cut(ids: np.ndarray, context: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields batches of rows of one text, padded at its end."""
  size = _BATCH * context
  for start in range(0, len(ids), size):
    tokens = np.zeros(size, np.int32)
    part = ids[start:start + size]
    tokens[:len(part)] = part
    yield tokens.reshape(_BATCH, context), (np.arange(size) < len(part)).astype(np.int32).reshape(_BATCH, context)


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode("utf-8")).hexdigest()
