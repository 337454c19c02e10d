"""A run is used, and goes on, wherever its workdir is: with its own tokenizer, and on its own texts or by consent."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

import mor
from mor import checkpoint
from mor import run as run_lib
from mor.conversion import command
from mor.data import text
from mor.data import tokenizer as tokenizer_lib
from mor.serve import calibrate
from mor.study import plan as study_plan
from mor.study import run as study_run
from mor.train import loop
from tests.helpers import checkpoints as checkpoint_files
from tests.helpers import tiny

BPE = dict(model=dict(vocab_size=300), data=dict(tokenizer="bpe:300"), optim=dict(schedule="constant"))


def write_texts(directory: pathlib.Path) -> str:
  """Three files of text; returns their glob."""
  directory.mkdir(parents=True, exist_ok=True)
  words = "the state of a union is what we make and what they keep of it in plain old words".split()
  rng = np.random.default_rng(0)
  for name in "abc":
    (directory / f"{name}.txt").write_text(" ".join(rng.choice(words, 200)) + ".\n")
  return f"{directory}/*.txt"


@pytest.fixture(scope="module", autouse=True)
def stepless():
  """Runs that save their last step at once: the record does not depend on what the steps compute."""
  def run_steps(config, mesh, corpus, state, start, teacher, evaluate, checkpoints, session, log, stop):
    step = config.train.steps
    checkpoints.save(step, state, config)
    session.save(step)
    checkpoints.wait()
    return state, step

  with mock.patch.object(loop, "_run_steps", run_steps):
    yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of 2 steps with its own BPE, its config, and whether its record was there before the first step."""
  directory = tmp_path_factory.mktemp("run")
  config = tiny.config(BPE, data=dict(source=write_texts(directory / "texts"), cache_dir=str(directory / "cache")),
                       train=dict(steps=2))
  workdir, steps, before = directory / "workdir", loop._run_steps, []

  def run_steps(*args):
    before.append(json.loads((workdir / "run.json").read_text()))
    return steps(*args)

  with mock.patch.object(loop, "_run_steps", run_steps):
    loop.train(config, workdir)
  return workdir, config, before[0]


@pytest.fixture
def moved(trained, tmp_path):
  """The run in another folder, with the config of a machine that has neither its texts nor its cache."""
  workdir, config, _ = trained
  shutil.copytree(workdir, tmp_path / "there" / "run")
  data = dataclasses.replace(config.data, source=str(tmp_path / "nowhere" / "*.txt"), cache_dir=str(tmp_path / "empty"))
  return tmp_path / "there" / "run", dataclasses.replace(config, data=data)


def longer(config, steps=4, **data):
  return dataclasses.replace(config, data=dataclasses.replace(config.data, **data),
                             train=dataclasses.replace(config.train, steps=steps))


def test_the_record_is_there_before_the_first_step(trained):
  workdir, config, before = trained
  record = run_lib.read(workdir)
  tokenizer = text.load_tokenizer(config.data)
  assert record.tokenizer == run_lib.TokenizerRecord("bpe:300", tokenizer.identity, tokenizer.eos_id, 300)
  assert (workdir / "run/tokenizer.json").read_text() == tokenizer.serialized
  data, = record.data
  assert data.since_step == 0 and data.identity.source == config.data.source
  for file in data.identity.files:
    assert (file.size, file.reader) == (os.path.getsize(file.path), ".txt") and len(file.sha256) == 64
  assert [pathlib.Path(file.path).name for file in data.identity.files] == ["a.txt", "b.txt", "c.txt"]
  session, = record.sessions
  assert (session["first_step"], session["last_step"]) == (0, 2) and session["wall_seconds"] > 0
  assert session["versions"]["jax"] and session["device"]["count"] == 8 and session["command"]
  assert {k: v for k, v in before.items() if k != "sessions"} == {
      k: v for k, v in json.loads((workdir / "run.json").read_text()).items() if k != "sessions"}
  assert before["sessions"][0]["last_step"] == 0


def test_a_moved_run_needs_no_corpus(trained, moved, monkeypatch, tmp_path):
  workdir, config = moved
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(checkpoint.Checkpoints, "config", lambda unused: config)  # nothing of the old machine is left
  model = mor.load(workdir)
  assert model.tokenizer.identity == run_lib.read(trained[0]).tokenizer.identity
  assert model.request("the state").prompt == mor.load(trained[0]).request("the state").prompt
  command.export(workdir, "hf", tmp_path / "exported", "float32")
  assert (tmp_path / "exported" / "tokenizer.json").is_file()
  with pytest.raises(FileNotFoundError, match=r"no such file, which the run of .* reads; put the texts back, or give "
                     "their new place with --config.data.source"):
    loop.train(longer(config), workdir)
  assert not (tmp_path / "empty").exists() and not (tmp_path / "home").exists()


def test_the_same_texts_elsewhere_go_on(trained, tmp_path):
  workdir, config, _ = trained
  source = write_texts(tmp_path / "elsewhere")
  os.utime(tmp_path / "elsewhere" / "a.txt", (1, 1))
  corpus = run_lib.load_corpus(workdir, longer(config, source=source))
  assert corpus.identity.digest == run_lib.read(workdir).data[0].identity.digest
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    checkpoints.check(longer(config, source=source), run_lib.free_fields(workdir))


@pytest.mark.parametrize("change, said", [
    (lambda d: (d / "d.txt").write_text("more"), "d.txt is new"),
    (lambda d: (d / "b.txt").unlink(), "b.txt is gone"),
    (lambda d: (d / "b.txt").write_text("B" * 9), r"b.txt has other text \(9 bytes, there "),
    (lambda d: (d / "b.txt").rename(d / "z.txt"), "b.txt is gone")])
def test_other_texts_are_refused_by_name(change, said, trained, tmp_path):
  workdir, config, _ = trained
  source = write_texts(tmp_path / "texts")
  change(tmp_path / "texts")
  with pytest.raises(ValueError, match=rf"data.source=.* is not the text that .* was trained on: .*{said}.*identity "
                     r"\w{12}, there \w{12}.*--accept_new_data"):
    run_lib.load_corpus(workdir, longer(config, source=source))


def test_a_run_goes_on_with_other_texts_by_consent(moved, tmp_path, capsys):
  workdir, config = moved
  source = write_texts(tmp_path / "texts")
  (tmp_path / "texts" / "d.txt").write_text("other words " * 40)
  other = longer(config, source=source)
  with pytest.raises(ValueError, match="d.txt is new"):
    loop.train(other, workdir)
  assert len(run_lib.read(workdir).sessions) == 1
  loop.train(other, workdir, accept_new_data=True)
  said = capsys.readouterr().err
  assert "resuming at step 2, session 2" in said and "from step 2 on with other texts" in said
  record = run_lib.read(workdir)
  assert [data.since_step for data in record.data] == [0, 2]
  assert [(one["first_step"], one["last_step"]) for one in record.sessions] == [(0, 2), (2, 4)]
  assert mor.load(workdir).tokenizer.identity == record.tokenizer.identity  # not trained again
  loop.train(longer(config, 5, source=source), workdir)  # what was accepted once is the data of the run


def test_another_tokenizer_is_refused(trained, moved, tmp_path):
  workdir, config, _ = trained
  given = tmp_path / "other.json"
  given.write_text(checkpoint_files.tokenizer().to_str())
  for name in ("bytes", "bpe:301", str(given)):
    with pytest.raises(ValueError, match=r"data.tokenizer=.* is not the tokenizer that .* was trained with, 'bpe:300' "
                       r"\(identity \w{12}\)"):
      run_lib.load_corpus(workdir, longer(config, tokenizer=name))
    with pytest.raises(ValueError, match=r"data.tokenizer=.* is not the tokenizer"):
      run_lib.check_tokenizer(workdir, longer(config, tokenizer=name).data)
  same = tmp_path / "same.json"  # the same one in other words
  same.write_text(json.dumps(json.loads((workdir / "run/tokenizer.json").read_text()), indent=3))
  run_lib.load_corpus(workdir, longer(config, tokenizer=str(same)))
  run_lib.check_tokenizer(workdir, longer(config, tokenizer=str(same)).data)


@pytest.mark.parametrize("harm, said", [
    (lambda d: (d / "run/tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda d: (d / "run/tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
    (lambda d: (d / "run/tokenizer.json").write_text(checkpoint_files.tokenizer().to_str()),
     "is not the tokenizer that the run was trained with"),
    (lambda d: (d / "run.json").write_text("[]"), "run.json is damaged"),
    (lambda d: (d / "run.json").write_text('{"tokenizer": {"name": 1}}'), "run.json is damaged")])
def test_a_damaged_record_is_one_line(harm, said, moved):
  harm(moved[0])
  with pytest.raises((ValueError, OSError), match=said) as error:
    run_lib.load_tokenizer(moved[0], moved[1].data)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("find, name, value", [
    (lambda record: record.tokenizer, "identity", 1), (lambda record: record.data[0], "since_step", "0"),
    (lambda record: record.data[0].identity, "settings", []), (lambda record: record.data[0].identity.files[0], "size", None)])
def test_every_field_of_a_record_has_its_type(find, name, value, trained):
  record = run_lib.read(trained[0])
  object.__setattr__(find(record), name, value)  # past the type checker of the tests
  with pytest.raises(TypeError, match=f"{name} is of type {type(value).__name__}"):
    run_lib._check_types(record)


def test_a_run_of_an_older_version_gets_its_record(trained, moved):
  workdir, config = moved
  shutil.rmtree(workdir / "run")
  (workdir / "run.json").unlink()
  config = longer(config, 2, source=trained[1].data.source, cache_dir=trained[1].data.cache_dir)
  assert run_lib.load_tokenizer(workdir, config.data).identity == run_lib.read(trained[0]).tokenizer.identity
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    with pytest.raises(ValueError, match="another config: data.source"):
      checkpoints.check(longer(config, source="x"), run_lib.free_fields(workdir))
  loop.train(config, workdir)
  assert run_lib.read(workdir).tokenizer == run_lib.read(trained[0]).tokenizer


def test_before_the_first_checkpoint_everything_may_change(trained, tmp_path):
  workdir, config, _ = trained
  shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
  corpus = run_lib.load_corpus(tmp_path / "run", longer(config, tokenizer="bytes"))
  run_lib.Session(tmp_path / "run", longer(config, tokenizer="bytes"), corpus, 0)
  assert run_lib.read(tmp_path / "run").tokenizer.name == "bytes"
  assert run_lib.load_tokenizer(tmp_path / "run", config.data).identity == tokenizer_lib.ByteTokenizer.identity


def test_calibration_and_a_study_refuse_other_texts(moved, tmp_path):
  workdir, config = moved
  source = write_texts(tmp_path / "texts")
  (tmp_path / "texts" / "d.txt").write_text("more")
  changed = longer(config, source=source)
  with mock.patch.object(checkpoint.Checkpoints, "config", lambda unused: changed):
    with pytest.raises(ValueError, match="d.txt is new.*--calibration_text"):
      calibrate.run(workdir, {"after": (3,)}, {})
  assert study_run._has_started(workdir) and not study_run._has_started(tmp_path)


def test_a_fork_of_a_study_carries_its_tokenizer(trained, tmp_path):
  workdir, config, _ = trained
  shutil.copytree(workdir, tmp_path / "full")
  one = object.__new__(study_plan.Run)
  for name, value in dict(full=config, short=config, fork=2).items():
    object.__setattr__(one, name, value)
  study_run.fork(one, tmp_path)
  assert run_lib.read(tmp_path / "short") == run_lib.Record(run_lib.read(workdir).tokenizer)
  assert (tmp_path / "short/run/tokenizer.json").read_bytes() == (workdir / "run/tokenizer.json").read_bytes()


def test_a_converted_run_carries_its_tokenizer(trained, moved, tmp_path):
  """Also that of a run with its own BPE, whose texts are gone."""
  workdir, config = moved
  command.convert(config, f"mor:{workdir}", tmp_path / "new")
  assert mor.load(tmp_path / "new").tokenizer.identity == run_lib.read(workdir).tokenizer.identity
  with pytest.raises(ValueError, match="data.tokenizer='bytes' is not the source's tokenizer"):
    command.convert(longer(config, tokenizer="bytes"), f"mor:{workdir}", tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_the_commit_is_that_of_the_package():
  root = pathlib.Path(run_lib.__file__).parents[1]
  assert (run_lib.commit() is not None) == (root / ".git").exists()


@pytest.mark.slow
def test_the_command_line_of_a_moved_run(tmp_path):
  """Trains, moves the workdir away from its corpus, its cache and its HOME, and uses every mode on it."""
  root = pathlib.Path(run_lib.__file__).parents[1]

  def run(home, *args):
    environment = {**os.environ, "HOME": str(tmp_path / home), "PYTHONPATH": str(root)}
    environment.pop("XDG_CACHE_HOME", None)
    return subprocess.run([sys.executable, "-m", "mor.main", *args], capture_output=True, text=True, check=False,
                          env=environment, cwd=tmp_path)

  small = ["--config=base", "--config.data.tokenizer=bpe:300", "--config.model.vocab_size=300", "--config.model.d_model=16",
           "--config.model.num_heads=2", "--config.model.num_kv_heads=1", "--config.model.head_dim=8",
           "--config.model.d_ff=32", "--config.data.seq_len=16", "--config.data.batch_size=8", "--config.train.steps=4",
           "--config.optim.warmup_steps=1", f"--config.data.source={write_texts(tmp_path / 'texts')}"]
  done = run("home", *small, f"--workdir={tmp_path}/run")
  assert done.returncode == 0, done.stderr
  shutil.move(tmp_path / "run", tmp_path / "moved here")
  shutil.rmtree(tmp_path / "texts")
  shutil.rmtree(tmp_path / "home")
  (tmp_path / "other.txt").write_text("the state of the union is what we make of it. " * 20)
  workdir = f"--workdir={tmp_path}/moved here"
  done = run("new", "--mode=generate", workdir, "--prompt=the state", "--max_tokens=4")
  assert done.returncode == 0 and "the state" in done.stdout, done.stderr
  done = run("new", "--mode=eval", workdir, f"--eval_text={tmp_path}/other.txt")
  assert done.returncode == 0 and 0 < json.loads(done.stdout)["bpb_causal"] < 20, done.stderr
  done = run("new", "--mode=export", workdir, f"--output={tmp_path}/exported")
  assert done.returncode == 0 and (tmp_path / "exported" / "tokenizer.json").is_file(), done.stderr
  for mode in ("eval", "calibrate"):
    done = run("new", f"--mode={mode}", workdir, *(["--exit_after=3"] if mode == "calibrate" else []))
    assert done.returncode == 2 and "no such file, which the run of" in done.stderr, done.stderr
  done = run("new", *small, workdir)
  assert done.returncode == 2 and "put the texts back, or give their new place" in done.stderr, done.stderr
  write_texts(tmp_path / "texts")
  (tmp_path / "texts" / "d.txt").write_text("more")
  done = run("new", *small, workdir)
  assert done.returncode == 2 and "d.txt is new" in done.stderr and "--accept_new_data" in done.stderr, done.stderr
