"""The training loop: one run from its latest checkpoint to its last step.

The loop never waits for the step that it has just dispatched: it reads the metrics of
the step before. Before an evaluation or a save it reads the metrics of all steps, and
before a save it looks at the state. So a state whose loss, gradient or arrays are not
finite is never saved.

A run writes run.json and run/ (`mor/run.py`), checkpoints/, metrics.jsonl and
tensorboard/ in its workdir. The argument `finish` writes the rest, e.g. the report
(`mor/report.py`).
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import tempfile
from typing import Any

import jax

from mor import checkpoint
from mor import config as config_lib
from mor import costs
from mor import distributed
from mor import lock as lock_lib
from mor import run as run_lib
from mor import sharding
from mor.data import rows as rows_lib
from mor.data import text
from mor.data import tokenizer as tokenizer_lib
from mor.data.tasks import corpus as task_corpus
from mor.model import depths
from mor.train import evaluate as evaluate_lib
from mor.train import metrics as metrics_lib
from mor.train import signals
from mor.train import step as step_lib
from mor.train import task_figures


# finish(config, workdir, corpus, evaluate, params, balance) -> final figures, text to print
Finish = Callable[[config_lib.Config, str | os.PathLike, text.AnyCorpus, Callable[[], dict[str, float]], dict, dict],
                  tuple[Mapping[str, float], str]]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The end of a call of `train`.

  Attributes:
    step: finished optimizer steps; the checkpoint of this step is saved.
    summary: final figures; None if a signal stopped the run before its last step.
    text: text to print.
  """

  step: int
  summary: Mapping[str, float] | None
  text: str


def train(config: config_lib.Config, workdir: str | os.PathLike, finish: Finish | None = None,
          accept_new_data: bool = False) -> Outcome:
  """Starts or resumes the run of `workdir`.

  The result does not depend on interruptions: the parameters are bitwise those of an
  uninterrupted run on the same machine.

  Args:
    config: the experiment.
    workdir: run directory.
    finish: function that all processes call after the last step, e.g. `report.finish`.
    accept_new_data: whether a run may go on with other texts than it was trained on.

  Raises:
    FloatingPointError: the loss or the gradient of a step is not finite, or the state that was to be saved.
    OSError: a checkpoint or the metrics cannot be written.
    ValueError: the config, the data and the workdir do not fit together, or another process trains there.
  """
  with lock_lib.Lock(workdir, "trains") as lock:
    return _train(config, workdir, finish, accept_new_data, lock)


def _train(config, workdir, finish, accept_new_data, lock):
  """Trains under the lock, which it takes for good when it first writes."""
  mesh = sharding.make_mesh(config.mesh)
  with contextlib.ExitStack() as stack:
    with checkpoint.Checkpoints(workdir, read_only=True) as existing:  # a wrong request creates nothing
      existing.check(config, run_lib.free_fields(workdir, accept_new_data))
      newest = existing.latest_step()
    teacher = step_lib.load_teacher(config, mesh)
    stop = stack.enter_context(signals.Stop())
    corpus = run_lib.load_corpus(workdir, config, accept_new_data)
    if teacher:
      run_lib.check_teacher(config.distill.teacher, corpus.tokenizer)
    lock.acquire()
    checkpoints = stack.enter_context(_open_checkpoints(config, workdir))
    if checkpoints.latest_step() != newest:
      raise ValueError(f"another process has trained in {workdir} meanwhile; run the same command again to go on")
    checkpoints.rewind(config)
    state, start = restore_or_init(config, mesh, checkpoints)
    session = stack.enter_context(run_lib.Session(workdir, config, corpus, start))
    main = distributed.is_main()
    writer = stack.enter_context(metrics_lib.Writer(workdir, start, enabled=main))
    shown = stack.enter_context(metrics_lib.Progress(start, config.train.steps, enabled=main))
    watchdog = stack.enter_context(signals.Watchdog(config.train.step_timeout, start))
    shown.say(f"resuming at step {start}, session {session.number}" if start else f"starting in {workdir}")
    if session.new_data:
      shown.say(f"from step {start} on with other texts, as --accept_new_data says: {config.data.source}")
    if teacher:
      shown.say(f"taught by {config.distill.teacher}, whose parameters take {teacher.num_bytes / 2**20:,.0f} MiB")
    evaluate = make_evaluate(config, mesh, corpus)
    log = _Log(config, mesh, writer, shown, watchdog, stop)
    state, step = _run_steps(config, mesh, corpus, state, start, teacher, evaluate, checkpoints, session, log, stop)
  if step < config.train.steps:
    return Outcome(step, None, f"stopped at step {step} of {config.train.steps}, saved; "
                   "run the same command to go on")
  if finish is None:
    return Outcome(step, {}, f"finished at step {step}")
  return Outcome(step, *finish(config, workdir, corpus, lambda: evaluate(state), state.params, state.balance))


def restore_or_init(config: config_lib.Config, mesh: jax.sharding.Mesh,
                    checkpoints: checkpoint.Checkpoints) -> tuple[step_lib.TrainState, int]:
  """Returns the state of the newest checkpoint, or a fresh state, and its step."""
  if checkpoints.latest_step() is None:
    return step_lib.init_state(config, mesh), 0
  shapes, shardings = step_lib.state_shapes(config), step_lib.state_shardings(config, mesh)
  target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
  return checkpoints.restore(target)


def make_evaluate(config: config_lib.Config, mesh: jax.sharding.Mesh,
              corpus: text.AnyCorpus) -> Callable[[step_lib.TrainState], dict[str, float]]:
  """Makes `evaluate(state) -> metrics` over `train.eval_rows` held-out rows."""
  evaluate = evaluate_lib.make(config, mesh, corpus.tokenizer.num_bytes_V)
  return lambda state: evaluate(state.params, state.balance, corpus.validation.in_order(
      config.data.batch_size, config.train.eval_rows))


def evaluate_corpus(config: config_lib.Config, mesh: jax.sharding.Mesh, state: step_lib.TrainState,
                    corpus: text.AnyCorpus) -> dict[str, Any]:
  """Returns the held-out figures of a run, ready for JSON.

  Those of a task have an object for the difficulties of each figure, and in `beyond` the same of
  questions that are harder than any of training, where the task has such.
  """
  figures = make_evaluate(config, mesh, corpus)(state)
  if not isinstance(corpus, task_corpus.TaskCorpus):
    return figures | evaluate_lib.compressed_bits_per_byte(corpus.validation_text())
  nested = task_figures.nest(figures)
  if corpus.beyond is None:
    return nested
  harder = evaluate_lib.make(config, mesh, corpus.tokenizer.num_bytes_V)(
      state.params, state.balance, corpus.beyond.in_order(config.data.batch_size, config.train.eval_rows))
  return nested | {"beyond": task_figures.nest(harder)}


def evaluate_text(config: config_lib.Config, mesh: jax.sharding.Mesh, state: step_lib.TrainState,
                  tokenizer: tokenizer_lib.Tokenizer, source: str) -> tuple[dict[str, float], str]:
  """Evaluates a run on every row of a given text, which the caller answers for.

  Args:
    config: the config of the run.
    mesh: mesh that holds the batches.
    state: state of the run.
    tokenizer: tokenizer of the run.
    source: text, as in `data.source`.

  Returns:
    Metrics, and the text.
  """
  with tempfile.TemporaryDirectory(prefix="mor-eval-") as directory:
    rows, content = text.load_held_out(source, config.data, tokenizer, pathlib.Path(directory))
    evaluate = evaluate_lib.make(config, mesh, tokenizer.num_bytes_V)
    return evaluate(state.params, state.balance, rows.in_order(config.data.batch_size)), content


def _open_checkpoints(config: config_lib.Config, workdir: str | os.PathLike) -> checkpoint.Checkpoints:
  """Opens a workdir for training; the checkpoint before a cooldown is kept, so that a longer run can go on from it."""
  cooldown = config.cooldown_start()
  return checkpoint.Checkpoints(workdir, config.train.keep_checkpoints, config.train.keep_every,
                                keep_steps=() if cooldown is None else (cooldown,))


def _run_steps(config, mesh, corpus, state, start, teacher, evaluate, checkpoints, session, log, stop):
  """Runs the steps; returns the state and the number of finished steps."""
  plan, step, cooldown = config.train, start, config.cooldown_start()
  train_step = step_lib.make_train_step(config, mesh, teacher)
  rows = sharding.local_rows(mesh, config.data.batch_size)

  def make_batch(step):
    return stop.add_vote(mesh, sharding.put_batch(mesh, corpus.train.batch(step, rows)))

  with contextlib.closing(rows_lib.prefetch(make_batch, start, plan.steps)) as batches:
    for batch in batches:
      if train_step.must_compile(step):
        log.flush()
      state, values = train_step(state, batch, step)
      step += 1
      log.put(step, values)
      last, stopping = step == plan.steps, stop.should_stop()
      if last or step % plan.eval_every == 0:
        log.flush()
        log.put_evaluation(step, evaluate(state))
      if last or stopping or step % plan.checkpoint_every == 0 or step == cooldown:
        log.flush()
        log.copy()
        step_lib.check_state(state, step)
        checkpoints.save(step, state, config)
        session.save(step)
      if stopping:
        break
  checkpoints.wait()
  return state, step


def _count_flops(config: config_lib.Config, step: int) -> float:
  """Returns the FLOPs per token of an optimizer step, counted from 1."""
  return _count_flops_at(config, depths.draw(config.model, config.seed, step - 1))


@functools.cache
def _count_flops_at(config: config_lib.Config, num_recursions: int) -> float:
  return costs.train_flops_per_token(depths.at(config.model, num_recursions), config.data.seq_len)


def describe_eval(step: int, held_out: Mapping[str, float]) -> str:
  """Returns a line on an evaluation."""
  figures = []
  for name in ("causal", "oracle"):
    if f"bpb_{name}" in held_out:
      figures.append(f"{name} {held_out[f'bpb_{name}']:.4f} bits/byte (nll {held_out[f'nll_{name}']:.4f})")
    elif f"accuracy_{name}" in held_out:
      figures.append(f"{name} {task_figures.describe(held_out, name)} (nll {held_out[f'nll_{name}']:.4f})")
  return f"step {step} held out: {'  '.join(figures)}"


class _Log:
  """Reads the metrics of every step one step late, checks them, and writes those of logged steps."""

  def __init__(self, config: config_lib.Config, mesh: jax.sharding.Mesh, writer: metrics_lib.Writer,
               shown: metrics_lib.Progress, watchdog: signals.Watchdog, stop: signals.Stop):
    self._every, self._writer, self._shown = config.train.log_every, writer, shown
    self._watchdog, self._stop = watchdog, stop
    self._meter = metrics_lib.Throughput(
        config.data.batch_size * config.data.seq_len, functools.partial(_count_flops, config),
        mesh.devices.flat[0].device_kind, mesh.devices.size)
    self._pending: tuple[int, Any] | None = None

  def put(self, step: int, values: Mapping[str, jax.Array]) -> None:
    """Stores the metrics of `step`, which is running; reads those of the step before."""
    before, self._pending = self._pending, (step, values)
    if before:
      self._read(*before)

  def flush(self) -> None:
    """Waits for the last step, and stops the clock of training time."""
    before, self._pending = self._pending, None
    if before:
      self._read(*before)
    self._meter.pause()
    self._watchdog.pause()

  def copy(self) -> None:
    """Copies the metrics to an object store, if the workdir is one."""
    self._writer.copy()

  def put_evaluation(self, step: int, held_out: Mapping[str, float]) -> None:
    """Writes and shows the figures of an evaluation; raises FloatingPointError if one is not finite."""
    bad = [name for name, value in held_out.items() if not math.isfinite(value)]
    if bad:
      raise FloatingPointError(
          f"{bad[0]}={held_out[bad[0]]} in the evaluation of step {step}, so its state was not saved; lower "
          "optim.learning_rate or lengthen optim.warmup_steps, in another --workdir")
    self._writer.write(step, "eval", held_out)
    self._shown.say(describe_eval(step, held_out))

  def _read(self, step: int, values: Mapping[str, jax.Array]) -> None:
    values = self._stop.read_votes({k: float(v) for k, v in jax.device_get(values).items()})
    if not all(math.isfinite(values[k]) for k in ("loss", "grad_norm")):
      raise FloatingPointError(
          f"loss={values['loss']} and grad_norm={values['grad_norm']} at step {step}, so nothing was saved after "
          "the step before it; lower optim.learning_rate or lengthen optim.warmup_steps, in another --workdir")
    self._shown.step(step)
    self._watchdog.beat(step)
    if step % self._every == 0:
      values |= self._meter.read(step)
      self._writer.write(step, "train", values)
      self._shown.show(step, values)
    elif not self._meter.running:  # a step that compiles, and an evaluation, are no training
      self._meter.restart(step)
