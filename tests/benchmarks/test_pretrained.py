"""The benchmarks of pretrained models measure what they say, on tiny ones."""

import argparse
import json
import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import pretrained
from benchmarks import uptraining
from mor.conversion import pretrained as conversion
from mor.model import transformer
from tests.helpers import tiny
from tests.helpers import weights

MODEL = tiny.config(model=tiny.VANILLA | dict(num_layers=4, scan_layers=False)).model
SOURCE = conversion.Source(model=MODEL, variables={"params": weights.draw(MODEL)}, tokenizer=None, chat_template=None,
                           context=48, special_ids={}, special_tokens={}, add_bos=False, opening=(), eos_id=None)
WINDOWS = [np.arange(9), np.arange(20, 26)]


def test_nll_is_the_mean_over_all_predicted_tokens():
  total, count = 0.0, 0
  params = jax.tree.map(jnp.asarray, SOURCE.variables["params"])
  for window in WINDOWS:
    hidden_BTD = transformer.Transformer(MODEL).apply({"params": params}, window[None]).hidden_BTD
    log_TV = jax.nn.log_softmax(transformer.unembed(params, hidden_BTD)[0])
    total -= float(jnp.sum(log_TV[np.arange(len(window) - 1), window[1:]]))
    count += len(window) - 1
  assert pretrained.nll(MODEL, SOURCE.variables["params"], WINDOWS) == pytest.approx(total / count, rel=1e-5)


def test_excerpts_are_the_stated_characters(tmp_path):
  books = ["".join(chr(97 + i % 26) for i in range(60000)), "x" * 51000]
  with lzma.open(tmp_path / "books.jsonl.xz", "wt") as file:
    file.writelines(json.dumps({"text": book}) + "\n" for book in books)
  encode = lambda text: np.frombuffer(text.encode(), np.uint8)
  first, second = pretrained.excerpts(str(tmp_path / "books.jsonl.xz"), encode, 7, (50000,))
  assert bytes(first).decode() == books[0][50000:50007] and len(second) == 7


def test_full_rank_is_the_source_and_less_is_not():
  rows = pretrained.initialised(SOURCE, [0, 2], [2], WINDOWS, np.arange(12))
  assert [row["method"] for row in rows] == list(pretrained.METHODS)
  own = pretrained.nll(MODEL, SOURCE.variables["params"], WINDOWS)
  for row in rows:
    assert list(row["nll"]) == ["0", "2", "full"]
    assert row["nll"]["full"] == pytest.approx(own, abs=1e-4) and row["full_rank_logits_difference"] < 1e-3
    assert abs(row["nll"]["0"] - own) > 1e-2 and abs(row["nll"]["2"] - row["nll"]["0"]) > 1e-3
  table = pretrained.table({"initialised": rows})
  assert table[0][1:4] == ["rank 0", "rank 2", "rank full"] and len(table) == 5


def test_runs_are_named_by_model_method_and_teacher():
  args = argparse.Namespace(workdir="runs/source", batch=4, seq_len=256, steps=8, eval_rows=4, learning_rate=1e-3)
  made = uptraining.make_config("r3-lora64/lower/alone", args)
  assert made.model.num_recursions == 3 and made.model.lora.q == 64 and made.init.method == "lower"
  assert made.data.tokenizer == "runs/source/tokenizer.json"
  assert not made.distill.teacher and uptraining.make_config("r2/average", args).distill.teacher
  assert all(uptraining.make_config(run, args) for run in uptraining.RUNS)
  with pytest.raises(ValueError, match="MODEL/METHOD"):
    uptraining.make_config("r2/best", args)
