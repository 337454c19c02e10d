"""`generate` against the whole model, and where texts end."""

import collections

import numpy as np
import pytest
import tokenizers

from mor.data import tokenizer as tokenizer_lib
from mor.serve import model as model_lib
from mor.serve import request as request_lib
from tests.helpers import decoding
from tests.helpers import tiny

CONTEXT, NEW = 24, 12
PROMPTS = ([65, 66, 67, 68, 69, 70, 71, 72, 73], [256], [97, 32], [256, 119, 101, 32])  # one shape in all tests


@pytest.fixture(scope="module")
def model():
  config = tiny.config(tiny.BYTES).model
  return model_lib.Model(config, decoding.draw(config), tokenizer_lib.ByteTokenizer(), CONTEXT)


def run(model, requests=None, **options):
  """Completions, and each row's events."""
  events = [[] for _ in PROMPTS]
  requests = requests or [model.request(prompt, **{"max_tokens": NEW, "stop_tokens": ()} | options) for prompt in PROMPTS]
  done = model.generate_requests(requests, callback=lambda row, event: events[row].append(event))
  return done, events


@pytest.fixture(scope="module")
def greedy(model):
  return run(model, logprobs=True)


def test_greedy_is_the_most_likely_token_of_the_whole_model(model, greedy):
  done, _ = greedy
  tokens_BT = np.zeros((len(PROMPTS), CONTEXT), np.int32)
  for row_T, prompt, completion in zip(tokens_BT, PROMPTS, done):
    text = [*prompt, *completion.tokens]
    row_T[:len(text)] = text
  logits_BTV, depth_BT = decoding.forward(model.config, model.variables, tokens_BT)
  logits_BTV = logits_BTV[:, :, :model.tokenizer.vocab_size].astype(np.float64)
  logprob_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(axis=2, keepdims=True))
  for row, (prompt, completion) in enumerate(zip(PROMPTS, done)):
    at = range(len(prompt) - 1, len(prompt) - 1 + NEW)
    assert completion.tokens == logits_BTV[row, at].argmax(axis=1).tolist()
    assert completion.depths == depth_BT[row, at].tolist()
    np.testing.assert_allclose(completion.logprobs, logprob_BTV[row, at].max(axis=1), rtol=0, atol=1e-4)
  assert len({depth for completion in done for depth in completion.depths}) > 1


def test_events_come_in_order_and_add_up(greedy):
  for completion, events in zip(*greedy):
    assert [e.token for e in events] == completion.tokens and len(events) == NEW
    assert [e.depth for e in events] == completion.depths
    assert [e.logprob for e in events] == completion.logprobs
    assert "".join(e.text for e in events) == completion.text
    assert [e.finish for e in events] == [""] * (NEW - 1) + ["length"]
    assert completion.finish == "length"


def test_log_probabilities_are_given_to_who_asks(model, greedy):
  done, events = run(model)
  assert [c.tokens for c in done] == [c.tokens for c in greedy[0]]
  assert all(c.logprobs == [] for c in done) and all(e.logprob is None for e in events[0])


def test_rows_end_where_they_should(model):
  """By a stop token, by their own count, and by the context, each without the others."""
  drawn = dict(temperature=2.0, seed=3)
  full, at = [c.tokens for c in run(model, **drawn)[0]], 4
  assert full[0][at] not in full[0][:at]
  options = (dict(stop_tokens=[full[0][at], 262]), dict(max_tokens=1), {}, dict(max_tokens=1000))
  done, events = run(model, [model.request(prompt, **dict(max_tokens=NEW, stop_tokens=()) | drawn | own)
                             for prompt, own in zip(PROMPTS, options)])
  assert [c.finish for c in done] == ["stop", "length", "length", "length"]
  assert [len(c.tokens) for c in done] == [at, 1, NEW, CONTEXT - len(PROMPTS[3]) + 1]
  assert [c.tokens[:NEW] for c in done] == [full[0][:at], full[1][:1], full[2], full[3]]
  assert [len(c.depths) for c in done] == [len(c.tokens) for c in done]
  assert events[0][-1].token is None and events[0][-1].finish == "stop"
  assert done[0].text == model.tokenizer.decode(done[0].tokens)


def test_stop_string_ends_the_text(model):
  text = run(model, temperature=2.0, seed=3)[0][2].text
  stop = text[3:5]
  assert len(stop) == 2 and text.find(stop) == 3
  done, events = run(model, temperature=2.0, seed=3, stop_strings=[stop])
  assert done[2].text == text[:3] and done[2].finish == "stop"
  assert "".join(e.text for e in events[2]) == text[:3]
  assert len(done[2].tokens) < NEW


def test_seeds_belong_to_rows(model):
  options = dict(temperature=2.0, max_tokens=NEW, stop_tokens=())
  rows = lambda order: run(model, [model.request(PROMPTS[2], seed=seed, **options) for seed in order[:3]] +
                           [model.request(PROMPTS[0], seed=order[3], **options)])[0]
  first, second = rows([7, 7, 8, 9]), rows([9, 8, 7, 7])
  assert first[0].tokens == first[1].tokens == second[2].tokens
  assert first[2].tokens == second[1].tokens
  assert len({tuple(c.tokens) for c in (*first[1:3], second[0])}) == 3
  assert first[3].tokens != second[3].tokens


def test_a_great_penalty_repeats_no_token_of_prompt_or_text(model, greedy):
  news = lambda done: [len({*prompt, *c.tokens}) - len({*prompt}) for prompt, c in zip(PROMPTS, done)]
  assert max(news(greedy[0])) < NEW
  assert news(run(model, repetition_penalty=1e6)[0]) == [NEW] * len(PROMPTS)


@pytest.mark.parametrize("prompt, options, message", [
    ([], {}, "the prompt is empty; give at least one token"),
    ("", {}, "the prompt is empty; give some text"),
    ([1, 263], {}, "token 263 of the prompt is not in the vocabulary; use ids 0 to 262"),
    ([-1], {}, "token -1 of the prompt is not in the vocabulary; use ids 0 to 262"),
    ([1] * 25, {}, "the prompt has 25 tokens, more than the context of 24; shorten it"),
    ([1], dict(max_tokens=0), "max_tokens=0; use a count >= 1"),
    ([1], dict(temperature=float("nan")), "temperature=nan; use a finite number"),
    ([1], dict(stop_tokens=[300]), "stop token 300 is not in the vocabulary; use ids 0 to 262"),
    ([1], dict(stop_tokens=range(9)), "use a list"),
    ([1], dict(stop_tokens=list(range(9))), "9 stop tokens; use at most 8"),
    ([1], dict(stop_strings="END"), "stop_strings='END'; use a list"),
    ([1], dict(stop_strings=[""]), "use non-empty strings"),
    ([1], dict(top_q=1), "unknown option 'top_q'; the options are .*top_p"),
])
def test_one_bad_request_is_refused_and_none_runs(model, prompt, options, message):
  events = []
  with pytest.raises(ValueError, match=message):
    requests = [model.request([1, 2]), model.request(prompt, **options)]
    model.generate_requests(requests, callback=lambda row, event: events.append(event))
  assert not events


def test_texts_and_ids(model):
  """A text opens a document, and the token that opens the next one ends it."""
  request = model.request("we ")
  assert request.prompt == (256, 119, 101, 32) and request.stop_tokens == (256,)
  assert model.request("we ", stop_tokens=[3]).stop_tokens == (3,)
  assert model.generate([]) == []
  with pytest.raises(ValueError, match="prompts is one text; give a list"):
    model.generate("we")
  mute = model_lib.Model(model.config, model.variables, None, CONTEXT)
  assert mute.vocab_size == 263 and model.vocab_size == 257
  with pytest.raises(ValueError, match="has no tokenizer; give token ids"):
    mute.request("we")
  with pytest.raises(ValueError, match="stop_strings need a tokenizer"):
    mute.generate([[1]], stop_strings=["x"])


def follow(text, **options):
  """The events of a request that gets a text byte by byte."""
  follower = request_lib.Follower(request_lib.make([1], **options), tokenizer_lib.ByteTokenizer())
  events = []
  for i, byte in enumerate(text.encode()):
    events.append(follower.add(byte, 1, 0.0, "length" if i + 1 == len(text.encode()) else ""))
    if events[-1].finish:
      break
  return follower.completion, events


@pytest.mark.parametrize("text, stops, shown, finish", [
    ("one ENTWO END more", ["END"], "one ENTWO ", "stop"),
    ("one ENTWO EN", ["END"], "one ENTWO EN", "length"),
    ("aaab", ["aab"], "a", "stop"),
    ("abcabd", ["abd", "zz"], "abc", "stop"),
    ("xyz", ["z", "yz"], "x", "stop"),
    ("née é\u20ac!", ["é\u20ac"], "née ", "stop"),
    ("\u20ac\u20ac", [], "\u20ac\u20ac", "length"),
])
def test_a_stream_never_takes_text_back(text, stops, shown, finish):
  """No part of a stop string is shown, and no part of a character."""
  completion, events = follow(text, stop_strings=stops)
  assert (completion.text, completion.finish) == (shown, finish)
  said = ""
  for event in events:
    said += event.text
    assert shown.startswith(said)
  assert said == shown


def pieces():
  """A tokenizer like SentencePiece: tokens say their space, and a text drops its first one."""
  vocab = {token: i for i, token in enumerate(["</s>", "\u2581Hello", "\u2581world", "\u2581", "ing", "!"])}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  made.decoder = tokenizers.decoders.Sequence([
      tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)])
  return tokenizer_lib.JsonTokenizer(made.to_str())


@pytest.mark.parametrize("prompt, tokens, text", [
    ([1], [2, 4, 5], " worlding!"),
    ([0, 1], [2], " world"),
    ([0, 1], [0, 2], " world"),
    ([0], [1, 2], "Hello world"),
    ([1, 3], [2], " world"),
    ([0, 0, 0], [3, 1], " Hello"),
])
def test_text_goes_on_after_the_prompt(prompt, tokens, text):
  """Prompt and new text join to the text of both."""
  follower = request_lib.Follower(request_lib.make(prompt, max_tokens=9), pieces())
  said = [follower.add(token, 1, 0.0, "").text for token in tokens]
  assert "".join(said) == text and follower.completion.text == text
  assert pieces().decode(prompt) + text == pieces().decode([*prompt, *tokens])


def test_the_cost_of_text_does_not_grow():
  """Ids that are decoded and characters that are searched, counted over 8,192 tokens."""
  counts = collections.Counter()

  class Counting(tokenizer_lib.ByteTokenizer):
    def decode(self, ids):
      ids = list(ids)
      counts["ids"] += len(ids)
      return super().decode(ids)

  text = ("we the people né \u20ac EN " * 400).encode()[:8192]
  request = request_lib.make(list(b"x" * 4000), max_tokens=8192, stop_strings=["END", "x" * 100])
  follower = request_lib.Follower(request, Counting())
  for byte in text:
    follower.add(byte, 1, 0.0, "")
    counts["held"] = max(counts["held"], len(follower._held))
  assert counts["ids"] < 12 * len(text) and counts["held"] < 100
  assert follower.completion.text == text.decode()[:len(follower.completion.text)] and len(follower.completion.text) > 7000
