"""`--mode=calibrate` tells of a text what the engine's monitor tells, stores a threshold, and `generate` uses it."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

import mor
from mor.exits import calibration
from mor.exits import pairs
from mor.exits import policy as exits_lib
from mor.exits import stored as stored_lib
from mor.serve import cli
from mor.serve import early_exit
from mor.serve import engine as engine_lib
from mor.serve import request as request_lib
from mor.train import loop
from tests.helpers import exiting
from tests.helpers import serving
from tests.helpers import tiny
from tests.house import test_main

EXITS = exits_lib.Exits(after=(2,))
STORED = stored_lib.StoredExits(
    after=(2,), measure="margin", first=0, method="learn_then_test", options={"delta": 0.2}, threshold=0.25, num_pairs=9,
    exit_rate=0.5, agreement=0.75, text="held-out", text_sha256="ab", step=2)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A short run of a plain model on bytes."""
  directory = tmp_path_factory.mktemp("calibrate")
  config = tiny.config(
      tiny.BYTES, data=dict(source=tiny.write_text(directory), cache_dir=str(directory / "cache")),
      model=dict(tiny.VANILLA, num_layers=3), train=dict(steps=2))
  loop.train(config, directory / "run")
  return directory / "run"


@pytest.fixture
def run(workdir):
  """The command line, for that run; without stored exits before and after."""
  (workdir / stored_lib.NAME).unlink(missing_ok=True)
  yield lambda *argv: test_main.run(f"--workdir={workdir}", *argv)
  (workdir / stored_lib.NAME).unlink(missing_ok=True)


def padded(sequences):
  """Tokens and segments of one batch."""
  tokens_BT = np.zeros((len(sequences), serving.CONTEXT), np.int32)
  for tokens_T, sequence in zip(tokens_BT, sequences):
    tokens_T[:len(sequence)] = sequence
  length_B1 = np.array([[len(sequence)] for sequence in sequences])
  return tokens_BT, (np.arange(serving.CONTEXT)[None, :] < length_B1).astype(np.int32)


@pytest.mark.parametrize("kind, fields", [
    ("plain", {}),
    pytest.param("middle", dict(measure="saturation", first=20), marks=pytest.mark.slow),
    pytest.param("token_choice", dict(measure="entropy"), marks=pytest.mark.slow),
    pytest.param("expert_choice", dict(measure="maximum"), marks=pytest.mark.slow),
])
def test_pairs_are_those_of_the_monitor(kind, fields):
  model, exits = exiting.model(kind), exiting.exits(kind, after=exiting.KINDS[kind][1][:1], monitor=True, **fields)
  calibrator = calibration.Calibrator("learn_then_test", interval=4096)
  engine = exiting.engine(model, kind, dict(after=exits.after, monitor=True, **fields), calibrator=calibrator)
  requests = serving.requests(8, **exiting.GREEDY, repetition_penalty=1.0, stop_tokens=[], exit="trust", threshold=1.0)
  answers = exiting.answers(engine, requests)
  sequences = [(prompt + c.tokens)[:serving.CONTEXT] for (prompt, _), c in zip(requests, answers)]
  sure_EM, agreed_EM, looked_EM = pairs.collect(
      model.config, model.variables, exits, [padded(sequences)], model.vocab_size)
  new_M = np.concatenate([
      (np.arange(len(s)) >= len(p) - 1) & (np.arange(len(s)) < len(p) - 1 + len(c.tokens))
      for s, (p, _), c in zip(sequences, requests, answers)])
  told_M = new_M & looked_EM[0]
  state = calibrator.state()
  seen = sorted(zip(state["confidence"], state["agreed"]))
  assert len(seen) > 20 and {True, False} == set(agreed_EM[0, told_M].tolist())
  np.testing.assert_allclose(seen, sorted(zip(sure_EM[0, told_M], agreed_EM[0, told_M])), rtol=0, atol=1e-4)


def test_several_exits_tell_what_each_tells_alone_and_agreement_compares_them():
  model, rows = exiting.model("plain"), [padded([[3, 1, 4, 1, 5, 9], list(range(30))])]
  collect = lambda **fields: pairs.collect(model.config, model.variables, exits_lib.Exits(**fields), rows, 61)
  both = collect(after=(2, 4))
  for i, after in enumerate((2, 4)):
    for whole_EM, alone_EM in zip(both, collect(after=(after,))):
      np.testing.assert_allclose(whole_EM[i], alone_EM[0], rtol=0, atol=1e-6)
  assert both[0].shape == (2, 36) and both[2].all()
  sure_EM, *_ = collect(after=(2, 4), measure="agreement")
  assert not sure_EM[0].any() and set(sure_EM[1].tolist()) == {0.0, 1.0}


def test_a_token_has_one_pair_whose_loss_is_no_less():
  rng = np.random.default_rng(0)
  sure_EM, agreed_EM, looked_EM = rng.random((3, 400)), rng.random((3, 400)) < 0.6, rng.random((3, 400)) < 0.8
  looked_EM &= np.logical_and.accumulate(looked_EM)
  sure_M, agreed_M = pairs.reduce_to_tokens(sure_EM, agreed_EM, looked_EM)
  arrives_M = looked_EM.any(axis=0)
  assert len(sure_M) == arrives_M.sum() < 400
  for threshold in np.linspace(0, 1, 21):
    leaves_EM = (looked_EM & (sure_EM > threshold))[:, arrives_M]
    first_M = np.argmax(leaves_EM, axis=0)
    wrong_M = leaves_EM.any(axis=0) & ~np.take_along_axis(agreed_EM[:, arrives_M], first_M[None], axis=0)[0]
    bound_M = (sure_M > threshold) & ~agreed_M
    assert (bound_M >= wrong_M).all()
  for one, kept in zip(pairs.reduce_to_tokens(sure_EM[:1], agreed_EM[:1], looked_EM[:1]), (sure_EM, agreed_EM)):
    np.testing.assert_array_equal(one, kept[0, looked_EM[0]])


def test_the_command_stores_what_generate_uses(run, workdir, capsys):
  assert run("--mode=calibrate", "--exit_after=2", "--exit_measure=maximum", "--calibration_risk=0.999",
             "--calibration_tokens=48") == 0
  printed = json.loads(capsys.readouterr().out)
  stored = stored_lib.read(workdir)
  assert printed == json.loads((workdir / "exits.json").read_text()) == dataclasses.asdict(stored) | {"after": [2]}
  assert (stored.after, stored.measure, stored.options, stored.step) == ((2,), "maximum", {"delta": 0.999}, 2)
  assert stored.num_pairs == 48 and stored.text == "held-out"
  model = mor.load(workdir)
  assert model.stored_exits == stored and model.step == 2

  engine = engine_lib.Engine(model, num_slots=1, exits=stored.exits)
  wanted, = engine.generate(["Un"], max_tokens=6, temperature=0.0, exit="trust", threshold=stored.threshold)
  assert engine.generate(["Un"], max_tokens=6, temperature=0.0, exit="trust") == [wanted]
  assert run("--mode=generate", "--prompt=Un", "--max_tokens=6", "--temperature=0", "--exit=trust") == 0
  out, err = capsys.readouterr()
  assert out.startswith("Un" + wanted.text) and err == ""


def test_a_file_of_text(run, workdir, tmp_path):
  text = "of the state of the union,\r\n" * 3
  (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte order mark is no text
  assert run("--mode=calibrate", "--exit_after=1,2", f"--calibration_text={tmp_path / 'text.txt'}",
             "--calibration_method=beta_mixture", "--calibration_agreement=0.8") == 0
  stored = stored_lib.read(workdir)
  assert stored.num_pairs == 1 + len(text) and stored.options == {"precision": 0.8}
  assert stored.text_sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("argv, said", [
    ([], "the run was trained without exits; give --exit_after=LAYERS"),
    (["--exit_after=3"], "this model has exits after layers 1, 2"),
    (["--exit_after=two"], "--exit_after=two; use numbers of layers"),
    (["--exit_after=2", "--exit_measure=agreement"], "two or more for the measure 'agreement'"),
    (["--exit_after=2", "--exit_kv=copied"], "leave it out, and give it to --mode=generate"),
    (["--exit_after=2", "--calibration_risk=2"], "delta=2.0; use a number in (0, 1)"),
    (["--exit_after=2", "--calibration_agreement=0.9"], "give --calibration_method=beta_mixture, or leave it out"),
    (["--exit_after=2", "--calibration_tokens=0"], "--calibration_tokens=0; use a count >= 1"),
    (["--exit_after=2", "--calibration_text=nowhere.txt"], "nowhere.txt"),
    (["--exit_after=2", "--calibration_text=mor/train/__init__.py"], "no text in it"),
    (["--exit_after=2", "--calibration_text=mor/data/corpora/sotu.txt.xz"], "sotu.txt.xz: not UTF-8 ("),
])
def test_a_mistake_is_one_line_and_stores_nothing(run, workdir, argv, said, capsys):
  assert run("--mode=calibrate", *argv) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
  assert not (workdir / "exits.json").exists()


def test_other_exits_do_not_get_the_stored_threshold(run, workdir, capsys):
  stored_lib.write(workdir, STORED)
  generate = ("--mode=generate", "--prompt=Un", "--max_tokens=2", "--exit=trust")
  for other in ("--exit_after=1", "--exit_measure=entropy", "--exit_first=9"):
    assert run(*generate, other) == 2
    assert "calibrated for --exit_after=2 --exit_measure=margin --exit_first=0; give these" in capsys.readouterr().err


def test_flags_change_stored_exits():
  model = dataclasses.replace(exiting.model("plain"), stored_exits=STORED, step=2)
  assert cli.choose_exits(model, {}, {}) == {} == cli.choose_exits(model, {}, {"exit": "none"})
  assert cli.choose_exits(model, {}, {"exit": "verify"}) == {"exits": EXITS}
  assert cli.choose_exits(model, {"kv": "copied"}, {}) == {"exits": dataclasses.replace(EXITS, kv="copied")}
  assert cli.choose_exits(model, {"after": (4,)}, {})["exits"].after == (4,)


def test_drafts_of_other_exits_take_the_constant():
  def resolve(exits, mode="verify"):
    return early_exit.resolve(exits, request_lib.make([1], exit=mode), None, STORED).threshold
  assert resolve(EXITS) == resolve(EXITS, "trust") == 0.25
  assert resolve(exits_lib.Exits(after=(4,))) == exits_lib.VERIFY_THRESHOLD


def test_a_threshold_of_another_step_is_told(capsys):
  model = dataclasses.replace(exiting.model("plain"), stored_exits=STORED, step=7)
  cli.choose_exits(model, {}, {"exit": "trust"})
  assert "calibrated at step 2, and the model is of step 7" in capsys.readouterr().err
  cli.choose_exits(model, {}, {"exit": "trust", "threshold": 0.5})
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", [
    lambda fields: "{", lambda fields: "[]", lambda fields: "[" * 100_000, lambda fields: "7", lambda fields: "", lambda fields: json.dumps(fields | {"threshold": 2}),
    lambda fields: json.dumps(fields | {"threshold": "high"}), lambda fields: json.dumps(fields | {"measure": "luck"}),
    lambda fields: json.dumps(fields | {"more": 1}), lambda fields: json.dumps(fields | {"after": []}),
    lambda fields: json.dumps({k: v for k, v in fields.items() if k != "step"}),
])
def test_a_damaged_file_is_one_line(change, tmp_path):
  stored_lib.write(tmp_path, STORED)
  assert stored_lib.read(tmp_path) == STORED and [p.name for p in tmp_path.iterdir()] == ["exits.json"]
  (tmp_path / "exits.json").write_text(change(json.loads((tmp_path / "exits.json").read_text())))
  with pytest.raises(ValueError, match="exits.json is damaged .*; write it again with --mode=calibrate") as error:
    stored_lib.read(tmp_path)
  assert "\n" not in str(error.value)
