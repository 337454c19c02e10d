"""Long texts are encoded in pieces, and have the tokens of the whole text."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from mor.data import pieces

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
KINDS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
}
ALPHABETS = ["abAB'stred", "   \n\n\t\r ", "0123 ", "ab  c'", "\u3002\uff0c\u6c49\u5b57\u5b66\u4e60", "!?.'-",
             "e\u0301n\u0303\u00f1\U0001f680\U0001f1e9", "a b", "aaaa", " ", "a", "\u6c49"]


def draw(rng, length):
  """A text of runs: of letters, spaces, numbers, marks and other characters."""
  out = []
  while len(out) < length:
    out += rng.choices(rng.choice(ALPHABETS), k=rng.choice([1, 2, 3, 8, 40]))
  return "".join(out[:length])


def train(pre_tokenizer, size):
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = pre_tokenizer
  rng = random.Random(0)
  made.train_from_iterator([*(draw(rng, 400) for _ in range(60)), " " * 200, "a" * 300, "\u6c49\u5b57" * 100],
                           tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=["<eos>"], show_progress=False,
                                                          initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
  return made


@pytest.mark.parametrize("size", [270, 400])
@pytest.mark.parametrize("kind", list(KINDS))
def test_tokens_of_pieces_are_those_of_the_whole_text(monkeypatch, kind, size):
  made, rng = train(KINDS[kind], size), random.Random(1)
  encoder = pieces.Encoder(made, json.loads(made.to_str()))
  texts = [draw(rng, rng.choice([5, 50, 300])) for _ in range(100)]
  texts += [rng.choice([" ", "a", "\u6c49\u5b57", "'", "\n ", "0", "ab"]) * rng.choice([30, 200]) + draw(rng, 20)
            for _ in range(50)]
  wanted = [one.ids for one in made.encode_batch_fast(texts, add_special_tokens=False)]
  num_pieces, num_inside = 0, 0
  monkeypatch.setattr(pieces, "_DROPPED", 1)  # the first seam is often a wrong one
  for characters in (1, 5, 20, 60):
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", characters)
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == wanted
    cut = [encoder._pieces_or_whole(text) for text in texts]
    num_pieces += sum(map(len, cut))
    num_inside += sum(isinstance(piece, np.ndarray) for parts in cut for piece in parts)
  assert num_pieces > (800 if kind == "prefix" else 1200), "the texts are cut"
  assert kind == "prefix" or num_inside > 100, "also inside words"


@pytest.mark.parametrize("text", [
    "\u6c49\u5b57" * 200_000, "\u6c49\u5b57\u5b66\u3002\u4e60\uff0c" * 30_000, "a" + " " * 400_000 + "b", "a" * 400_000,
    "one two 3 four. " * 25_000], ids=["words", "sentences", "spaces", "letters", "ascii"])
def test_a_call_of_the_library_sees_a_bounded_text(monkeypatch, text):
  """Its memory is 130 to 190 times the text that one call is given."""
  made, calls = train(KINDS["gpt2"], 300), []
  encoder = pieces.Encoder(made, json.loads(made.to_str()))
  encode = encoder._encode
  monkeypatch.setattr(encoder, "_encode", lambda texts: calls.append(sum(map(len, texts))) or encode(texts))
  ids, = encoder.encode_batch([text])
  assert max(calls) <= 16 * 16384
  assert sum(calls) <= 2 * len(text)
  made.decoder = tokenizers.decoders.ByteLevel()
  assert made.decode(ids.tolist()) == text


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_is_cut_between_words(monkeypatch, scheme):
  words = [("<unk>", 0.0), ("\u2581", -2.0), ("\u2581a", -2.0), ("a", -3.0), ("b", -3.0), ("ab", -3.0), ("\u2581ab", -2.5)]
  made = tokenizers.Tokenizer(tokenizers.models.Unigram(words, 0, False))
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
  monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 3)
  encoder = pieces.Encoder(made, json.loads(made.to_str()))
  text = "ab a  b ab aab a b. a" * 9
  assert len(encoder._pieces_or_whole(text)) > 20
  assert encoder.encode_batch([text])[0].tolist() == made.encode(text, add_special_tokens=False).ids


def test_where_a_cut_may_change_tokens_there_is_none(monkeypatch):
  monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1)
  text = "a b c  d e, f g" * 3
  made = train(KINDS["gpt2"], 300)
  fields = json.loads(made.to_str())
  normalized = fields | {"normalizer": {"type": "NFC"}}
  added = fields | {"added_tokens": [{"content": "b c", "special": False, "rstrip": False, "single_word": False}]}
  looking = fields | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"(?<=a) b|\p{L}|\p{N}"}, "behavior": "Isolated"}}
  for changed in (normalized, added, looking):
    assert pieces.Encoder(made, changed)._pieces_or_whole(text) == [text]
