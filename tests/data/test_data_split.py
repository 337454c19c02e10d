"""The split is disjoint, complete, seeded and bounded."""

import dataclasses
import json

import pytest

from mor.data import split
from tests.helpers import tiny


@pytest.fixture(name="config")
def fixture_config(tmp_path):
  path = tmp_path / "train.jsonl"
  texts = [f"document {i} " + "é" * (i % 7) for i in range(30)] + ["  ", ""]
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return tiny.config(data=dict(source=str(path))).data


def make(config, tmp_path, **changes):
  return split.make(dataclasses.replace(config, **changes), tmp_path / "cache")


def test_split_is_a_partition_in_source_order(config, tmp_path):
  parts = make(config, tmp_path)
  train, held_out = list(parts.train), list(parts.held_out)
  assert len(held_out) == 6, "validation_fraction 0.2 of the 30 that are not blank"
  number = lambda text: int(text.split()[1])
  assert sorted(train + held_out, key=number) == [f"document {i} " + "é" * (i % 7) for i in range(30)]
  assert train == sorted(train, key=number)
  assert held_out == sorted(held_out, key=number)
  assert held_out == list(parts.held_out) == list(make(config, tmp_path).held_out)
  assert list(make(config, tmp_path, shuffle_seed=1).held_out) != held_out


def test_split_is_the_same_on_every_machine(config, tmp_path):
  # Changes only with the rule itself, and then every cached corpus and reported figure changes too.
  assert [text.split()[1] for text in make(config, tmp_path).held_out] == ["3", "4", "9", "13", "15", "20"]


def test_identities_follow_what_defines_the_text(config, tmp_path):
  changes = [dict(), dict(shuffle_seed=1), dict(validation_fraction=0.3), dict(max_bytes=50), dict(text_key="body")]
  for part in ("train", "held_out", "sample"):
    names = [getattr(make(config, tmp_path, **change), part).identity for change in changes]
    assert len(set(names)) == len(changes)
    assert names[0] == getattr(make(config, tmp_path), part).identity
  parts = make(config, tmp_path)
  assert len({parts.train.identity, parts.held_out.identity, parts.sample.identity}) == 3


def test_validation_source(config, tmp_path):
  other = tmp_path / "other.jsonl"
  other.write_text('{"text": "held"}\n{"text": " "}\n{"text": "out"}\n')
  parts = make(config, tmp_path, validation_source=str(other), max_bytes=20)
  assert list(parts.held_out) == ["held", "out"], "max_bytes bounds training text only"
  assert list(parts.train) == ["document 0 ", "document "]
  everything = make(config, tmp_path, validation_source=str(other))
  assert len(list(everything.train)) == 30


def test_a_file_cannot_train_and_be_held_out(config, tmp_path):
  (tmp_path / "val.jsonl").write_text('{"text": "held"}\n')
  with pytest.raises(ValueError, match="val.jsonl.*shares .*/val.jsonl with data.source=.*; leave"):
    make(config, tmp_path, source=f"{tmp_path}/*.jsonl", validation_source=f"{tmp_path}/val.jsonl")


@pytest.mark.parametrize("max_bytes", [1, 12, 13, 23, 27, 100])
def test_max_bytes_is_exact_up_to_a_character(config, tmp_path, max_bytes):
  parts = make(config, tmp_path, max_bytes=max_bytes, validation_source="sotu")
  size = sum(len(text.encode()) for text in parts.train)
  assert max_bytes - 1 <= size <= max_bytes
  full = "".join(make(config, tmp_path, validation_source="sotu").train)
  assert full.startswith("".join(parts.train))


@pytest.mark.parametrize("text", ["a b c\n" * 7, "x" * 40, "é" * 40, "\n" * 10 + "ab", "ab"])
def test_single_document_is_cut_near_its_end(config, tmp_path, text):
  path = tmp_path / "one.txt"
  path.write_text(text)
  parts = make(config, tmp_path, source=str(path))
  (head,), (tail,) = parts.train, parts.held_out
  assert head + tail == text
  assert head and tail
  if len(text) > 20:
    assert abs(len(tail) - 0.2 * len(text)) <= 4
    assert "\n" not in text or head.endswith("\n")
  whole = make(config, tmp_path, source=str(path), validation_source="sotu")
  assert list(whole.train) == [text]
  bounded = make(config, tmp_path, source=str(path), validation_source="sotu", max_bytes=len(text))
  assert len("".join(bounded.train).encode()) == len(text), "bytes, not characters"


def test_sample_is_bounded_and_trains_only(config, tmp_path, monkeypatch):
  parts = make(config, tmp_path)
  assert list(parts.sample) == list(parts.train), "small sources are sampled whole"
  monkeypatch.setattr(split, "SAMPLE_BYTES", 61)
  sample, train = list(make(config, tmp_path).sample), list(parts.train)
  assert sum(len(text.encode()) for text in sample) in (60, 61)
  assert sum(text in train for text in sample) >= len(sample) - 1, "only the last may be cut"
  assert all(any(t.startswith(text) for t in train) for text in sample)
  assert sample != train[:len(sample)], "a random choice, not the beginning"
  assert sample == list(make(config, tmp_path).sample)


@pytest.mark.parametrize("content", ["", '{"text": " "}\n{"text": ""}\n'])
def test_empty_source(config, tmp_path, content):
  path = tmp_path / "empty.jsonl"
  path.write_text(content)
  with pytest.raises(ValueError, match="data.source='.*empty.jsonl' holds no text; give"):
    list(make(config, tmp_path, source=str(path)).train)
  with pytest.raises(ValueError, match="data.validation_source='.*empty.jsonl' holds no text; give"):
    list(make(config, tmp_path, validation_source=str(path)).held_out)


def test_single_character(config, tmp_path):
  (tmp_path / "one.txt").write_text("x")
  with pytest.raises(ValueError, match="holds a single character; give more text"):
    list(make(config, tmp_path, source=str(tmp_path / "one.txt")).train)


def test_nothing_is_read_before_it_is_needed(config, tmp_path):
  (tmp_path / "bad.jsonl").write_text("not json\n")
  parts = make(config, tmp_path, source=str(tmp_path / "bad.jsonl"))
  with pytest.raises(ValueError, match="line 1: not JSON"):
    next(iter(parts.train))


def test_shuffled_is_a_permutation_for_each_use():
  orders = [split.shuffle(50, seed, use) for seed in (0, 1) for use in ("a", "b")]
  assert all(sorted(order) == list(range(50)) for order in orders)
  assert len(set(map(tuple, orders))) == 4
