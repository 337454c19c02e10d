"""A study: all members are trained at equal forward FLOPs, and at equal tokens.

  WORKDIR/MEMBER-seedS/full     run to the budget, with the files of `--mode=train`
  WORKDIR/MEMBER-seedS/short    run to the tokens of the shortest member
  WORKDIR/results/*.json        result of one member with one seed
  WORKDIR/study.json, .md, .png report on all results (`study/report.py`)

The same command, run again, skips finished members and resumes the rest. A finished run
keeps only its last checkpoint.
"""

import dataclasses
import json
import os
import pathlib
import platform
import shutil
import statistics
import sys
from typing import Any

import jax

from mor import checkpoint
from mor import config as config_lib
from mor import costs
from mor import lock as lock_lib
from mor import paths
from mor import report
from mor import run as run_lib
from mor import sharding
from mor.study import judge as judge_lib
from mor.study import plan as study_plan
from mor.study import report as study_report
from mor.train import loop
from mor.train import metrics as metrics_lib


def run(base: config_lib.Config, study: study_plan.Study, workdir: str | os.PathLike, command: str,
        accept_new_data: bool = False) -> bool:
  """Trains and judges all members; returns True if the study is complete.

  Args:
    base: config of the reference, which the members override.
    study: members and held-out sets.
    workdir: directory of the study.
    command: command line, for the record.
    accept_new_data: whether members may go on with other texts than they were trained on.

  Raises:
    FloatingPointError: a member diverges.
    OSError: a file cannot be written.
    ValueError: the study, its data and the workdir do not fit together.
  """
  if jax.process_count() > 1:
    raise ValueError(f"a study runs in one process, here are {jax.process_count()}; train its members one by one")
  workdir = paths.local(workdir, "study")
  with lock_lib.Lock(workdir, "runs a study") as lock:
    return _run(base, study, workdir, command, accept_new_data, lock)


def _run(base, study, workdir, command, accept_new_data, lock):
  """Runs the study under its lock, which it takes for good when it first writes."""
  runs = study_plan.make(base, study)
  results = [_finished(workdir, study, one) for one in runs]  # raises before any training
  started = [workdir / one.name / "full" for one in runs]  # with one text and one tokenizer, or none has started
  corpus = run_lib.load_corpus(next(filter(_has_started, started), started[0]), base, accept_new_data)
  lock.acquire()
  judge = judge_lib.Judge(study, base.data, corpus, workdir / "texts")
  header = _header(base, study, command) | {"missing": judge.missing}
  for index, one in enumerate(runs):
    if results[index] is None:
      print(f"[{index + 1}/{len(runs)}] {one.member.label}, seed {one.full.seed}", file=sys.stderr, flush=True)
      results[index] = _train_and_judge(workdir / one.name, one, judge, accept_new_data)
      if results[index] is None:
        return False
      results[index] |= {"commit": header["commit"], "made_for": _made_for(study, one)}
      study_report.write_json(_path(workdir, one), results[index])
      _drop_checkpoints(workdir / one.name)
    done = [result for result in results if result is not None]
    study_report.write(workdir, header | {"complete": len(done) == len(runs), "results": done})
  return True


def _train_and_judge(directory: pathlib.Path, one: study_plan.Run, judge: judge_lib.Judge,
                     accept_new_data: bool = False) -> dict[str, Any] | None:
  """Returns the result of a member; None if a signal stopped its training."""
  if loop.train(one.full, directory / "full", report.finish, accept_new_data).summary is None:
    return None
  if one.short is not None:
    fork(one, directory)
    if loop.train(one.short, directory / "short", report.finish, accept_new_data).summary is None:
      return None
  figures = judge.make(one.full, sharding.make_mesh(one.full.mesh))
  result = _describe(one) | {"equal_flops": _end(one.full, directory / "full", figures)}
  result["equal_tokens"] = _end(one.short, directory / "short", figures) if one.short else result["equal_flops"]
  rows = metrics_lib.read(directory / "full")
  result["curve"] = _curve(rows)
  result["short_curve"] = _curve(metrics_lib.read(directory / "short")) if one.short else []
  rates = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
  tokens = one.full.data.batch_size * one.full.data.seq_len
  result["step_seconds"] = tokens / statistics.median(rates) if rates else None
  return result | {"load_average": os.getloadavg()[0]}


def fork(one: study_plan.Run, directory: pathlib.Path) -> None:
  """Copies the state of the full run at the last shared step, and its tokenizer, to the short run.

  Without that checkpoint the short run trains from step 0, with the same result.
  """
  source, plateau = directory / "full/checkpoints" / str(one.fork), directory / "plateau/checkpoints" / str(one.fork)
  if source.is_dir() and not plateau.exists():
    plateau.parent.mkdir(parents=True, exist_ok=True)
    source.rename(plateau)
  with checkpoint.Checkpoints(directory / "short", one.short.train.keep_checkpoints) as target:
    if target.latest_step() is not None or not plateau.exists():
      return
    with checkpoint.Checkpoints(directory / "plateau", read_only=True) as start:
      state, step = loop.restore_or_init(one.short, sharding.make_mesh(one.short.mesh), start)
    record = run_lib.read(directory / "full")
    if record is not None:  # else its first start would train a "bpe:SIZE" again, and on other texts another one
      tokenizer = run_lib.load_tokenizer(directory / "full", one.full.data)
      run_lib.keep_tokenizer(directory / "short", record.tokenizer.name, tokenizer)
    target.save(step, state, one.short)


def _has_started(directory: pathlib.Path) -> bool:
  with checkpoint.Checkpoints(directory, read_only=True) as checkpoints:
    return checkpoints.latest_step() is not None


def _end(config: config_lib.Config, directory: pathlib.Path, figures) -> dict[str, Any]:
  """Measures a finished run."""
  with checkpoint.Checkpoints(directory, read_only=True) as checkpoints:
    state, steps = loop.restore_or_init(config, sharding.make_mesh(config.mesh), checkpoints)
  tokens = steps * config.data.batch_size * config.data.seq_len
  return {"steps": steps, "tokens": tokens, "forward_flops": tokens * study_plan.forward_flops(config),
          "figures": figures(state.params, state.balance)}


def _describe(one: study_plan.Run) -> dict[str, Any]:
  model, seq_len = one.full.model, one.full.data.seq_len
  embedding, rest = costs.parameter_count(model)
  return {
      "name": one.member.name, "label": one.member.label, "seed": one.full.seed,
      "params_embedding": embedding, "params_non_embedding": rest,
      "forward_flops_per_token": costs.forward_flops_per_token(model, seq_len),
      "forward_flops_per_token_no_head": costs.forward_flops_per_token(model, seq_len, head=False),
      "nominal_load": list(costs.step_fractions(model, seq_len)), "fork_step": one.fork if one.short else None,
  }


def _curve(rows: list[dict[str, float]]) -> list[dict[str, float]]:
  """Returns the held-out losses during training, which come from fewer rows than the final figures."""
  return [{"step": row["step"], **{name: row[f"eval/{name}"] for name in ("nll_causal", "nll_oracle")
                                   if f"eval/{name}" in row}} for row in rows if "eval/nll_causal" in row]


def _header(base: config_lib.Config, study: study_plan.Study, command: str) -> dict[str, Any]:
  reference = next(member for member in study.members if member.name == study.reference)
  per_step = base.data.batch_size * base.data.seq_len
  flops_per_token = study_plan.forward_flops(study_plan.override(base, reference))
  device = jax.devices()[0]
  return {
      "command": command, "commit": run_lib.commit(), "platform": device.platform, "device": device.device_kind,
      "num_devices": jax.device_count(), "machine": platform.machine(), "num_cpus": os.cpu_count(),
      "jax": jax.__version__, "compute_dtype": base.model.compute_dtype, "tokens_per_step": per_step,
      "reference": study.reference, "budget_forward_flops": base.train.steps * per_step * flops_per_token,
      "config": config_lib.to_dict(base), "study": dataclasses.asdict(study),
  }


def _made_for(study: study_plan.Study, one: study_plan.Run) -> dict[str, Any]:
  """Returns the inputs of a result, in the form that JSON returns."""
  held_out = {k: getattr(study, k) for k in ("final_rows", "texts", "text_rows", "blimp", "blimp_pairs")}
  short = None if one.short is None else one.short.train.steps
  return json.loads(json.dumps(held_out | {"config": config_lib.to_dict(one.full), "short_steps": short}))


def _finished(workdir: pathlib.Path, study: study_plan.Study, one: study_plan.Run) -> dict[str, Any] | None:
  path = _path(workdir, one)
  if not path.exists():
    return None
  result = study_report.read_json(path)
  if result.get("made_for") != _made_for(study, one):
    raise ValueError(f"{path} holds the result of another study; give another --workdir, or remove it")
  return result


def _path(workdir: pathlib.Path, one: study_plan.Run) -> pathlib.Path:
  return workdir / "results" / f"{one.name}.json"


def _drop_checkpoints(directory: pathlib.Path) -> None:
  shutil.rmtree(directory / "plateau", ignore_errors=True)
  for checkpoints in directory.glob("*/checkpoints"):
    steps = sorted((path for path in checkpoints.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    for path in steps[:-1]:
      shutil.rmtree(path)
