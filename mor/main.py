"""The command line.

  python -m mor.main --config=quickstart --workdir=runs/quickstart
  python -m mor.main --workdir=runs/quickstart --mode=generate --prompt="My fellow"

Modes: `train` starts or resumes the run of a workdir; `eval` prints its held-out figures,
or those of another text, as a JSON object (of a task, accuracy and depth by difficulty); `generate` continues prompts, or those of a file as JSON
lines; `calibrate` finds the threshold of a run's exits on a text, and stores it for
`generate`; `convert` starts a run from a pretrained model, `export` writes a run's model for
PyTorch or llama.cpp; `info` prints the size and cost of a config as a JSON object; `fields` prints
each field of a config, with its value, meaning, unit and allowed values; `study` trains
and compares the models that an experiment such as study_cpu lists; `compile` compiles the
training step and the engine for TPUs or GPUs that are not there, and prints what they need. `generate`
and `calibrate` take the config from the workdir, and so does `eval` where none is given.

`train` and `eval` run on several machines: the same command on each, with
--distributed=auto (TPU pod, SLURM, Kubernetes, Open MPI), or with --coordinator,
--num_processes and --process_id. The workdir is one directory that all of them see.

Exit status: 0 done; 2 something given is wrong (one prompt of a file will do), or
the disk is full; 1 training diverged; 75 (EX_TEMPFAIL) stopped by SIGINT or SIGTERM,
and the same command goes on; 76 a step hung (train.step_timeout) or another process is
gone, and the same command, for all processes, goes on from the newest checkpoint; 141 the
reader of the output has gone (`| head -1`). jax may end a process whose coordinator is gone
with SIGABRT first. Errors are one line; MOR_TRACEBACK=1 shows where they come
from.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import sys
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends the program without a traceback

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from mor import arguments
from mor import checkpoint
from mor import config as config_lib
from mor import costs
from mor import distributed
from mor import fields
from mor import paths
from mor import report
from mor import run as run_lib
from mor import sharding
from mor.aot import compiled
from mor.conversion import command as conversion
from mor.exits import calibration
from mor.exits import confidence
from mor.exits import policy as exits_lib
from mor.model.routers import table as router_table
from mor.serve import calibrate
from mor.serve import cli as command
from mor.serve import model as model_lib
from mor.study import plan as study_plan
from mor.study import run as study_lib
from mor.train import evaluate
from mor.train import loop
from mor.train import signals
from mor.train import step as step_lib

STOPPED, WRONG, DIVERGED, LOST = 75, 2, 1, signals.HUNG
UNREAD = 141  # as a shell reports SIGPIPE

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment: a name of configs/, e.g. quickstart, or a file, with :ARGUMENT if it takes one, e.g. "
    "paper:mor-360m-r3; --config.GROUP.FIELD=VALUE changes a field.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, report.")
_BUDGET = flags.DEFINE_float("budget", None, "info: forward FLOPs to turn into steps, e.g. 16.5e18.")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "compile: TPU chips or GPUs, e.g. v5e:4x4, v5p:4x4x4, v6e:8x8, h100:1 or h200:8.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "generate: text to continue; several may be given.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "generate: a prompt a line; .jsonl: objects with \"prompt\" and options such as max_tokens.")
_SOURCE = flags.DEFINE_string(
    "source", None, "convert: the pretrained model, hf:FOLDER, gguf:FILE, official_mor:PATH or mor:WORKDIR.")
_TARGET = flags.DEFINE_enum(
    "target", "hf", list(conversion.TARGETS),
    "export: hf is any model, with code of its own; llama a plain one, unrolled; gguf the same as a file of llama.cpp.")
_ACCEPT = flags.DEFINE_bool(
    "accept_new_data", False, "train, eval, calibrate, study: go on with other texts than the run was trained on.")
_EVAL_TEXT = flags.DEFINE_string(
    "eval_text", None, "eval: text to read in place of the held-out text, as data.source; it needs no corpus.")
_RECURSIONS = flags.DEFINE_list(
    "recursions", None, "eval: numbers of recursion steps to run the model with, e.g. 1,2,4,8; a line for each.")
_OUTPUT = flags.DEFINE_string("output", None, "export: folder to create, or of --target=gguf the file, NAME.gguf.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16", "float16"],
                           "export: of the weights; float16 with --target=gguf.")
_PROCESSES = {  # see mor/distributed.py
    "mode": flags.DEFINE_enum("distributed", "off", ["off", "auto"], "train, eval: auto asks the cluster for the rest."),
    "coordinator": flags.DEFINE_string("coordinator", None, "train, eval: HOST:PORT of process 0 that all reach."),
    "num_processes": flags.DEFINE_integer("num_processes", None, "train, eval: processes of the run."),
    "process_id": flags.DEFINE_integer("process_id", None, "train, eval: which of them this is, from 0."),
}
_OPTIONS = {  # of a request; see mor/serve/request.py and sampling.py
    "max_tokens": flags.DEFINE_integer("max_tokens", 64, "generate: new tokens at most."),
    "temperature": flags.DEFINE_float("temperature", 0.8, "generate: 0 takes the most likely token."),
    "top_k": flags.DEFINE_integer("top_k", None, "generate: draw from so many of the likeliest tokens."),
    "top_p": flags.DEFINE_float("top_p", None, "generate: draw from the likeliest tokens that hold this probability."),
    "min_p": flags.DEFINE_float("min_p", None, "generate: draw from tokens with this fraction of the likeliest's."),
    "repetition_penalty": flags.DEFINE_float("repetition_penalty", None, "generate: above 1 repeats less."),
    "seed": flags.DEFINE_integer("seed", 0, "generate: seed of the draws."),
    "stop_strings": flags.DEFINE_multi_string("stop", None, "generate: text that ends an answer; give several."),
    "logprobs": flags.DEFINE_bool("logprobs", None, "generate: also each token's log-probability."),
    "exit": flags.DEFINE_enum("exit", None, ["none", "trust", "verify"],
                              "generate: what an exit's token is: nothing, the next token, or a draft."),
    "threshold": flags.DEFINE_float("threshold", None, "generate: confidence above which an exit is taken."),
}
_HOW = {  # of the engine; see mor/serve/engine.py
    "batching": flags.DEFINE_enum("batching", "depth", ["depth", "sequence", "none"],
                                  "generate: the engine's, or none for the plain batch, which takes any model."),
    "num_slots": flags.DEFINE_integer("num_slots", None, "generate, compile: prompts that run at once; default up to 16."),
    "context": flags.DEFINE_integer("context", None, "generate, compile: positions at most; default data.seq_len."),
    "weight_format": flags.DEFINE_string("weight_format", None, "generate: float32 (default), bfloat16 or int8."),
    "kv_format": flags.DEFINE_string("kv_format", None, "generate: of stored keys, float32 (default) or bfloat16."),
    "page_size": flags.DEFINE_integer("page_size", None, "generate: positions in a page of stored keys; default 64."),
    "num_pages": flags.DEFINE_integer(
        "num_pages", None, "generate: pages of the recursion's keys, which bounds their memory; default: no bound."),
    "num_edge_pages": flags.DEFINE_integer("num_edge_pages", None, "generate: the same for prelude and coda."),
    "prefill_chunk": flags.DEFINE_integer(
        "prefill_chunk", None, "generate: prompt tokens that are read between two dispatches; default 256, on an accelerator 1024."),
    "ticks": flags.DEFINE_integer("ticks", None, "generate: ticks of a dispatch; default 4 or a little more, on an accelerator 12."),
    "devices": flags.DEFINE_string(
        "devices", None, "generate: devices with copies of the model, behind one queue: a count, or all; default 1."),
    "tensor": flags.DEFINE_integer("tensor", None, "generate, compile: devices that share a copy of the model; default 1."),
}
_EXITS = {  # see mor/exits/policy.py
    "after": flags.DEFINE_list("exit_after", None, "generate, calibrate: layers after which a token may leave, e.g. 10,20."),
    "measure": flags.DEFINE_enum(
        "exit_measure", None, list(confidence.MEASURES), "generate, calibrate: confidence of an exit; default margin."),
    "first": flags.DEFINE_integer(
        "exit_first", None, "generate, calibrate: tokens that an exit chooses from; default 0, all."),
    "kv": flags.DEFINE_enum("exit_kv", None, list(exits_lib.POLICIES),
                            "generate: deeper keys of tokens that left; default exact."),
}
_CALIBRATION = {  # see mor/serve/calibrate.py and mor/exits/calibration.py
    "text": flags.DEFINE_string("calibration_text", None, "calibrate: file of text; default is the held-out text."),
    "tokens": flags.DEFINE_integer("calibration_tokens", None, "calibrate: tokens to read at most; default 65536."),
    "method": flags.DEFINE_enum("calibration_method", None, list(calibration.METHODS),
                                "calibrate: how the threshold is fitted; default learn_then_test."),
    "risk": flags.DEFINE_float(
        "calibration_risk", None, "calibrate, learn_then_test: share of tokens that exits may change; default 0.1."),
    "agreement": flags.DEFINE_float(
        "calibration_agreement", None, "calibrate, beta_mixture: wanted agreement of exits; default 0.9."),
}


def _train() -> int:
  outcome = loop.train(_config("train"), _workdir("train"), report.finish, _ACCEPT.value)
  if distributed.is_main():
    print(outcome.text, flush=True)
  return 0 if outcome.summary is not None else STOPPED


def _eval() -> int:
  numbers = [None] if _RECURSIONS.value is None else arguments.read_numbers("recursions", _RECURSIONS.value)
  config, state, step, mesh = _restore("eval")
  experiments = [step_lib.at_recursions(config, number) for number in numbers]
  corpus = None
  if _EVAL_TEXT.value is None:
    corpus = run_lib.load_corpus(_workdir("eval"), config, _ACCEPT.value, "or give their new place with "
                                 "--config.data.source, or another text with --eval_text=FILE")
  for one in experiments:
    figures = _evaluate_text(one, state, mesh) if corpus is None else loop.evaluate_corpus(one, mesh, state, corpus)
    if distributed.is_main():
      number = {} if _RECURSIONS.value is None else {"recursions": one.model.num_recursions}
      print(json.dumps({"step": step, **number, **figures}), flush=True)
  return 0


def _evaluate_text(config: config_lib.Config, state: step_lib.TrainState, mesh: jax.sharding.Mesh) -> dict[str, float]:
  """Returns the figures of --eval_text."""
  if _CONFIG.value is not None:
    run_lib.check_tokenizer(_workdir("eval"), config.data)
  tokenizer = run_lib.load_tokenizer(_workdir("eval"), config.data)
  figures, content = loop.evaluate_text(config, mesh, state, tokenizer, _EVAL_TEXT.value)
  return figures | evaluate.compressed_bits_per_byte(content)


def _generate() -> int:
  workdir, path = _workdir("generate"), _PROMPT_FILE.value
  if bool(_PROMPT.value) == bool(path):
    raise ValueError("--mode=generate needs either prompts or a file of them; give --prompt=TEXT or --prompt_file=FILE")
  options, how, words = map(_given, (_OPTIONS, _HOW, _EXITS))
  fields = command.read_exits(words)
  model = model_lib.load(workdir)
  how |= command.choose_exits(model, fields, options)
  if path:
    return 0 if command.answer(model, path, options, how) else WRONG
  command.show(model, _PROMPT.value, options, how)
  return 0


def _calibrate() -> int:
  fields = command.read_exits(_given(_EXITS))
  settings = _given(_CALIBRATION) | {"accept_new_data": _ACCEPT.value}
  print(json.dumps(dataclasses.asdict(calibrate.run(_workdir("calibrate"), fields, settings))))
  return 0


def _given(group: Mapping[str, flags.FlagHolder]) -> dict[str, Any]:
  """Returns the values of the flags that were given, or that have a default."""
  return {name: flag.value for name, flag in group.items() if flag.value is not None}


def _convert() -> int:
  if not _SOURCE.value:
    raise ValueError("--mode=convert needs a pretrained model; give --source=hf:FOLDER, gguf:FILE, official_mor:PATH "
                     "or mor:WORKDIR")
  print(json.dumps(conversion.convert(_config("convert"), _SOURCE.value, _workdir("convert"))))
  return 0


def _export() -> int:
  if not _OUTPUT.value:
    raise ValueError("--mode=export needs something to create; give --output=DIR, for --target=gguf --output=NAME.gguf")
  print(json.dumps(conversion.export(_workdir("export"), _TARGET.value, _OUTPUT.value, _DTYPE.value)))
  return 0


def _info() -> int:
  print(json.dumps(costs.report(_config("info"), _BUDGET.value)))
  return 0


def _fields() -> int:
  config = config_lib.Config() if _CONFIG.value is None else _config("fields")
  for row in fields.rows(config):
    print(f"--config.{row.path}={shlex.quote(str(row.value))}  # {row.help}; {row.allowed}")
  return 0


def _compile() -> int:
  if not _TOPOLOGY.value:
    raise ValueError("--mode=compile needs chips to compile for; give --topology=v5e:4x4, h200:1 or the like")
  counts = {name: _HOW[name].value for name in ("num_slots", "context", "tensor")}
  print(json.dumps(compiled.command(_config("compile"), _TOPOLOGY.value, **counts)))
  return 0


def _study() -> int:
  config, workdir = _config("study"), _workdir("study")
  study = study_plan.read(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
  command = shlex.join(["python", "-m", "mor.main", *sys.argv[1:]])
  if not study_lib.run(config, study, workdir, command, _ACCEPT.value):
    print("stopped and saved; run the same command to go on", flush=True)
    return STOPPED
  print((pathlib.Path(workdir) / "study.md").read_text(encoding="utf-8"))
  return 0


MODES: dict[str, Callable[[], int]] = {
    "train": _train, "eval": _eval, "generate": _generate, "calibrate": _calibrate, "convert": _convert, "export": _export,
    "info": _info, "fields": _fields, "study": _study, "compile": _compile}
_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")


def _config(mode: str) -> config_lib.Config:
  if _CONFIG.value is None:
    raise ValueError(f"--mode={mode} needs a config; give --config=NAME, e.g. --config=quickstart")
  config = config_lib.from_config_dict(_CONFIG.value)
  router_table.make(config.model)  # refuses fields that do not suit the router, before anything runs
  return config


def _workdir(mode: str) -> str:
  if not _WORKDIR.value:
    raise ValueError(f"--mode={mode} needs a directory; give --workdir=DIR, e.g. --workdir=runs/quickstart")
  return _WORKDIR.value


def _restore(mode: str) -> tuple[config_lib.Config, step_lib.TrainState, int, jax.sharding.Mesh]:
  """Returns config, newest state, its step and the mesh of a run, which another process may be training."""
  with checkpoint.Checkpoints(_workdir(mode), read_only=True) as checkpoints:
    if checkpoints.latest_step() is None:
      raise ValueError(f"{checkpoints.directory} holds no checkpoint; train first with --mode=train, "
                       "or give the --workdir of a run")
    config = checkpoints.config() if _CONFIG.value is None else _config(mode)
    checkpoints.check(config, run_lib.free_fields(checkpoints.directory.parent, _ACCEPT.value))
    mesh = sharding.make_mesh(config.mesh)
    return config, *loop.restore_or_init(config, mesh, checkpoints), mesh


def _main(argv: Sequence[str]) -> int:
  """Runs the mode; what is wrong with the request is one line and a status."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.FATAL)  # libraries log pages on what we say in a line
  _keep_compiled_programs()
  try:
    if argv[1:]:
      raise ValueError(f"unexpected argument {argv[1]!r}; every option is --name=value")
    _join()
    status = MODES[_MODE.value]()
    sys.stdout.flush()  # here a closed pipe is still an exception that is caught
    distributed.shutdown()
    return status
  except KeyboardInterrupt:
    print("interrupted; run the same command to go on", file=sys.stderr)
    return distributed.abandon(STOPPED)
  except BrokenPipeError:
    return distributed.abandon(_hang_up())
  except FloatingPointError as error:
    return distributed.abandon(_fail(error, DIVERGED))
  except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
    if distributed.is_lost(error):
      error = RuntimeError(f"another process of the run is gone; start all of them again ({str(error)[:200]})")
      return distributed.abandon(_fail(error, LOST))
    if isinstance(error, jax.errors.JaxRuntimeError):
      raise
    return distributed.abandon(_fail(error, WRONG))


def _hang_up() -> int:
  """Returns the status of a program whose reader has gone, as in `| head -1`; what is still buffered goes nowhere."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return UNREAD


def _join() -> None:
  given = {name: flag.value for name, flag in _PROCESSES.items()}
  alone = given == dict.fromkeys(given) | {"mode": "off"}
  if not alone and _MODE.value not in ("train", "eval"):
    raise ValueError(f"--mode={_MODE.value} runs in one process; leave out --distributed, --coordinator, "
                     "--num_processes and --process_id")
  distributed.initialize(**given)
  if _MODE.value not in ("info", "fields", "compile"):
    _find_devices()


def _find_devices() -> None:
  """Raises ValueError if jax has no device of the platform that the environment names."""
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # a platform whose plugin finds no device is an AssertionError
    reason = str(error).partition(". (")[0].splitlines()
    raise ValueError(f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} has no device here"
                     f"{f' ({reason[0]})' if reason else ''}; unset it, or install jax for that platform: "
                     "pip install 'mor[cuda12]' or 'mor[tpu]'") from error


def _fail(error: Exception, status: int) -> int:
  if os.environ.get("MOR_TRACEBACK"):
    raise error
  print(f"error{distributed.process_name()}: {distributed.first_line(error)}", file=sys.stderr)
  return status


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses flags; a mistake in them, or in the config file, ends the program in one line."""
  try:
    return flags.FLAGS(arguments.with_files(argv))
  except Exception as error:  # a config file is a program and may raise anything
    sys.exit(_fail(ValueError(arguments.explain(error, argv)), WRONG))


def _keep_compiled_programs() -> None:
  """Keeps compiled programs on disk, so that a later run of the same program compiles nothing."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = paths.user_cache()
    if cache is None:
      print("warning: no cache directory can be written, so compiled programs are not kept; set XDG_CACHE_HOME to a "
            "directory of yours", file=sys.stderr)
      return
    jax.config.update("jax_compilation_cache_dir", str(cache / "jax"))
  for name, value in (("jax_persistent_cache_min_compile_time_secs", 0.0),
                      ("jax_persistent_cache_min_entry_size_bytes", -1)):
    if name.upper() not in os.environ:
      jax.config.update(name, value)


def run() -> None:
  """Runs the command line."""
  if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of ASCII shows other characters as \\uXXXX
  try:
    app.run(_main, flags_parser=_parse)
  except KeyboardInterrupt:  # while a config file runs, before `_main`
    sys.exit(STOPPED)


if __name__ == "__main__":
  run()
