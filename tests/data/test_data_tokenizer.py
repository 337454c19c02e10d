"""Tokens decode to the text, and stand for its bytes."""

import json

import numpy as np
import pytest
import tokenizers

from mor.data import pieces
from mor.data import sources
from mor.data import tokenizer
from tests.helpers import tiny

TEXTS = ["The state of the Union  is\n\nstrong, naïve — 東京 🚀 \x00\x85.\r\n\t ", "", "a",
         " lead <|endoftext|> and </s> in text",
         "one two three four five six seven eight nine ten " * 30]


def documents(texts, name="x"):
  return sources.Documents((name,), lambda: iter(texts))


def load(tmp_path, name, texts=tuple(TEXTS)):
  config = tiny.config(data=dict(tokenizer=str(name), cache_dir=str(tmp_path / "cache"))).data
  return tokenizer.load(config, documents(texts))


def save(path, model, pre=None, decoder=None, special=(), added=()):
  made = tokenizers.Tokenizer(model)
  if pre:
    made.pre_tokenizer = pre
  if decoder:
    made.decoder = decoder
  made.add_special_tokens(list(special))
  made.add_tokens(list(added))
  made.save(str(path))
  return path


def byte_bpe(path, end="<|endoftext|>", pre=None, added=()):
  """Byte-level BPE without merges; `end` may come in the vocabulary only, as GPT-2's does."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate([*alphabet, "th", "\u0120\u0120", *([end] if end else [])])}
  pre = pre or tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model = tokenizers.models.BPE(vocab, [("t", "h"), ("\u0120", "\u0120")])
  return save(path, model, pre, tokenizers.decoders.ByteLevel(), added=added)


@pytest.fixture(name="make", params=["bytes", "bpe:300", "json"])
def fixture_make(request, tmp_path):
  name = byte_bpe(tmp_path / "t.json") if request.param == "json" else request.param
  return load(tmp_path, name)


def test_round_trip_and_byte_counts(make):
  encoded = make.encode_batch(TEXTS)
  for text, ids in zip(TEXTS, encoded):
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, make.encode(text))
    assert make.decode(ids) == text
    assert make.num_bytes_V[ids].sum() == len(text.encode())
    assert make.eos_id not in ids, "text that spells the token is only text"
  assert make.num_bytes_V.shape == (make.vocab_size,)
  assert make.num_bytes_V.dtype == np.int32
  assert make.num_bytes_V[make.eos_id] == 0
  assert max(ids.max(initial=0) for ids in encoded) < make.vocab_size


def test_special_tokens_decode_to_nothing(make):
  ids = make.encode("ab")
  assert make.decode([make.eos_id, *ids, make.eos_id]) == "ab"
  assert make.decode([*ids, make.vocab_size + 5]) == "ab", "a model's vocabulary may be rounded up"
  assert make.decode(make.encode("é")[:1]) == "\ufffd"


def test_bytes_vocabulary(tmp_path):
  made = load(tmp_path, "bytes")
  assert (made.vocab_size, made.eos_id) == (257, 256)
  np.testing.assert_array_equal(made.encode("é"), [0xC3, 0xA9])


@pytest.mark.parametrize("size", [257, 280])
def test_trained_vocabulary_has_the_size(tmp_path, size):
  made = load(tmp_path, f"bpe:{size}")
  assert made.vocab_size == size
  assert (np.sort(made.num_bytes_V)[:2] == [0, 1]).all()


@pytest.mark.parametrize("run", ["a" + " " * 20_000 + "b", "a" * 20_000, "\u6c49\u5b57" * 10_000], ids=["spaces", "letters", "words"])
def test_training_on_a_long_run_reads_short_words(tmp_path, monkeypatch, run):
  """The cost of training is the square of a word's length: words are counted, not seconds."""
  seen, library = [], tokenizers.Tokenizer

  class Watched:  # the library's cannot be inherited from
    from_str = library.from_str

    def __init__(self, model):
      vars(self)["made"] = library(model)

    def __setattr__(self, name, value):
      setattr(self.made, name, value)

    def train_from_iterator(self, texts, trainer):
      texts = list(texts)
      seen.extend(len(word) for text in texts for word, _ in self.made.pre_tokenizer.pre_tokenize_str(text))
      self.made.train_from_iterator(texts, trainer)

    def save(self, path):
      self.made.save(path)

  monkeypatch.setattr(tokenizers, "Tokenizer", Watched)
  made = load(tmp_path, "bpe:280", texts=[run])
  assert max(seen) <= 512 and sum(seen) == len(run.encode())
  assert made.decode(made.encode(run)) == run
  assert json.loads(made.serialized)["pre_tokenizer"]["type"] == "ByteLevel", "a plain file of the library"


def test_ordinary_text_trains_the_tokenizer_that_it_trained(tmp_path):
  plain = tokenizers.Tokenizer(tokenizers.models.BPE())
  plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  plain.decoder = tokenizers.decoders.ByteLevel()
  plain.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
      vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False))
  assert json.loads(load(tmp_path, "bpe:300").serialized) == json.loads(plain.to_str())


def test_training_is_deterministic_and_kept(tmp_path, monkeypatch):
  first = load(tmp_path / "a", "bpe:290")
  assert load(tmp_path / "b", "bpe:290").identity == first.identity
  assert load(tmp_path / "c", "bpe:290", texts=["another text " * 9]).identity != first.identity

  def fail(*args):
    raise AssertionError("trained again")

  monkeypatch.setattr(tokenizers, "Tokenizer", type("T", (), {"__init__": fail,
                                                              "from_str": tokenizers.Tokenizer.from_str}))
  assert load(tmp_path / "a", "bpe:290").identity == first.identity
  with pytest.raises(AssertionError, match="trained again"):
    load(tmp_path / "a", "bpe:291")


def test_texts_are_not_cut_where_tokens_span_words(tmp_path, monkeypatch):
  monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1)
  vocab = {token: i for i, token in enumerate(["<eos>", "a", "b", "\u0120", "\u0120b", "a\u0120b"])}
  pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  path = save(tmp_path / "t.json", tokenizers.models.BPE(vocab, [("\u0120", "b"), ("a", "\u0120b")]), pre,
              tokenizers.decoders.ByteLevel(), special=["<eos>"])
  np.testing.assert_array_equal(load(tmp_path, path).encode("a b"), [5])


def test_prefix_space_is_put_once(tmp_path, monkeypatch):
  monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1)
  path = byte_bpe(tmp_path / "t.json", pre=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True))
  assert load(tmp_path, path).encode("x a b").size == 6, "' x a b'"


@pytest.mark.parametrize("end", tokenizer.END_OF_TEXT)
def test_finds_the_end_of_text(tmp_path, end):
  made = load(tmp_path, byte_bpe(tmp_path / "t.json", end))
  assert made.eos_id == made.vocab_size - 1


def test_added_tokens_that_are_text_have_bytes(tmp_path):
  made = load(tmp_path, byte_bpe(tmp_path / "t.json", added=["    "]))
  ids = made.encode("a    b")
  assert ids.size == 3
  assert made.num_bytes_V[ids].sum() == 6


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
  path = byte_bpe(tmp_path / "t.json")
  made = tokenizers.Tokenizer.from_file(str(path))
  made.enable_truncation(3)
  made.enable_padding(length=8)
  made.save(str(path))
  assert load(tmp_path, path).encode("abcde").size == 5


def test_a_byte_order_mark_is_no_tokenizer(tmp_path):
  path = byte_bpe(tmp_path / "t.json")
  expected = load(tmp_path, path)
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  assert load(tmp_path, path).identity == expected.identity


def test_sentencepiece_bytes(tmp_path):
  vocab = [("</s>", 0.0), ("\u2581", -1.0), ("\u2581ab", -1.0), ("<0xC3>", -2.0), ("é", -1.0), ("<unk>", 0.0)]
  path = save(tmp_path / "t.json", tokenizers.models.Unigram(vocab, 5, False), special=["</s>", "<unk>"])
  assert load(tmp_path, path).num_bytes_V.tolist() == [0, 1, 3, 1, 2, 0]


@pytest.mark.parametrize("name, error, message", [
    ("bpe:256", ValueError, "'bpe:256'; SIZE is a number of tokens >= 257"),
    ("bpe:4k", ValueError, "'bpe:4k'; SIZE is a number"),
    ("bpe:", ValueError, "'bpe:'; SIZE is a number"),
    ("byte", ValueError, "data.tokenizer='byte'; use 'bytes', 'bpe:SIZE' or the path"),
    ("none.json", FileNotFoundError, "'none.json': no such file; use"),
])
def test_bad_names(tmp_path, name, error, message):
  with pytest.raises(error, match=message):
    load(tmp_path, name)


@pytest.mark.parametrize("content, message", [
    ("{", "not a tokenizers file"), (json.dumps({"a": 1}), "not a tokenizers file"),
    (None, "no end-of-text token; add")])
def test_bad_files(tmp_path, content, message):
  path = byte_bpe(tmp_path / "t.json", end="")
  if content is not None:
    path.write_text(content)
  with pytest.raises(ValueError, match=f"data.tokenizer='{path}': {message}") as caught:
    load(tmp_path, path)
  assert "\n" not in str(caught.value)
