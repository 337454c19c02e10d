"""Logits that are not finite end their request, with an error and without a token; no neighbour is harmed."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from mor.data import tokenizer as tokenizer_lib
from mor.decode import sampling
from mor.model.kv import plans as kv_plans
from mor.serve import cli
from mor.serve import model as model_lib
from mor.serve import request as request_lib
from tests.helpers import decoding
from tests.helpers import exiting
from tests.helpers import serving
from tests.helpers import tiny

BAD = 7  # the token of which the embedding is not finite


def damage(model, value=np.nan):
  params = dict(model.variables["params"])
  params["embedding"] = jnp.asarray(params["embedding"]).at[BAD, 3].set(value)
  return dataclasses.replace(model, variables={**model.variables, "params": params})


def expect(prompt, whole):
  """What a damaged model answers where a whole one answers `whole`: nothing that follows the bad token."""
  read = whole.tokens if whole.finish == "stop" else whole.tokens[:-1]
  if BAD not in prompt and BAD not in read:
    return whole
  num = 0 if BAD in prompt else whole.tokens.index(BAD) + 1
  return request_lib.Completion(whole.tokens[:num], whole.depths[:num], whole.early[:num], whole.logprobs[:num], "",
                                "error", request_lib.NOT_FINITE)


def check(got, requests, whole):
  expected = [expect(prompt, completion) for (prompt, _), completion in zip(requests, whole)]
  assert 3 < sum(completion.finish == "error" for completion in expected) < len(expected) - 3
  for one, other in zip(got, expected):
    serving.assert_same(one, other)
    assert one.error == other.error


@pytest.mark.parametrize("plan, storage", [
    pytest.param(plan, storage, marks=() if (plan, storage) == ("recursion_wise", "paged") else pytest.mark.slow)
    for plan in kv_plans.PLANS for storage in ("paged", "packed")])
def test_a_bad_token_fails_the_requests_that_read_it_and_no_other(plan, storage):
  """Few pages, so that those of failed requests are used again at once."""
  model, requests = serving.model(tie_embeddings=False, kv_plan=plan), serving.requests(24)
  requests += [([BAD, 5], dict(max_tokens=3))] * 2
  whole, damaged = serving.reference(model, requests), damage(model)
  check(serving.reference(damaged, requests), requests, whole)
  engine = serving.engine(damaged, storage=storage, num_pages=24, num_edge_pages=16)
  check(exiting.answers(engine, requests), requests, whole)
  assert engine.metrics()["requests"] == len(requests)


@pytest.mark.slow
@pytest.mark.parametrize("kind", exiting.KINDS)
@pytest.mark.parametrize("exit", ["trust", "verify"])
def test_exits_fail_the_same_requests(kind, exit):
  model, requests = exiting.model(kind), serving.requests(40, exit=exit, threshold=0.2, **exiting.GREEDY)
  whole = exiting.answers(exiting.engine(model, kind), requests)
  check(exiting.answers(exiting.engine(damage(model, np.inf), kind), requests), requests, whole)


@pytest.mark.parametrize("size", [61, 512])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.8), dict(repetition_penalty=1.3)], ids=str)
def test_no_token_is_drawn_from_logits_that_are_not_finite(size, options):
  logits_MV = np.random.default_rng(0).normal(size=(8, size)).astype(np.float32)
  logits_MV[np.arange(1, 7), [0, 5, size - 3, 0, 5, size - 3]] = [np.nan, np.inf, -np.inf, -np.inf, np.nan, np.inf]
  logits_MV[7, size - 1] = np.nan  # not in the tokenizer
  rows = sampling.rows([sampling.Sampling(**options)] * 8)
  tokens = sampling.sample(jnp.asarray(logits_MV), rows, jnp.zeros((8, size), bool), jnp.zeros(8, jnp.int32), size - 1)
  assert (np.asarray(tokens) == sampling.NOT_FINITE).tolist() == [False, *[True] * 6, False]


@pytest.mark.parametrize("batching", ["depth", pytest.param("none", marks=pytest.mark.slow)])
def test_a_file_of_prompts_answers_the_others(tmp_path, capsys, batching):
  config = tiny.config(tiny.BYTES, model=dict(router=tiny.TOKEN_CHOICE, num_layers=5, tie_embeddings=False)).model
  model = damage(model_lib.Model(config, decoding.draw(config), tokenizer_lib.ByteTokenizer(), serving.CONTEXT))
  prompts = [[1, 2], [BAD], [3]]
  (path := tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
  assert not cli.answer(model, str(path), dict(max_tokens=3, logprobs=True, stop_tokens=[]), dict(batching=batching))
  answers = [json.loads(line, parse_constant=pytest.fail) for line in capsys.readouterr().out.splitlines()]
  assert [answer["prompt"] for answer in answers] == prompts
  assert answers[1] == {"prompt": [BAD], "error": request_lib.NOT_FINITE}
  assert [answer.get("finish") for answer in answers] == ["length", None, "length"]
