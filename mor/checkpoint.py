"""Checkpoints: the training state, the config and the step, by orbax; and the model of a run alone.

A batch is a pure function of the step, so the step is also the data position: a run
resumes from the state and one integer, on any number of processes.

A save writes to a temporary directory in the background and renames it when it is
complete. So a process that is killed at any moment leaves the previous checkpoint as the
newest one. The remains of such a save are never read, and they are removed when the
directory is opened for training again.

The files have hashes (`mor/integrity.py`), which are written just before that rename and
checked before a checkpoint is read. A checkpoint that is damaged (by a failing disk, or
an incomplete copy) is renamed to STEP.damaged by training, which resumes from the
checkpoint before it. Everybody else reads the checkpoint before it, and renames nothing.
"""

from collections.abc import Callable, Collection
import contextlib
import functools
import itertools
import json
import os
import sys
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from mor import config as config_lib
from mor import continuation
from mor import distributed
from mor import integrity
from mor import paths
from mor.model import transformer
from mor.model.routers import table as router_table

_ATTEMPTS = 20  # of a reader whose checkpoints are removed by a run that saves meanwhile


class Checkpoints:
  """The checkpoints of one workdir. Use as a context manager."""

  def __init__(self, workdir: str | os.PathLike, keep: int = 1, keep_every: int = 0, read_only: bool = False,
               keep_steps: Collection[int] = ()):
    """Opens `workdir`/checkpoints; for training, every process of the run must open it.

    Args:
      workdir: run directory, the same for all processes; the first save creates it.
      keep: number of newest checkpoints that a save leaves.
      keep_every: steps; checkpoints at multiples of it are never removed; 0 keeps none.
      read_only: whether to leave the directory unchanged, e.g. beside a running run.
      keep_steps: steps whose checkpoints are never removed.
    """
    self.directory = paths.directory(workdir) / "checkpoints"
    self._manager = None
    self._saved: int | None = None  # step of the newest save, which may not be complete
    if not read_only:
      with _one_line(f"cannot write {self.directory}", "give a --workdir that you may write", errors=OSError):
        self.directory.mkdir(parents=True, exist_ok=True)
      kept = [managers.LatestN(keep), managers.CustomSteps(keep_steps)]
      kept += [managers.EveryNSteps(keep_every)] if keep_every else []
      self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
          preservation_policy=managers.AnyPreservationPolicy(kept), cleanup_tmp_directories=True,
          async_options=ocp.AsyncOptions(post_finalization_callback=self._write_hashes)))

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, *unused) -> None:
    if kind is None:
      self.close()
    elif not distributed.is_lost(error):  # a save needs all processes to become complete
      # The current error says more than a second error of this save.
      with contextlib.suppress(OSError):
        self.close()

  def latest_step(self) -> int | None:
    """Returns the step of the newest complete checkpoint; None if there is none."""
    return max(self._steps(), default=None)

  def config(self) -> config_lib.Config:
    """Returns the config of the newest checkpoint whose config is readable."""
    _, meta = self._newest(self._meta)
    config = config_lib.from_dict(meta["config"])
    router_table.make(config.model)  # refuses a router that this code does not have
    return config

  def check(self, config: config_lib.Config, free: Collection[str] = ()) -> None:
    """Raises ValueError if `config` cannot continue the newest checkpoint whose config is readable.

    Args:
      config: the experiment.
      free: fields that may differ besides `continuation.FREE_FIELDS`.
    """
    found = self._newest(self._meta)
    if found is None:
      return
    continuation.check(self.directory, found[1]["config"], found[0], self._steps(), config, free)

  def rewind(self, config: config_lib.Config) -> None:
    """Sets aside the checkpoints of a cooldown that `config`, with more steps, begins later; see `check`."""
    found = self._newest(self._meta)
    if found is None:
      return
    step, old = found[0], found[1]["config"]
    start = continuation.find_start(old, step, self._steps(), config)
    distributed.barrier("every process knows where to start")
    if start is not None and start != step:
      later = [other for other in self._steps() if other > start]
      self._set_aside(later, start, "cooldown", f"is of the cooldown to step {old['train']['steps']}")

  def restore(self, target: Any, partial: bool = False) -> tuple[Any, int]:
    """Returns the newest state, sharded like `target`, and its step.

    A checkpoint that any process finds damaged is left out, with a warning, for the
    checkpoint before it. Training sets it aside, so that its step can be saved again.

    Args:
      target: a tree of arrays or `jax.ShapeDtypeStruct`s with shardings.
      partial: whether the checkpoint may hold more arrays than the target.

    Raises:
      OSError: the checkpoint is damaged, and there is none before it.
      ValueError: the arrays of checkpoint and target differ in name, shape or type.
    """
    def read(step):
      state = self._read(step, target, partial)
      with self._reading(step):
        if self._manager is None and not integrity.is_whole(self._path(step)):
          raise OSError("it was removed while it was read")
      return state

    newest = self.latest_step()
    step, state = self._newest(self._check_hashes, read, together=True)
    if self._manager and step != newest:
      self._set_aside([other for other in self._steps() if other > step], step, "damaged", "is damaged")
    return state, step

  def _check_hashes(self, step: int) -> None:
    """Compares the files with their hashes; each process takes its share of them."""
    with self._reading(step):
      hashed = integrity.check(self._path(step), share=(jax.process_index(), jax.process_count()))
      if not hashed and distributed.is_main():
        print(f"warning: the checkpoint {self._path(step)} was made by a version without hashes, so damage of its files "
              "may go unnoticed", file=sys.stderr, flush=True)

  def _read(self, step: int, target: Any, partial: bool) -> Any:
    path = self._path(step) / "state"
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _to_plain(target))
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
      with self._reading(step):
        stored = handler.metadata(path)
      if partial:
        stored = {name: tree for name, tree in stored.items() if name in abstract}
      _check_types(stored, abstract, self._path(step))  # orbax would cast without a word
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler, self._reading(step):
      plain = handler.restore(path, args=ocp.args.PyTreeRestore(
          abstract, ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=partial))
      jax.block_until_ready(plain)
    arrays = _by_path(plain)
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[path] for path in _by_path(target)])

  def save(self, step: int, state: Any, config: config_lib.Config) -> None:
    """Starts a save; returns when `state` may be donated.

    Raises:
      OSError: this save, or the save before it, failed. Earlier checkpoints are untouched.
    """
    if step == self.latest_step():
      return
    with self._saving():
      self._manager.wait_until_finished()  # the save before knows its step by `_saved`
      self._saved = step
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(_to_plain(state)),
          meta=ocp.args.JsonSave(dict(step=step, config=config_lib.to_dict(config)))))

  def _write_hashes(self) -> None:
    """Hashes a save of which all files are written; orbax calls it in the thread that renames the directory then."""
    path = self._path(self._saved)
    temporary = path.with_name(path.name + ocp.utils.TMP_DIR_SUFFIX)
    integrity.write(temporary if temporary.is_dir() else path)  # an object store does not rename

  def wait(self) -> None:
    """Waits until the last save is on disk; raises as `save` does."""
    with self._saving():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save, and closes the directory; raises as `save` does."""
    if self._manager:
      with self._saving():
        self._manager.close()

  def _steps(self) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps(self.directory)) if self.directory.is_dir() else []

  def _path(self, step: int) -> epath.Path:
    return self.directory / str(step)

  def _newest(self, *reads: Callable[[int], Any], together: bool = False) -> tuple[int, Any] | None:
    """Returns the newest undamaged step and the result of the last read; None if there is no step.

    A run removes a checkpoint only after it has saved a newer one. So a reader that fails
    and finds a newer one begins again.

    Args:
      *reads: functions of the step; they raise OSError if the checkpoint is damaged.
      together: whether a step counts as damaged if any process finds it damaged.
    """
    error = None
    for _ in range(_ATTEMPTS):
      steps, first = self._steps(), None
      for step in reversed(steps):
        found, error = self._try(step, reads, together)
        if error is None:
          if first and together and self._manager is None and distributed.is_main():
            print(f"warning: {first}; reading the one before, {self._path(step)}", file=sys.stderr, flush=True)
          return step, found
        first = first or error
        newer = max(self._steps(), default=-1) > steps[-1]
        if distributed.any_process(newer) if together else newer:
          break
      else:
        if first:
          raise first
        return None
    raise OSError(f"{self.directory}: a run replaced each of {_ATTEMPTS} checkpoints while it was read; raise its "
                  "train.keep_checkpoints, or wait until it has ended") from error

  def _try(self, step: int, reads: tuple[Callable[[int], Any], ...], together: bool) -> tuple[Any, OSError | None]:
    found = None
    for read in reads:
      error = None
      try:
        found = read(step)
      except OSError as caught:
        error = caught
      if distributed.any_process(error is not None) if together else error:
        return None, error or OSError(f"another process cannot read the checkpoint {self._path(step)}")
    return found, None

  def _set_aside(self, steps: list[int], step: int, suffix: str, why: str) -> None:
    """Renames checkpoints, so that their steps can be saved again, and `step` is the newest one."""
    for other in steps if distributed.is_main() else ():
      path = self._path(other)
      names = itertools.chain([f"{other}.{suffix}"], (f"{other}.{suffix}-{n}" for n in itertools.count(2)))
      aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
      with _one_line(f"cannot rename the checkpoint {path}, which {why}", "remove it", errors=OSError):
        path.rename(aside)
      print(f"warning: the checkpoint {path} {why} and kept as {aside.name}; going on from the one before, "
            f"{self._path(step)}", file=sys.stderr, flush=True)
    distributed.barrier("checkpoints are set aside")
    self._manager.reload()

  def _meta(self, step: int) -> dict[str, Any]:
    with self._reading(step):
      integrity.check(self._path(step), "meta/")
      meta = json.loads((self._path(step) / "meta" / "metadata").read_text(encoding="utf-8"))
      return {**meta, "config": config_lib.upgrade(meta["config"])}

  def _reading(self, step: int):
    return _one_line(f"cannot read the checkpoint {self._path(step)}",
                     "remove that directory to resume from the one before")

  def _saving(self):
    latest = self.latest_step()
    kept = "there was no checkpoint yet" if latest is None else f"the checkpoint of step {latest} is intact"
    return _one_line(f"cannot save to {self.directory} ({kept})", "free some space and run the same command again")


def load_variables(workdir: str | os.PathLike, placed: Any = None) -> tuple[config_lib.Config, int, dict[str, Any]]:
  """Returns config, step and variables of the newest checkpoint, without the optimizer state.

  Args:
    workdir: run directory.
    placed: function from (config, shapes of the variables) to their shardings; None puts
      all variables on the first device.

  Raises:
    ValueError: the directory holds no checkpoint.
    OSError: the checkpoint is damaged.
  """
  with Checkpoints(workdir, read_only=True) as checkpoints:
    if checkpoints.latest_step() is None:
      raise ValueError(f"{checkpoints.directory} holds no checkpoint; train first, or give the directory of a run")
    config = checkpoints.config()
    shapes = dict(jax.eval_shape(transformer.Transformer(config.model).init, jax.random.key(0),
                                 jax.ShapeDtypeStruct((1, 1), "int32")))
    if placed is None:
      shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
      shardings = placed(config, shapes)
    target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    variables, step = checkpoints.restore(target, partial=True)
    return config, step, variables


def load_pretrained(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """Returns the facts about the source of a converted run (`conversion/command.py`); None for any other run.

  A file that was written before `opening` and `stops` were gets them from `special_ids`.

  Raises:
    ValueError: the file is damaged.
  """
  path = paths.directory(workdir) / "pretrained.json"
  if not path.is_file():
    return None
  try:
    about = json.loads(path.read_text(encoding="utf-8"))
    ids = about["special_ids"]
    if "opening" not in about:
      about |= dict(opening=ids.get("bos", [])[:1] if about["add_bos"] else [], stops=ids.get("eos", []))
    lists = [*ids.values(), about["opening"], about["stops"]]
    sound = (isinstance(about["add_bos"], bool) and all(isinstance(numbers, list) for numbers in lists)
             and all(type(number) is int and number >= 0 for numbers in lists for number in numbers)
             and all(about.get(name) is None or type(about[name]) is int for name in ("context", "eos_id"))
             and isinstance(about.get("chat_template"), (str, type(None))))
  except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
    sound = False
  if not sound:
    raise ValueError(f"{path} is damaged: it is not the JSON object that --mode=convert writes; convert again, to "
                     "another --workdir, and copy the file from there")
  return about


@contextlib.contextmanager
def _one_line(what: str, remedy: str, errors: type[Exception] = Exception):
  """Turns any error of the storage into an OSError of one line."""
  try:
    yield
  except errors as error:
    if distributed.is_lost(error):
      raise
    reason = distributed.first_line(error)
    reason = "no space left on the device" if "No space left" in reason else reason[:200]
    raise OSError(f"{what}: {reason}; {remedy}") from error


def _check_types(stored: Any, wanted: Any, path: epath.Path) -> None:
  """Raises ValueError if the arrays of checkpoint and target differ."""
  stored, wanted = _by_path(stored), _by_path(wanted)

  def describe(x):
    return "nothing" if x is None else f"{jnp.dtype(x.dtype).name}{tuple(x.shape)}"

  for name in sorted(stored.keys() | wanted.keys()):
    there, here = describe(stored.get(name)), describe(wanted.get(name))
    if there != here:
      raise ValueError(f"{path} has {there} at {name} where this model has {here}; "
                       "use the version of mor that wrote it, or another --workdir")


def _by_path(tree: Any) -> dict[str, Any]:
  """Returns the leaves by path, e.g. "opt_state/1/mu/embedding"."""
  return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
          for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _to_plain(tree: Any) -> dict[str, Any]:
  """Returns nested dictionaries with the same paths, which any program can read."""
  plain = {}
  for path, leaf in _by_path(tree).items():
    *groups, name = path.split("/")
    functools.reduce(lambda at, group: at.setdefault(group, {}), groups, plain)[name] = leaf
  return plain
