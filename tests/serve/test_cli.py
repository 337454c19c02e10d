"""`--mode=generate` gives what `generate` gives, and a wrong prompt of a file fails alone."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest

from mor.data import tokenizer as tokenizer_lib
from mor.exits import policy as exits_lib
from mor.serve import cli as command
from mor.serve import engine as engine_lib
from mor.serve import model as model_lib
from mor.serve import request as request_lib
from tests.helpers import tiny
from tests.helpers import weights as test_weights
from tests.house import test_main

OPTIONS = dict(max_tokens=6, temperature=1.5)
FLAGS = ["--mode=generate", "--workdir=unread", "--max_tokens=6", "--temperature=1.5"]
FIGURES = re.compile(r"\d+ tokens, [\d.]+ tokens/s, mean depth [123]\.\d\d of 3, first token after \d+ ms")


def make(**fields):
  """A model of random weights that reads bytes."""
  config = tiny.config(tiny.BYTES, model=fields).model
  params = jax.tree.map(jnp.asarray, test_weights.draw(config))
  return model_lib.Model(config, {"params": params}, tokenizer_lib.ByteTokenizer(), 24)


@pytest.fixture(scope="module")
def model():
  return make(router=tiny.TOKEN_CHOICE)


@pytest.fixture
def run(model, monkeypatch):
  """The command line, for that model."""
  monkeypatch.setattr(model_lib, "load", lambda workdir: model)
  return lambda *argv: test_main.run(*FLAGS, *argv)


def parts(out):
  """A single prompt's text, its view by depth, and the figures."""
  view, figures = out.rstrip("\n").split("\n\n(beneath each token: the recursion steps it took, 1 to 3)\n\n")
  text, view = view.split("\n\n")
  return text, view, figures


def test_a_prompt_gives_what_generate_gives(run, model, capsys):
  outs = []
  for seed in (1, 1, 2):
    assert run("--prompt=Un", f"--seed={seed}", "--num_slots=2") == 0
    outs.append(parts(capsys.readouterr().out))
    wanted, = model.generate(["Un"], seed=seed, **OPTIONS)
    assert outs[-1][0] == "Un" + wanted.text and FIGURES.fullmatch(outs[-1][2])
    assert f"{len(wanted.tokens)} tokens" in outs[-1][2]
  assert outs[0][:2] == outs[1][:2] != outs[2][:2]
  text, digits = outs[0][1].split("\n")
  assert len(text) == len(digits) and {"2", "3"} <= set(digits) <= set("123")


def test_depths_of_the_view_are_those_of_the_full_pass(model):
  request = model.request("Union", seed=3, **OPTIONS)
  completion, = model.generate_requests([request])
  view = command._by_depth(model, request, completion, 24)
  completion.depths = []  # nothing told: every depth is traced
  assert view == command._by_depth(model, request, completion, 24)


def test_a_terminal_gets_the_text_once_and_in_colour(run, model, capsys, monkeypatch):
  monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
  monkeypatch.delenv("NO_COLOR", raising=False)
  assert run("--prompt=Un", "--num_slots=2") == 0
  wanted, = model.generate(["Un"], **OPTIONS)
  out = capsys.readouterr().out
  assert out.startswith("Un" + wanted.text + "\n\n\x1b[38;5;16;48;5;")
  assert "".join(re.split("\x1b\\[[\\d;]*m", out)).count("Un" + wanted.text) == 2


def test_text_streams_as_it_comes(capsys):
  watch, told = command.Watch(stream=True), []
  watch.start()
  for _ in range(2):
    watch.event(0, request_lib.Event(5, "ab", 2, None, ""))
    told.append(capsys.readouterr().out)
  assert told == ["ab", "ab"]


def test_several_prompts_and_plain_batching(run, model, capsys):
  """No engine: so any model is taken."""
  assert run("--prompt=Un", "--prompt=the state", "--batching=none", "--stop=q", "--logprobs") == 0
  out = capsys.readouterr().out
  wanted = model.generate(["Un", "the state"], stop_strings=["q"], **OPTIONS)
  for prompt, completion in zip(("Un", "the state"), wanted):
    assert f"{prompt}{completion.text}\n\n" in out
  assert re.search(r"ms, mean log-probability -\d+\.\d{3}\n$", out)


def test_a_file_answers_in_order_and_a_bad_line_fails_alone(run, model, tmp_path, capsys):
  lines = [dict(prompt="Un"), dict(prompt=""), dict(prompt="the state", max_tokens=3, seed=5, logprobs=True),
           dict(prompt="of"), dict(prompt="of", temperature=-1), dict(prompt="of", stop_strings="x"),
           dict(prompt="of", dance=1), dict(prompt=3), dict(prompt=[1, 263]), dict(prompt=[116, 104])]
  path = tmp_path / "prompts.jsonl"
  path.write_text("\n".join([json.dumps(line) for line in lines] + ["", '{"prompt"']))
  assert run(f"--prompt_file={path}", "--num_slots=2") == 2
  out, err = capsys.readouterr()
  answers = [json.loads(line) for line in out.splitlines()]
  errors = {1: "the prompt is empty", 4: "temperature=-1", 5: "stop_strings='x'; use a list",
            6: "unknown option 'dance'", 7: 'no object with a "prompt"', 8: "token 263", 10: "not JSON"}
  assert len(answers) == 11 and FIGURES.match(err) and err.count("\n") == 1
  for i, answer in enumerate(answers):
    if i in errors:
      assert list(answer) == ["prompt", "error"] and errors[i] in answer["error"]
      continue
    prompt, options = lines[i]["prompt"], {k: v for k, v in lines[i].items() if k != "prompt"}
    wanted, = model.generate([prompt], **(OPTIONS | options))
    assert answer.pop("logprobs", []) == pytest.approx(wanted.logprobs, abs=1e-4)
    assert answer == dict(prompt=prompt, text=wanted.text, tokens=wanted.tokens, depths=wanted.depths,
                          finish=wanted.finish)


def test_a_text_file_has_a_prompt_a_line(run, model, tmp_path, capsys):
  path = tmp_path / "prompts.txt"
  path.write_bytes(b"\xef\xbb\xbfUn\r\n\r\n  the {\xe2\x80\xa8\n")
  assert run(f"--prompt_file={path}", "--num_slots=2") == 0
  answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [answer["prompt"] for answer in answers] == ["Un", "  the {\u2028"]
  assert [answer["text"] for answer in answers] == [c.text for c in model.generate(["Un", "  the {\u2028"], **OPTIONS)]


def test_whatever_a_line_holds_the_others_are_answered(run, model, tmp_path, capsys):
  deep, digits = b"[" * 100_000 + b"]" * 100_000, b"7" * 5000
  errors = {  # by line: what is said, and the prompt that is told
      b'{"prompt": "two", "deep": ' + deep + b"}": ("too deep to be read", None),
      b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}": ('no object with a "prompt"', None),
      b'{"prompt": "two", "self": 1}': ("unknown option 'self'", "two"),
      b'{"prompt": "two", "fields": 1, "": 2}': ("unknown option ''", "two"),
      b'{"prompt": "two", "seed": ' + digits + b"}": ("too many digits", None),
      b'{"prompt": [1, ' + digits[:4000] + b"]}": ("is not in the vocabulary", [1, int(digits[:4000])]),
      '{"prompt": "f\u00fcr"}'.encode("latin-1"): ("not UTF-8", '{"prompt": "f\ufffdr"}'),
      rb'{"prompt": "\ud800 x"}': ("half a surrogate pair (character 1", "\ufffd x"),
      b'{"prompt": [NaN]}': ('no object with a "prompt"', None),
      b'{"prompt": null}': ('no object with a "prompt"', None),
      b'{"prompt": {"a": NaN}}': ('no object with a "prompt"', None),
      b'{"prompt": "two", "temperature": Infinity}': ("temperature=inf", "two"),
      b'{"prompt": "two", "exit": "verify"}': ("exit='verify', but the engine has no exits", "two"),
      b'{"prompt": "two", "exit": ["verify"]}': ("exit", "two"),
      b'{"prompt": "two", "stop_tokens": [[1]]}': ("stop", "two"),
      b'{"prompt": "two", "max_tokens": "3"}': ("max_tokens", "two"),
      b'"two"': ("not an object", '"two"'), b"\0\0": ("not JSON", "\0\0"),
  }
  good = [b'{"prompt": "Un"}', b'{"prompt": "a\\u0000b"}']
  path = tmp_path / "prompts.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good[0], *errors, good[1]]))
  assert run(f"--prompt_file={path}", "--num_slots=2") == 2

  def refuse(name):
    raise AssertionError(f"{name} is no JSON")

  answers = [json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines()]
  assert len(answers) == len(errors) + 2
  for answer, prompt in ((answers[0], "Un"), (answers[-1], "a\0b")):
    assert answer["prompt"] == prompt and answer["text"] == model.generate([prompt], **OPTIONS)[0].text
  for answer, (line, (said, prompt)) in zip(answers[1:], errors.items()):
    assert list(answer) == ["prompt", "error"] and said in answer["error"], answer
    assert answer["prompt"] == (line.decode(errors="replace") if prompt is None else prompt)


def test_bytes_of_a_text_file_spoil_their_line_only(run, model, tmp_path, capsys):
  path = tmp_path / "prompts.txt"
  path.write_bytes(b"Un\nf\xfcr\nof")
  for how in ("--num_slots=2", "--batching=none"):
    assert run(f"--prompt_file={path}", how) == 2
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["Un", "f\ufffdr", "of"]
    assert "not UTF-8" in answers[1]["error"] and answers[2]["text"] == model.generate(["of"], **OPTIONS)[0].text
  path.write_bytes("Un".encode("utf-16"))
  assert run(f"--prompt_file={path}") == 2
  assert "UTF-16, not UTF-8; convert the file" in capsys.readouterr().err


def test_answers_wait_for_those_before_them(capsys):
  answers = command._Answers()
  answers.prompts = ["a", "b", "c"]
  told = []
  for i in (1, 0, 2):
    answers.put(i, {"text": str(i)})
    told.append(re.findall(r'"prompt": "(.)"', capsys.readouterr().out))
  assert told == [[], ["a", "b"], ["c"]]


@pytest.mark.parametrize("argv, said", [
    (["--prompt="], "the prompt is empty; give some text"),
    (["--prompt=Un", "--prompt="], "the prompt is empty"),
    (["--prompt=a", "--max_tokens=0"], "max_tokens=0; use a count >= 1"),
    (["--prompt=a", "--temperature=nan"], "temperature=nan; use a finite number"),
    (["--prompt=a", "--top_k=99999999999"], "top_k=99999999999"),
    (["--prompt=a", "--seed=-1"], "seed=-1"),
    (["--prompt=a", "--stop="], "use non-empty strings"),
    (["--prompt=a state of the union, of states", "--num_slots=2"], "more than the context of 24; shorten it"),
    (["--prompt=a state of the union, of states", "--batching=none"], "more than the context of 24; shorten it"),
    (["--prompt=a", "--context=0"], "context=0"),
    (["--prompt=a", "--num_slots=0"], "num_slots=0; use a count >= 1"),
    (["--prompt=a", "--kv_format=int3"], "kv_format='int3'; use one of"),
    (["--prompt=a", "--weight_format=int3"], "weight_format='int3'; use one of"),
    (["--prompt=a", "--batching=none", "--weight_format=int3"], "weight_format='int3'; use one of"),
    (["--prompt=a", "--batching=none", "--num_slots=3"], "--num_slots with --batching=none"),
    (["--prompt=a", "--batching=none", "--exit_after=2"], "--exit_after with --batching=none"),
    (["--prompt=a", "--batching=none", "--ticks=3"], "--ticks with --batching=none"),
    (["--prompt=a", "--batching=none", "--devices=2"], "--devices with --batching=none"),
    (["--prompt=a", "--batching=none", "--tensor=2"], "--tensor with --batching=none"),
    (["--prompt=a", "--tensor=2"], "tensor=2 does not divide model.vocab_size=263; use 1"),
    (["--prompt=a", "--devices=two"], "--devices=two; use a count >= 1, or all"),
    (["--prompt=a", "--devices=9"], "devices=9, and there are 8 devices (cpu); use at most 8"),
    (["--prompt=a", "--page_size=0"], "page_size=0; use a count >= 1"),
    (["--prompt=a", "--exit_measure=entropy"], "--exit_measure without exits; give --exit_after=LAYERS too"),
    (["--prompt=a", "--exit_after=3", "--exit_measure=agreement"], "two or more for the measure 'agreement'"),
    (["--prompt=a", "--exit_after=3", "--exit_kv=copied", "--exit=verify"], "exit='verify' with exits.kv='copied'"),
    (["--prompt=a", "--exit_after=two"], "--exit_after=two; use numbers of layers"),
    (["--prompt=a", "--exit_after=4"], "exits.after=(4,): this model has exits after layers 3, 5"),
    (["--prompt=a", "--exit=verify"], "exit='verify', but the engine has no exits"),
    (["--prompt=a", "--exit_after=3", "--exit=trust"], "exit='trust' without a threshold"),
    (["--prompt_file=nowhere.txt"], "nowhere.txt"),
    (["--prompt_file=tests"], "tests"),
    (["--prompt_file=mor/train/__init__.py"], "no prompt in it; give one a line"),
])
def test_a_mistake_is_one_line(run, argv, said, capsys):
  assert run(*argv) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_flags_reach_the_engine(run, capsys, monkeypatch):
  seen = {}

  def make(model, **settings):
    seen.update(settings)
    raise ValueError("enough")

  monkeypatch.setattr(engine_lib, "Engine", make)
  assert run("--prompt=a", "--prompt=b", "--batching=sequence", "--context=9", "--weight_format=bfloat16",
             "--kv_format=bfloat16", "--page_size=8", "--num_pages=5", "--num_edge_pages=6", "--prefill_chunk=32",
             "--devices=4", "--tensor=2", "--ticks=3", "--exit_after=3,5", "--exit_measure=agreement", "--exit_first=9", "--exit_kv=copied") == 2
  exits = exits_lib.Exits(after=(3, 5), measure="agreement", first=9, kv="copied")
  assert seen == dict(batching="sequence", context=9, weight_format="bfloat16", kv_format="bfloat16", num_slots=1,
                      devices=4, tensor=2, page_size=8, num_pages=5, num_edge_pages=6, prefill_chunk=32, ticks=3, exits=exits)


def test_exits_of_the_command_line(run, model, capsys):
  """Verified text is the full depth's; a trusting prompt's tokens leave where the flags say, as one of the first."""
  common = ("--prompt=Un", "--temperature=0", "--num_slots=1")
  at_exit = ("--exit_after=3", "--exit_first=2", "--threshold=0")
  told = {}
  for mode in ("verify", "trust"):
    assert run(*common, *at_exit, f"--exit={mode}") == 0
    told[mode] = parts(capsys.readouterr().out)
  wanted, = model.generate(["Un"], **OPTIONS | dict(temperature=0.0))
  assert told["verify"][0] == "Un" + wanted.text
  assert "mean depth 1.00 of 3" in told["trust"][2] and set(told["trust"][0][2:]) <= {"\x00", "\x01"}


def test_a_scheme_without_a_common_stack_is_decoded_in_a_plain_batch(run, capsys, monkeypatch):
  monkeypatch.setattr(model_lib, "load", lambda workdir: make(sharing="middle_sequence"))
  assert run("--prompt=Un") == 2
  assert "use generate() (--batching=none)" in capsys.readouterr().err
  assert run("--prompt=Un", "--batching=none") == 0
  assert FIGURES.search(capsys.readouterr().out)
