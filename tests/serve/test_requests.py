"""Prompts and options of every kind in Python: taken as they mean, or refused in one line with a remedy."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mor.data import tokenizer as tokenizer_lib
from mor.serve import model as model_lib
from mor.serve import request as request_lib
from tests.helpers import tiny


@pytest.fixture(name="model", scope="module")
def fixture_model():
  return model_lib.Model(tiny.config(tiny.BYTES).model, {}, tokenizer_lib.ByteTokenizer(), 32)


def refused(call, message):
  with pytest.raises(ValueError, match=message) as error:
    call()
  assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("prompt", [
    [1, 2], (1, 2), range(1, 3), np.array([1, 2]), np.array([1, 2], np.uint8), jnp.array([1, 2]),
    [np.int64(1), np.uint16(2)], [jnp.int32(1), 2], (np.array(1), 2)])
def test_integers_are_integers(prompt):
  request = request_lib.make(prompt, max_tokens=np.int64(3), top_k=np.uint8(4), seed=jnp.uint32(5), temperature=np.float32(0.5),
                             top_p=np.float64(0.5), logprobs=np.True_, stop_tokens=np.array([6, 7]), min_p=np.int32(0),
                             threshold=np.float64(0.25), exit=np.str_("trust"))
  request.check(257, 32)
  assert request == request_lib.make(
      [1, 2], max_tokens=3, top_k=4, seed=5, temperature=0.5, top_p=0.5, logprobs=True, stop_tokens=[6, 7], min_p=0,
      threshold=0.25, exit="trust")
  values = [*request.prompt, *request.stop_tokens, *vars(request.sampling).values(), request.max_tokens, request.logprobs]
  assert {type(value) for value in values} == {int, float, bool}


@pytest.mark.parametrize("prompt, message", [
    (None, "^prompt=None; give text, or a list of token ids"),
    (5, "^prompt=5; give text"),
    (1.5, "^prompt=1.5; give text"),
    (True, "^prompt=True; give text"),
    (np.int64(5), "^prompt=5; give text"),
    (b"hi", r"^prompt=b'hi' is bytes; give text, e.g. prompt.decode\('utf-8'\)"),
    (bytearray(b"hi"), "is bytes; give text"),
    ({"a": 1}, "^prompt={'a': 1}; give text"),
    ({1, 2}, "give text, or a list"),
    ((i for i in range(3)), "^prompt=<generator .*; give text, or a list"),
    (itertools.count(), r"^prompt=count\(0\); give text"),
    (np.array([1.9, 2.2]), r"^token 1.9 of the prompt \(at 0\) is no integer; give one list of token ids"),
    (np.array([[1, 2]]), r"^token \[1, 2\] of the prompt"),
    (np.array([True]), "^token True of the prompt"),
    (np.array(["a"]), "^token 'a' of the prompt"),
    ([1, [2]], r"^token \[2\] of the prompt \(at 1\) is no integer"),
    ([1, None], "^token None of the prompt"),
    ([1, 2.0], "^token 2.0 of the prompt"),
    ([False], "^token False of the prompt"),
    (["1"], "^token '1' of the prompt"),
    (["x" * 5000], "^token 'xxx.*... of the prompt"),
    pytest.param([10**5000], "^token a value of type int of the prompt is not in the vocabulary; use ids 0 to 262", id="digits1"),
    ([10**30], "^token 1000.* of the prompt is not in the vocabulary"),
    (np.array([], np.int32), "^the prompt is empty; give at least one token"),
    ("", "^the prompt is empty; give some text"),
    ("ab\ud800c", r"^character 2 of the prompt, '\\ud800', is half of a surrogate pair"),
])
def test_what_is_no_prompt_is_refused(model, prompt, message):
  refused(lambda: model.request(prompt).check(model.config.vocab_size, 32), message)


@pytest.mark.parametrize("text", ["\0", "a\0b", "\ufeff", "\U0010ffff", "\r\n", " "])
def test_odd_text_is_text(model, text):
  request = model.request(text)
  request.check(model.config.vocab_size, 32)
  assert model.tokenizer.decode(request.prompt) == text


@pytest.mark.parametrize("option, value, message", [
    ("max_tokens", "3", "^max_tokens='3'; use a count >= 1"),
    ("max_tokens", 2.0, "^max_tokens=2.0; use a count"),
    ("max_tokens", True, "^max_tokens=True; use a count"),
    ("max_tokens", np.int64(0), "^max_tokens=0; use a count"),
    ("max_tokens", None, "^max_tokens=None; use a count"),
    ("max_tokens", np.array([3]), r"^max_tokens=\[3\]; use a count"),
    ("temperature", "1", "^temperature='1'; use a finite number"),
    ("temperature", None, "^temperature=None; use a finite number"),
    pytest.param("temperature", 10**400, "^temperature=1000.*; use a finite number", id="digits2"),
    pytest.param("temperature", 10**5000, "^temperature=a value of type int; use a finite number", id="digits3"),
    ("temperature", np.float32("nan"), "^temperature=nan; use a finite number"),
    ("temperature", 1j, "^temperature=1j; use a finite number"),
    ("top_k", "5", "^top_k='5'; use an integer"),
    ("top_k", np.float32(2), "^top_k=2.0; use an integer"),
    pytest.param("top_k", 10**5000, "^top_k=a value of type int; use 0 for off", id="digits4"),
    ("top_p", [0.5], r"^top_p=\[0.5\]; use a finite number"),
    ("seed", -1, "^seed=-1; use 0 to 4294967295"),
    ("stop_tokens", 5, "^stop_tokens=5; use a list"),
    ("stop_tokens", "</s>", "^stop_tokens='</s>'; use a list"),
    ("stop_tokens", None, "^stop_tokens=None; use a list"),
    ("stop_tokens", ["</s>"], r"^stop_tokens=\['</s>'\]; use a list of token ids"),
    ("stop_tokens", [1.5], r"^stop_tokens=\[1.5\]; use a list of token ids"),
    pytest.param("stop_tokens", [10**5000], "^stop token a value of type int is not in the vocabulary", id="digits5"),
    ("stop_tokens", list(range(9)), "^9 stop tokens; use at most 8"),
    ("stop_strings", "END", "^stop_strings='END'; use a list"),
    ("stop_strings", [b"END"], r"^stop_strings=\[b'END'\]; use non-empty strings"),
    ("stop_strings", [None], "use non-empty strings"),
    ("logprobs", 1, "^logprobs=1; use True or False"),
    ("logprobs", "yes", "^logprobs='yes'; use True or False"),
    ("exit", None, "^exit=None; use one of"),
    ("exit", ["trust"], r"^exit=\['trust'\]; use one of"),
    ("threshold", "0.5", "^threshold='0.5'; use None, or a confidence"),
    ("threshold", 2, "^threshold=2; use None, or a confidence"),
    ("threshold", float("nan"), "^threshold=nan; use None, or a confidence"),
    ("prompt", [1], "^unknown option 'prompt'"),
    ("self", [1], "^unknown option 'self'"),
])
def test_what_is_no_option_is_refused(model, option, value, message):
  refused(lambda: model.request([1], **{option: value}).check(model.config.vocab_size, 32), message)


@pytest.mark.parametrize("prompts, message", [
    ("we", "^prompts is one text; give a list"),
    (b"we", "^prompts is one text; give a list"),
    (None, "^prompts=None; give a list of prompts"),
    (5, "^prompts=5; give a list of prompts"),
    ({"we": 1}, "^prompts={'we': 1}; give a list of prompts"),
    ([1, 2], "^prompt=1; give text, or a list of token ids"),
    ([None], "^prompt=None; give text"),
])
def test_what_is_no_list_of_prompts_is_refused(model, prompts, message):
  refused(lambda: model.generate(prompts), message)
