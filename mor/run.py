"""The record of a run: what its workdir needs to be used anywhere, and its history.

  run.json              what `Record` says
  run/tokenizer.json    the tokenizer; absent where it is "bytes"

Both are written before the first step. From then on the tokenizer comes from the workdir,
wherever that was moved to, and neither the texts nor the cache is needed to use the
model. A start that names another tokenizer is refused. One on other texts needs the
caller's consent, and the record keeps both. A run of an older version has no record: its
config says where tokenizer and texts are, and its next start writes the record.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
import typing
from typing import Any

from etils import epath
import jax

from mor import checkpoint
from mor import config as config_lib
from mor import distributed
from mor import json_file
from mor import paths
from mor.data import identity as identity_lib
from mor.data import text
from mor.data import tokenizer as tokenizer_lib
from mor.data.tasks import table as task_table

NAME, TOKENIZER = "run.json", "run/tokenizer.json"
# Fields that the record judges in place of the config: by content.
_JUDGED = frozenset(("data.source", "data.validation_source", "data.tokenizer"))
_CHOSEN = frozenset(("data.text_key", "data.max_bytes", "data.validation_fraction", "data.task.size", "data.task.hardest",
                     "data.task.questions", "data.task.packed"))  # they belong to the texts
_PACKAGES = ("mor", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tokenizers", "numpy")


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
  """The tokenizer of a run.

  Attributes:
    name: `data.tokenizer` of the first start, or the task that brought it.
    identity: `Tokenizer.identity`.
    eos_id: token that opens a document.
    vocab_size: one more than the largest id.
  """

  name: str
  identity: str
  eos_id: int
  vocab_size: int


@dataclasses.dataclass(frozen=True)
class DataRecord:
  """The texts that a run was trained on from a step on."""

  since_step: int
  identity: identity_lib.Identity


@dataclasses.dataclass(frozen=True)
class Record:
  """The content of run.json.

  Attributes:
    tokenizer: see `TokenizerRecord`.
    data: oldest first; empty for a converted model that was not trained yet.
    sessions: one for each start, oldest first: start (UTC), command, commit, versions,
      device, first_step, last_step (of the last save) and wall_seconds.
  """

  tokenizer: TokenizerRecord
  data: tuple[DataRecord, ...] = ()
  sessions: tuple[dict[str, Any], ...] = ()


def read(workdir: str | os.PathLike) -> Record | None:
  """Returns the record of a workdir; None if it has none.

  Raises:
    ValueError: the file is damaged.
  """
  path = paths.directory(workdir) / NAME
  if not path.is_file():
    return None
  with json_file.naming_damage(path, "restore it from a copy, or remove it: the next start writes another, from the "
                               "config and the texts"):
    values = json.loads(path.read_text(encoding="utf-8"))
    data = tuple(DataRecord(one["since_step"], identity_lib.from_dict(one["identity"])) for one in values["data"])
    record = Record(TokenizerRecord(**values["tokenizer"]), data, tuple(dict(one) for one in values["sessions"]))
    _check_types(record)
    return record


def free_fields(workdir: str | os.PathLike, accept_new_data: bool = False) -> frozenset[str]:
  """Returns the fields in which a config may differ from the checkpoint, because the record judges them."""
  if read(workdir) is None:
    return frozenset()
  return _JUDGED | _CHOSEN if accept_new_data else _JUDGED


def load_tokenizer(workdir: str | os.PathLike, config: config_lib.DataConfig) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer of a run, without its corpus; of an older run, that of its config.

  Raises:
    ValueError: the record or the tokenizer in it is damaged.
    OSError: a file cannot be read.
  """
  record = read(workdir)
  return text.load_tokenizer(config) if record is None else _read_tokenizer(workdir, record.tokenizer)


def load_corpus(workdir: str | os.PathLike, config: config_lib.Config, accept_new_data: bool = False,
                instead: str = "or give their new place with --config.data.source") -> text.AnyCorpus:
  """Opens the corpus of a config with the tokenizer of the run, if these are the texts of the run.

  Args:
    workdir: run directory; without a checkpoint, anything fits.
    config: the experiment.
    accept_new_data: whether other texts are welcome.
    instead: what a user can do without the texts, for the message.

  Raises:
    FileNotFoundError: the texts are gone.
    ValueError: tokenizer or texts are not those of the run, or `text.load` refuses.
    OSError: the cache cannot be written.
  """
  record = _read_trained(workdir)
  if record is None:
    return text.load(config.data, config.model.vocab_size)
  tokenizer = _read_tokenizer(workdir, record.tokenizer)
  _check_tokenizer(workdir, config.data, record.tokenizer, tokenizer)
  try:
    found = text.identify(config.data)
  except FileNotFoundError as error:
    raise FileNotFoundError(
        f"{str(error).partition(';')[0]}, which the run of {workdir} reads; put the texts back, {instead}") from error
  old = record.data[-1].identity if record.data else found
  if old.digest != found.digest and not accept_new_data:
    raise ValueError(
        f"data.source={config.data.source!r} is not the text that {workdir} was trained on: "
        f"{identity_lib.describe_change(old, found)} (identity {found.digest[:12]}, there {old.digest[:12]}); put the "
        f"texts back as they were, or go on with these by --accept_new_data, {instead}")
  return text.load(config.data, config.model.vocab_size, tokenizer)


def check_tokenizer(workdir: str | os.PathLike, config: config_lib.DataConfig) -> None:
  """Raises ValueError if a config names another tokenizer than that of the run."""
  record = read(workdir)
  if record is not None:
    _check_tokenizer(workdir, config, record.tokenizer, _read_tokenizer(workdir, record.tokenizer))


def check_teacher(teacher: str | os.PathLike, tokenizer: tokenizer_lib.Tokenizer) -> None:
  """Raises ValueError if the run of a teacher is known to read text with another tokenizer."""
  record = read(teacher)
  if record is not None and not _is_same(_read_tokenizer(teacher, record.tokenizer), tokenizer):
    raise ValueError(f"distill.teacher={str(teacher)!r} was trained with data.tokenizer={record.tokenizer.name!r} (identity "
                     f"{record.tokenizer.identity[:12]}), this run reads text with identity {tokenizer.identity[:12]}; "
                     "use a teacher of the same tokenizer")


def keep_tokenizer(workdir: str | os.PathLike, name: str, tokenizer: tokenizer_lib.Tokenizer) -> None:
  """Writes the record of a run that was not trained yet.

  Args:
    workdir: run directory, which exists.
    name: `data.tokenizer` of its config.
    tokenizer: the tokenizer of its model.

  Raises:
    OSError: a file cannot be written.
  """
  _write(workdir, Record(_describe(name, tokenizer)), tokenizer)


class Session:
  """One start of a run, from its first step to its last save. Use as a context manager.

  Attributes:
    number: counts the starts of the run, from 1.
    new_data: whether the run has other texts from this session on.
  """

  def __init__(self, workdir: str | os.PathLike, config: config_lib.Config, corpus: text.AnyCorpus, first_step: int):
    """Writes the record; process 0 does, for all processes of a run.

    Args:
      workdir: run directory, which exists.
      config: the experiment.
      corpus: what `load_corpus` returned.
      first_step: finished steps of the state that the run starts from.

    Raises:
      OSError: a file cannot be written.
    """
    self.number, self.new_data, self._session = 1, False, None
    if not distributed.is_main():
      return
    self._workdir, self._tokenizer, self._started = workdir, corpus.tokenizer, time.monotonic()
    old = read(workdir)
    before = _read_trained(workdir) or Record(
        _describe(tokenizer_lib.name_of(config.data), corpus.tokenizer), sessions=old.sessions if old else ())
    data = before.data
    self.number = len(before.sessions) + 1
    self.new_data = bool(data) and data[-1].identity.digest != corpus.identity.digest
    if not data or self.new_data:
      data = *data, DataRecord(first_step, corpus.identity)
    self._record, self._session = dataclasses.replace(before, data=data), _describe_session(first_step)
    self.save(first_step)

  def __enter__(self) -> "Session":
    return self

  def __exit__(self, kind, *unused) -> None:
    if kind is None and self._session is not None:
      self.save(self._session["last_step"])

  def save(self, step: int) -> None:
    """Writes that `step` is saved."""
    if self._session is None:
      return
    self._session |= dict(last_step=step, wall_seconds=round(time.monotonic() - self._started, 3))
    record = dataclasses.replace(self._record, sessions=(*self._record.sessions, self._session))
    _write(self._workdir, record, self._tokenizer)


@functools.cache
def commit() -> str | None:
  """Returns the commit of this code, marked if files differ from it; None outside of git."""
  root = pathlib.Path(__file__).parents[1]

  def git(*args: str) -> str:
    done = subprocess.run(["git", "-C", root, *args], check=True, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()

  try:
    if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
      return None  # an installed package inside another project
    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "mor", "configs") else "")
  except (OSError, subprocess.SubprocessError):
    return None


def versions() -> dict[str, str | None]:
  """Returns the versions of Python and of the packages that decide a result."""
  def find(name: str) -> str | None:
    try:
      return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # e.g. this package, run from its sources
      return None

  return {"python": platform.python_version()} | {name: find(name) for name in _PACKAGES}


def _check_types(value: Any) -> None:
  """Raises TypeError if a field of a dataclass, or of a dataclass in it, has another type than it declares."""
  for field in dataclasses.fields(value):
    found = getattr(value, field.name)
    if not isinstance(found, typing.get_origin(field.type) or field.type):
      raise TypeError(f"{field.name} is of type {type(found).__name__}")
    for one in found if isinstance(found, tuple) else (found,):
      if dataclasses.is_dataclass(one):
        _check_types(one)


def _read_trained(workdir: str | os.PathLike) -> Record | None:
  """Returns the record of a run that has a checkpoint; before the first one, a start may change everything."""
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    return None if checkpoints.latest_step() is None else read(workdir)


def _describe_session(first_step: int) -> dict[str, Any]:
  device = jax.devices()[0]
  return dict(
      start=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), first_step=first_step,
      last_step=first_step, wall_seconds=0.0, command=shlex.join(sys.orig_argv), commit=commit(), versions=versions(),
      device=dict(platform=device.platform, kind=device.device_kind, count=jax.device_count(),
                  processes=jax.process_count()))


def _describe(name: str, tokenizer: tokenizer_lib.Tokenizer) -> TokenizerRecord:
  return TokenizerRecord(name, tokenizer.identity, int(tokenizer.eos_id), int(tokenizer.vocab_size))


def _read_tokenizer(workdir: str | os.PathLike, record: TokenizerRecord) -> tokenizer_lib.Tokenizer:
  """Returns the stored tokenizer; raises ValueError if it is not the recorded one."""
  if record.identity == tokenizer_lib.ByteTokenizer.identity:
    return tokenizer_lib.ByteTokenizer()
  path = paths.directory(workdir) / TOKENIZER
  remedy = "restore it from a copy of the run"
  if not path.is_file():
    raise FileNotFoundError(f"{path} is missing, without which no text of this run can be read; {remedy}")
  try:
    found = tokenizer_lib.JsonTokenizer(path.read_bytes().decode("utf-8"), record.eos_id)
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
  if (found.identity, found.eos_id) != (record.identity, record.eos_id):
    raise ValueError(f"{path} is not the tokenizer that the run was trained with (identity {found.identity[:12]}, in "
                     f"{NAME} {record.identity[:12]}); {remedy}")
  return found


def _check_tokenizer(workdir: str | os.PathLike, config: config_lib.DataConfig, record: TokenizerRecord,
                     stored: tokenizer_lib.Tokenizer) -> None:
  """Raises ValueError if a config names another tokenizer than that of the run."""
  name = tokenizer_lib.name_of(config)
  is_task, is_file = task_table.is_task(config.source), tokenizer_lib.is_file(name)
  field = "data.source" if is_task else "data.tokenizer"
  if name == record.name and not is_task and not (is_file and pathlib.Path(name).expanduser().is_file()):
    return  # trained on the texts at the first start, or a file that may stay behind
  if is_file or is_task or name == "bytes":
    found = tokenizer_lib.load(config, None)
    if _is_same(found, stored):
      return
    identity = f"identity {found.identity[:12]}"
  else:
    identity = "not trained"
  raise ValueError(f"{field}={name!r} ({identity}) is not the tokenizer that {workdir} was trained with, "
                   f"{record.name!r} (identity {record.identity[:12]}); leave {field} as it was, or give "
                   "another --workdir")


def _is_same(a: tokenizer_lib.Tokenizer, b: tokenizer_lib.Tokenizer) -> bool:
  if a.eos_id != b.eos_id:
    return False
  return a.identity == b.identity or json.loads(a.serialized) == json.loads(b.serialized)


def _write(workdir: str | os.PathLike, record: Record, tokenizer: tokenizer_lib.Tokenizer) -> None:
  directory = paths.directory(workdir)
  try:
    if record.tokenizer.identity != tokenizer_lib.ByteTokenizer.identity:
      _write_changed(directory / TOKENIZER, tokenizer.serialized)
    values = dataclasses.asdict(record)
    for one, data in zip(values["data"], record.data):
      one["digest"] = data.identity.digest  # for people; it is computed again when it is read
    paths.write_whole(directory / NAME, json.dumps(values, indent=1) + "\n")
  except Exception as error:  # each object store has errors of its own
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    raise OSError(f"cannot write {directory / NAME} ({reason}); free some space, or give a --workdir that you may "
                  "write") from error


def _write_changed(path: epath.Path, content: str) -> None:
  if not path.is_file() or path.read_bytes() != content.encode("utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    paths.write_whole(path, content)
