"""Every request ends in its result or in one line that says what to do."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

from absl import flags
from absl.testing import flagsaver
import pytest

import mor
from mor import main
from mor import report
from mor.train import loop
from tests.helpers import tiny

ROOT = pathlib.Path(__file__).parents[2]
BASE = "--config=base"


def run(*argv):
  """Exit status of a command line, run in this process."""
  with flagsaver.flagsaver(), mock.patch.object(sys, "argv", ["main", *argv]):  # ml_collections reads sys.argv
    try:
      return main._main(main._parse(sys.argv))
    except SystemExit as end:
      return end.code
    finally:
      for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
  """A workdir with a checkpoint, and the flags that made it."""
  directory = tmp_path_factory.mktemp("main")
  config = tiny.config(tiny.BYTES, data=dict(source=tiny.write_text(directory), cache_dir=str(directory / "cache")),
                       train=dict(steps=2))
  outcome = loop.train(config, directory / "run", report.finish)
  return directory / "run", outcome


@pytest.mark.parametrize("argv, said", [
    ([BASE, "--config.train.stepz=3"], "--config.train.stepz=3: unknown config field; did you mean --config.train.steps? --mode=fields lists all"),
    ([BASE, "--config.modle.d_ff=3"], "unknown config field; did you mean --config.model.d_ff?"),
    ([BASE, "--config.model.alpha=3"], "unknown config field; did you mean --config.model.router.alpha?"),
    ([BASE, "--config.zzz=3"], "--config.zzz=3: unknown config field; --mode=fields lists all"),
    ([BASE, "--config.train.steps=many"], "--config.train.steps=many: invalid literal for int()"),
    (["--config.train.steps=3"], "--config.train.steps without --config; give --config=NAME"),
    (["--config.train.steps=3", BASE], "give --config=NAME first"),
    (["--config=configs/nope.py"], "--config=configs/nope.py: no such file; use one of base, exit_smollm2, paper"),
    (["--config", "configs/nope.py"], "--config=configs/nope.py: no such file"),
    (["--config=nope:a"], "--config=nope: no such file; use one of base, exit_smollm2, paper"),
    (["--config=configs/paper.py:mor-999m"], "configs/paper.py:mor-999m is not in the family; use"),
    (["--config=paper:mor-999m"], "configs/paper.py:mor-999m is not in the family; use"),
    (["--config=README.md"], "the config file fails with SyntaxError"),
    (["--mode=dance"], "--mode=dance: value should be one of <train|eval|generate|calibrate|convert|export|info"),
    (["--nope=3"], "Unknown command line flag 'nope'; --help lists all"),
    ([BASE, "train"], "unexpected argument 'train'; every option is --name=value"),
    (["--mode=train"], "--mode=train needs a config; give --config=NAME"),
    ([BASE], "--mode=train needs a directory; give --workdir=DIR"),
    (["--mode=eval"], "--mode=eval needs a directory"),
    (["--mode=eval", "--workdir=.", "--recursions=2,0"], "--recursions=2,0; give positive numbers, e.g. --recursions=1,2,4"),
    (["--mode=generate", "--prompt=a"], "--mode=generate needs a directory"),
    (["--mode=generate", "--workdir=."], "give --prompt=TEXT or --prompt_file=FILE"),
    (["--mode=generate", "--workdir=.", "--prompt=a", "--prompt_file=b"], "give --prompt=TEXT or --prompt_file=FILE"),
    (["--mode=generate", "--batching=wide"], "--batching=wide: value should be one of <depth|sequence|none>"),
    (["--mode=generate", "--top_k=many"], "--top_k=many"),
    (["--mode=info", BASE, "--config.model.num_layers=9"], "model.num_layers=9 does not fit middle_cycle"),
    (["--mode=info", BASE, "--config.model.router.capacity=(1.0,0.5)"], "has 2 entries for 3 recursions; give 3"),
    (["--mode=info", BASE, "--budget=-1"], "budget=-1"),
    (["--mode=info", BASE, "--distributed=auto"], "--mode=info runs in one process; leave out --distributed"),
    ([BASE, "--workdir=.", "--process_id=0"], "--process_id=0 without --coordinator and --num_processes; give all"),
    ([BASE, "--workdir=.", "--distributed=on"], "--distributed=on: value should be one of <off|auto>"),
    (["--mode=info", BASE, "--budget=much"], "--budget=much: could not convert string to float"),
])
def test_a_mistake_is_one_line(argv, said, capsys):
  assert run(*argv) == main.WRONG
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize("argv, said", [
    (["--config.data.source=nowhere.txt"], "nowhere.txt"),
    (["--config.data.tokenizer=bytes", "--config.model.vocab_size=100"], "model.vocab_size=257 or more"),
    (["--config.mesh.data=99"], "does not fit 8 device(s)"),
])
def test_a_run_that_cannot_start_creates_nothing(argv, said, tiny_run, tmp_path, capsys):
  source = f"--config.data.source={tiny_run[0].parent / 'tiny.jsonl'}"
  cache = f"--config.data.cache_dir={tmp_path / 'cache'}"
  assert run(BASE, f"--workdir={tmp_path / 'run'}", source, cache, *argv) == main.WRONG
  err = capsys.readouterr().err
  assert err.startswith("error: ") and said in err and err.count("\n") == 1
  assert not (tmp_path / "run").exists()


def test_info_is_one_json_object(capsys):
  assert run("--mode=info", BASE, "--budget=16.5e18") == 0
  info = json.loads(capsys.readouterr().out)
  assert {"params_embedding", "params_non_embedding", "flops_per_token_forward", "flops_per_token_forward_no_head",
          "kv_bytes_per_token", "steps"} <= set(info)
  assert info["params_embedding"] == 4096 * 192


@pytest.mark.parametrize("config", [
    ["--config=paper:mor-730m-r2"], ["--config", "paper:mor-730m-r2"], [f"--config={ROOT}/configs/paper.py:mor-730m-r2"]])
def test_an_experiment_runs_from_any_directory(config, monkeypatch, capsys):
  monkeypatch.chdir("/")
  assert run("--mode=info", *config, "--config.model.vocab_size=1000") == 0
  assert json.loads(capsys.readouterr().out)["params_embedding"] == 1000 * 1536


def test_fields_are_listed_with_value_help_and_allowed_values(capsys):
  assert run("--mode=fields") == 0
  lines = capsys.readouterr().out.splitlines()
  assert "--config.model.d_model=192  # width of hidden states (D); int" in lines
  assert "--config.data.cache_dir=''  # directory of token arrays and trained tokenizers; '' is <user cache>/mor; str" in lines
  assert any(line.startswith("--config.optim.schedule=wsd  # ") and line.endswith("; one of wsd, cosine, constant")
             for line in lines)
  assert run("--mode=fields", "--config=quickstart", "--config.model.router.capacity=(1.0, 0.5, 0.25)") == 0
  again = capsys.readouterr().out.splitlines()
  assert len(again) == len(lines)
  assert "--config.model.num_layers=5  # unrolled layers, prelude and coda included; int" in again
  line, = (line for line in again if line.startswith("--config.model.router.capacity="))
  assert line.startswith("--config.model.router.capacity='(1.0, 0.5, 0.25)'  # ") and line.endswith("; tuple of float")


def test_eval_repeats_the_figures_of_the_end(tiny_run, capsys):
  workdir, outcome = tiny_run
  assert run("--mode=eval", f"--workdir={workdir}") == 0
  figures = json.loads(capsys.readouterr().out)
  assert figures == {name: outcome.summary[name] for name in figures} and figures["step"] == 2
  assert {"bpb_causal", "bpb_oracle", "bpb_gzip", "bpb_xz"} <= set(figures)


def test_eval_runs_a_plain_recursion_with_any_number_of_steps(tmp_path, capsys):
  data = dict(source=tiny.write_text(tmp_path), cache_dir=str(tmp_path / "cache"))
  config = tiny.config(tiny.BYTES, model=dict(router=tiny.FIXED, num_layers=5), data=data, train=dict(steps=2))
  loop.train(config, tmp_path / "run")
  capsys.readouterr()
  assert run("--mode=eval", f"--workdir={tmp_path / 'run'}") == 0
  trained = json.loads(capsys.readouterr().out)
  assert run("--mode=eval", f"--workdir={tmp_path / 'run'}", "--recursions=3,1") == 0
  same, other = map(json.loads, capsys.readouterr().out.splitlines())
  assert same == trained | dict(recursions=3)
  assert other["recursions"] == 1 and other["nll_causal"] != same["nll_causal"]
  assert other["targets"] == same["targets"]


def test_eval_at_other_steps_than_a_router_has_is_one_line(tiny_run, capsys):
  assert run("--mode=eval", f"--workdir={tiny_run[0]}", "--recursions=2") == main.WRONG
  out, err = capsys.readouterr()
  assert out == "" and "error: 2 recursion steps of a model with model.num_recursions=3" in err and err.count("\n") == 1


def test_an_empty_name_of_a_text_is_not_the_held_out_text(tiny_run, capsys):
  assert run("--mode=eval", f"--workdir={tiny_run[0]}", "--eval_text=") == main.WRONG
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("error: data source '': no such file") and err.count("\n") == 1


def test_generate_asks_the_newest_checkpoint(tiny_run, capsys):
  argv = ["--mode=generate", f"--workdir={tiny_run[0]}", "--prompt=Un", "--max_tokens=5", "--temperature=2", "--seed=3"]
  assert run(*argv) == 0
  wanted, = mor.load(tiny_run[0]).generate(["Un"], max_tokens=5, temperature=2.0, seed=3)
  assert capsys.readouterr().out.startswith(f"Un{wanted.text}\n\n")


@pytest.mark.parametrize("mode", ["eval", "generate"])
def test_a_workdir_without_a_checkpoint_is_named(mode, tmp_path, capsys):
  assert run(f"--mode={mode}", f"--workdir={tmp_path}", "--prompt=a") == main.WRONG
  assert f"error: {tmp_path}/checkpoints holds no checkpoint; train first" in capsys.readouterr().err


def test_a_checkpoint_of_another_config_is_refused(tiny_run, capsys):
  assert run(BASE, f"--workdir={tiny_run[0]}") == main.WRONG
  err = capsys.readouterr().err
  assert err.startswith("error: ") and "holds a checkpoint of another config: data.batch_size=8 (there 4)" in err
  assert "another --workdir" in err and err.count("\n") == 1


@pytest.mark.parametrize("error, status, said", [
    (FloatingPointError("loss=nan at step 3"), main.DIVERGED, "error: loss=nan at step 3\n"),
    (OSError("cannot save\nbecause"), main.WRONG, "error: cannot save\n"),
    (KeyboardInterrupt(), main.STOPPED, "interrupted; run the same command to go on\n"),
])
def test_exit_status(error, status, said, tmp_path, capsys, monkeypatch):
  def fail(*unused):
    raise error

  monkeypatch.setattr(loop, "train", fail)
  assert run(BASE, f"--workdir={tmp_path}") == status
  assert capsys.readouterr().err == said


def test_a_stopped_run_exits_with_a_status_to_try_again(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(loop, "train", lambda *unused: loop.Outcome(3, None, "stopped at step 3"))
  assert run(BASE, f"--workdir={tmp_path}") == main.STOPPED == os.EX_TEMPFAIL
  assert capsys.readouterr().out == "stopped at step 3\n"


def test_a_traceback_is_shown_on_demand(monkeypatch):
  monkeypatch.setenv("MOR_TRACEBACK", "1")
  with pytest.raises(ValueError, match="needs a config"):
    run("--mode=info")


def test_the_program_itself_exits_so():
  done = subprocess.run([sys.executable, "-m", "mor.main", "--mode=info", BASE, "--config.train.stepz=3"],
                        capture_output=True, text=True, check=False)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr.startswith("error: --config.train.stepz=3: unknown") and done.stderr.count("\n") == 1


def test_a_reader_that_has_gone_ends_the_program_quietly(monkeypatch, capsys):
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, "w") as closed:
    monkeypatch.setattr(sys, "stdout", closed)
    assert run("--mode=fields") == 128 + signal.SIGPIPE
  assert capsys.readouterr().err == ""
