"""From files to batches and back to the text."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from array_record.python import array_record_module
import numpy as np
import pytest

from mor.data import split
from mor.data import text
from tests.helpers import tiny

ROOT = pathlib.Path(__file__).parents[2]
BOOKS = pathlib.Path(os.environ.get("MOR_DATA") or ROOT.parent / "shared" / "data") / "books"


@pytest.fixture(name="config")
def fixture_config(tmp_path):
  path = tmp_path / "train.jsonl"
  texts = [f"Document {i}: naïve " + "words and more words, " * (i % 5) for i in range(20)]
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return tiny.config(data=dict(source=str(path), cache_dir=str(tmp_path / "cache"), tokenizer="bpe:280")).data


def read_documents(corpus, rows):
  """The documents of a file of rows, taken apart at eos."""
  batches = list(rows.in_order(3))
  mask = np.concatenate([b["loss_mask_BT"] for b in batches])
  ids = np.concatenate([b["target_BT"] for b in batches])[mask]
  ends = np.flatnonzero(ids == corpus.tokenizer.eos_id)
  assert ends[-1] == len(ids) - 1
  return [corpus.tokenizer.decode(part[part != corpus.tokenizer.eos_id]) for part in np.split(ids, ends)][:-1], ids


@pytest.mark.parametrize("name", ["bytes", "bpe:280"])
def test_rows_are_the_documents(config, tmp_path, name):
  config = dataclasses.replace(config, tokenizer=name)
  corpus = text.load(config, vocab_size=280)
  parts = split.make(config, tmp_path / "cache")
  train, train_ids = read_documents(corpus, corpus.train)
  held_out, held_out_ids = read_documents(corpus, corpus.validation)
  assert sorted(train) == sorted(parts.train)
  assert train != list(parts.train), "training documents are shuffled"
  assert held_out == list(parts.held_out)
  assert not set(train) & set(held_out)
  assert corpus.validation_text() == "".join(held_out)
  num_bytes_V = corpus.tokenizer.num_bytes_V
  assert num_bytes_V[held_out_ids].sum() == len(corpus.validation_text().encode())
  assert num_bytes_V[train_ids].sum() == sum(len(document.encode()) for document in parts.train)


def test_batches_have_the_shape(config):
  corpus = text.load(config, vocab_size=280)
  assert {name: value.shape for name, value in corpus.train.batch(3).items()} == {
      name: (4, 12) for name in ("tokens_BT", "target_BT", "segment_BT", "loss_mask_BT")}
  reader = array_record_module.ArrayRecordReader(str(corpus.directory / "train.array_record"))
  assert len(reader.read([0])[0]) == 2 * 13, "two bytes a token, where they hold the vocabulary"


def test_second_load_reads_the_cache_only(config, tmp_path, monkeypatch):
  first = text.load(config, vocab_size=280)

  def fail(*args):
    raise AssertionError("read the source")

  monkeypatch.setattr(split.sources.readers, "read", fail)
  second = text.load(config, vocab_size=280)
  np.testing.assert_array_equal(second.train.batch(5)["tokens_BT"], first.train.batch(5)["tokens_BT"])
  assert second.directory == first.directory
  assert text.load_tokenizer(config).identity == first.tokenizer.identity


def test_lost_cache_comes_back_the_same(config, tmp_path):
  first = text.load(config, vocab_size=280)
  other = text.load(dataclasses.replace(config, cache_dir=str(tmp_path / "other")), vocab_size=280)
  for name in ("train", "validation"):
    left, right = (directory / f"{name}.array_record" for directory in (first.directory, other.directory))
    assert left.read_bytes() == right.read_bytes()


def test_torn_cache_is_made_again(config):
  corpus = text.load(config, vocab_size=280)
  path = corpus.directory / "train.array_record"
  whole = path.read_bytes()
  path.write_bytes(whole[:-100])
  text.load(config, vocab_size=280)
  assert path.read_bytes() == whole


@pytest.mark.parametrize("change", [
    dict(seq_len=11), dict(shuffle_seed=1), dict(tokenizer="bytes"), dict(max_bytes=900),
    dict(validation_fraction=0.4), dict(validation_source="VAL")], ids=str)
def test_cache_is_named_by_what_defines_it(config, tmp_path, change):
  (tmp_path / "val.jsonl").write_text('{"text": "held out"}\n')
  change = {name: str(tmp_path / "val.jsonl") if value == "VAL" else value for name, value in change.items()}
  first = text.load(config, vocab_size=280)
  changed = text.load(dataclasses.replace(config, **change), vocab_size=280)
  assert changed.directory != first.directory
  same = text.load(dataclasses.replace(config, batch_size=2), vocab_size=280)
  assert same.directory == first.directory


def test_either_side_names_the_cache(config, tmp_path):
  for name in ("a", "b"):
    (tmp_path / f"val_{name}.jsonl").write_text('{"text": "held out"}\n')
  config = dataclasses.replace(config, tokenizer="bytes", validation_source=str(tmp_path / "val_a.jsonl"))
  changes = [dict(), dict(max_bytes=900), dict(validation_source=str(tmp_path / "val_b.jsonl"))]
  assert len({text.load(dataclasses.replace(config, **change), 280).directory for change in changes}) == 3


def test_documents_are_tokenised_in_calls_of_bounded_size(config, monkeypatch, tmp_path):
  whole = text.load(config, vocab_size=280)
  monkeypatch.setattr(text, "_CALL_CHARACTERS", 300)
  calls, encode_batch = [], text.tokenizer_lib.JsonTokenizer.encode_batch
  monkeypatch.setattr(text.tokenizer_lib.JsonTokenizer, "encode_batch",
                      lambda self, texts: calls.append(sum(map(len, texts))) or encode_batch(self, texts))
  pieces = text.load(dataclasses.replace(config, cache_dir=str(tmp_path / "other")), vocab_size=280)
  np.testing.assert_array_equal(pieces.train.batch(2)["tokens_BT"], whole.train.batch(2)["tokens_BT"])
  assert max(calls) < 300 + 130, "the longest document has fewer than 130 characters"
  assert sum(call < 300 for call in calls) <= 2, "only the last of each file may be smaller"


@pytest.mark.parametrize("change, error, message", [
    (dict(source="nosuch.txt"), FileNotFoundError, "'nosuch.txt': no such file"),
    (dict(tokenizer="nosuch.json"), FileNotFoundError, "'nosuch.json': no such file"),
    (dict(text_key="body"), ValueError, "train.jsonl, line 1: no text in field 'body'"),
    (dict(batch_size=999), ValueError, r"gives \d+ rows of 12 tokens, fewer than data.batch_size=999; use"),
    (dict(tokenizer="bpe:290"), ValueError, "has 290 tokens, more than model.vocab_size=280; set model.vocab_size=290"),
    (dict(shuffle_seed=-1), ValueError, "data.shuffle_seed=-1; use 0 to 4294967295"),
], ids=str)
def test_bad_input_is_one_line(config, change, error, message):
  with pytest.raises(error, match=message) as caught:
    text.load(dataclasses.replace(config, **change), vocab_size=280)
  assert "\n" not in str(caught.value)


def test_read_error_leaves_no_cache(config, tmp_path):
  path = pathlib.Path(config.source)
  path.write_text(path.read_text() + "{cut\n")
  with pytest.raises(ValueError, match="train.jsonl, line 21: not JSON"):
    text.load(config, vocab_size=280)
  assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_runs_without_tensorflow(config):
  program = ("import sys, json\nfrom mor import config, fields\nfrom mor.data import text\n"
             "corpus = text.load(fields.build(config.DataConfig, json.loads(sys.argv[1]), 'data'), 280)\n"
             "corpus.train.batch(0)\nassert not {'tensorflow', 'tensorflow_datasets'} & set(sys.modules)\n")
  done = subprocess.run([sys.executable, "-c", program, json.dumps(dataclasses.asdict(config))], cwd=ROOT, check=False,
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not BOOKS.exists(), reason="needs the books corpus of the data pack (MOR_DATA)")
def test_books(config):
  config = dataclasses.replace(config, source=str(BOOKS / "train-0*.jsonl.xz"), tokenizer="bytes", max_bytes=1_000_000,
                               validation_source=str(BOOKS / "val.jsonl.xz"), seq_len=256)
  corpus = text.load(config, vocab_size=257)
  assert len(corpus.validation_text().encode()) == 3_983_041
  documents, ids = read_documents(corpus, corpus.train)
  assert corpus.tokenizer.num_bytes_V[ids].sum() == 1_000_000
  assert len(documents) > 1
