"""The identity of a corpus changes with its text, not with its place or its time; each file is hashed once."""

import dataclasses
import hashlib
import json
import os
import pathlib

import pytest

from mor import config as config_lib
from mor.data import identity
from mor.data import text


@pytest.fixture
def config(tmp_path):
  (tmp_path / "texts").mkdir()
  for name in "ab":
    (tmp_path / "texts" / f"{name}.txt").write_text(f"the text of {name}. " * 20)
  return config_lib.DataConfig(source=f"{tmp_path}/texts/*.txt", cache_dir=str(tmp_path / "cache"), tokenizer="bytes")


def test_files_are_named_with_size_and_hash(config, tmp_path):
  found = text.identify(config)
  path = tmp_path / "texts" / "b.txt"
  assert found.files[1] == identity.File(
      str(path), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), ".txt")
  assert identity.from_dict(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_place_and_time_do_not_count(config, tmp_path):
  before = text.identify(config).digest
  os.utime(tmp_path / "texts" / "a.txt", (7, 7))
  assert text.identify(config).digest == before
  (tmp_path / "texts").rename(tmp_path / "moved")
  assert text.identify(dataclasses.replace(config, source=f"{tmp_path}/moved/*.txt")).digest == before


@pytest.mark.parametrize("change, said", [
    (dict(max_bytes=10), r"data.max_bytes=10 \(there 0\)"),
    (dict(text_key="body"), "data.text_key='body'"),
    (dict(validation_fraction=0.3), "data.validation_fraction=0.3"),
    (dict(source="sotu"), "sotu.txt.xz is new, a.txt is gone, b.txt is gone")])
def test_what_chooses_documents_counts(change, said, config):
  old, new = text.identify(config), text.identify(dataclasses.replace(config, **change))
  assert old.digest != new.digest and said.replace("\\", "") in identity.describe_change(old, new)


def test_held_out_files_count(config, tmp_path):
  (tmp_path / "held.txt").write_text("held out")
  config = dataclasses.replace(config, validation_source=str(tmp_path / "held.txt"))
  old = text.identify(config)
  assert [pathlib.Path(file.path).name for file in old.validation_files] == ["held.txt"]
  (tmp_path / "held.txt").write_text("held out, too")
  assert "held.txt has other text" in identity.describe_change(old, text.identify(config))


def test_a_file_is_hashed_once(config, tmp_path, monkeypatch):
  hashed, digest = [], hashlib.file_digest
  monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
  for _ in range(3):
    text.identify(config)
  assert len(hashed) == 2
  (tmp_path / "texts" / "a.txt").write_text("other")
  text.identify(config)
  assert len(hashed) == 4  # the hashes of a source are kept together


def test_all_documents_of_a_given_text_are_held_out(config, tmp_path):
  (tmp_path / "rows").mkdir()
  tokenizer = text.load_tokenizer(config)
  rows, content = text.load_held_out(config.source, dataclasses.replace(config, seq_len=16), tokenizer, tmp_path / "rows")
  assert content == "".join((tmp_path / "texts" / f"{name}.txt").read_text() for name in "ab")
  targets = [id_ for batch in rows.in_order(4) for id_ in batch["target_BT"][batch["loss_mask_BT"]].tolist()]
  assert bytes(id_ for id_ in targets if id_ < 256).decode() == content
