"""Minimal pairs: reading, packing, and the accuracy of models that are known."""

import dataclasses
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor import sharding
from mor.data import blimp
from mor.model import transformer
from mor.train import minimal_pairs
from mor.train import step as step_lib
from tests.helpers import tiny


def write(path: pathlib.Path, lines: list[str]) -> pathlib.Path:
  with gzip.open(path, "wt", encoding="utf-8") as file:
    file.write("\n".join(lines) + "\n")
  return path


def record(good: str, bad: str, uid: str) -> str:
  return json.dumps(dict(good=good, bad=bad, uid=uid, field="syntax"))


def test_reads_the_first_pairs_of_each_paradigm(tmp_path):
  lines = [record(f"good {i}", f"bad {i}", uid) for i in range(3) for uid in ("a", "b")]
  pairs = blimp.read(write(tmp_path / "pairs.jsonl.gz", lines), pairs_per_paradigm=2)
  assert [(p.good, p.bad, p.uid) for p in pairs] == [
      ("good 0", "bad 0", "a"), ("good 0", "bad 0", "b"), ("good 1", "bad 1", "a"), ("good 1", "bad 1", "b")]


@pytest.mark.parametrize("line, what", [
    ('{"good": "x"}', "line 2"), ("not json", "line 2"), ("[1]", "line 2")])
def test_a_malformed_line_is_named(tmp_path, line, what):
  path = write(tmp_path / "pairs.jsonl.gz", [record("a", "b", "u"), line])
  with pytest.raises(ValueError, match=what) as caught:
    blimp.read(path, 5)
  assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path):
  path = write(tmp_path / "pairs.jsonl.gz", [record(str(i), "b", "u") for i in range(500)])
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(ValueError, match="damaged"):
    blimp.read(path, 5)


def test_accuracy_counts_strict_wins():
  pairs = [blimp.Pair("long one", "short", "u"), blimp.Pair("a", "bcd", "u"), blimp.Pair("tie", "eit", "u"),
           blimp.Pair("xy", "z", "v")]
  encode = lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32)
  longer_is_better = lambda sentences: np.array([len(ids) for ids in sentences], np.float64)
  assert minimal_pairs.accuracy(pairs, encode, longer_is_better) == 2 / 4


def test_packing_places_every_sentence_once():
  sentences = [np.arange(1, n + 1, dtype=np.int32) for n in (5, 6, 2, 12, 1)]
  batch, places = minimal_pairs.pack(sentences, eos_id=60, seq_len=12, batch_size=2)
  assert batch["tokens_BT"].shape == (4, 12)
  assert places == [(0, 0, 5), (0, 5, 11), (1, 0, 2), (2, 0, 12), (3, 0, 1)]
  assert batch["segment_BT"][0].tolist() == [1] * 5 + [2] * 6 + [0]
  for ids, (row, start, stop) in zip(sentences, places):
    assert batch["target_BT"][row, start:stop].tolist() == ids.tolist()
    assert batch["tokens_BT"][row, start:stop].tolist() == [60, *ids[:-1].tolist()]


@pytest.mark.parametrize("length", [0, 13])
def test_a_sentence_must_fit_a_row(length):
  with pytest.raises(ValueError, match=f"sentence 1 has {length} tokens"):
    minimal_pairs.pack([np.ones(3, np.int32), np.ones(length, np.int32)], eos_id=60, seq_len=12, batch_size=2)


@pytest.mark.parametrize("cross_documents", [False, True])
def test_log_prob_is_that_of_the_sentence_alone(cross_documents):
  config = tiny.config(model=dict(cross_documents=cross_documents))
  mesh = sharding.make_mesh(config.mesh)
  params = jax.tree.map(lambda x: 5 * x, step_lib.init_state(config, mesh).params)  # far from uniform
  rng = np.random.default_rng(0)
  sentences = [rng.integers(0, 60, n, dtype=np.int32) for n in (4, 7, 3, 9, 5)]
  ours = minimal_pairs.make(config, mesh, eos_id=60)(params, {}, sentences)
  tokens_BT = np.zeros((5, 12), np.int32)  # one a row, causal: what follows a sentence does not matter
  for row, ids in enumerate(sentences):
    tokens_BT[row, :len(ids)] = [60, *ids[:-1]]
  model = transformer.Transformer(dataclasses.replace(config.model, execution="masked"))
  out = jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT, routing="decide"))(jnp.asarray(tokens_BT))
  log_p_BTV = np.asarray(jax.nn.log_softmax(transformer.unembed(params, out.hidden_BTD)))
  for row, ids in enumerate(sentences):
    assert ours[row] == pytest.approx(log_p_BTV[row, np.arange(len(ids)), ids].sum(), abs=1e-4)
