"""Every kind of source gives its documents, and refuses in one line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from mor.data import sources

ROOT = pathlib.Path(__file__).parents[2]


def write_jsonl(path, texts):
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  return path


def open_source(source, tmp_path, text_key="text"):
  return sources.open_source(str(source), text_key, tmp_path / "cache")


def assert_one_line(caught):
  assert "\n" not in str(caught.value)


def test_sotu_through_tfds_without_tensorflow(tmp_path):
  program = ("import sys, pathlib\nfrom mor.data import readers, sources\n"
             "documents = sources.open_source('sotu', 'text', pathlib.Path(sys.argv[1]))\n"
             "text, = readers.read(readers.SOTU, '')\n"
             "assert list(documents) == text.split('\\n\\n') == list(documents)\n"
             "import tensorflow_datasets as tfds\n"
             "directory, = (p for p in pathlib.Path(sys.argv[1], 'tfds').iterdir() if p.is_dir())\n"
             "records = tfds.data_source('state_of_the_union', split='train', data_dir=directory, download=False)\n"
             "assert [r['id'] for r in records] == list(range(233))\n"
             "assert 'tensorflow' not in sys.modules\n")
  done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=False, text=True,
                        capture_output=True)
  assert done.returncode == 0, done.stderr
  assert not done.stdout


def test_sotu_is_the_same_source_everywhere(tmp_path):
  one, two = (sources.open_source("sotu", "text", tmp_path / name) for name in "ab")
  assert one.identity == two.identity
  assert not list(tmp_path.iterdir()), "opening must not build"


def test_glob_reads_files_in_order_of_name(tmp_path):
  for name, texts in [("b", ["3"]), ("a", ["1", "2"])]:
    write_jsonl(tmp_path / f"{name}.jsonl", texts)
  (tmp_path / "c.txt").write_text("4")
  documents = open_source(tmp_path / "*.*", tmp_path)
  assert list(documents) == ["1", "2", "3", "4"] == list(documents)
  assert len(documents.parts) == 3


def test_file_whose_name_looks_like_a_glob(tmp_path):
  write_jsonl(tmp_path / "a[1].jsonl", ["x"])
  assert list(open_source(tmp_path / "a[1].jsonl", tmp_path)) == ["x"]


def test_identity_follows_the_file(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", ["x"])
  first = open_source(path, tmp_path).identity
  assert open_source(path, tmp_path).identity == first
  os.utime(path, ns=(1, 1))
  touched = open_source(path, tmp_path).identity
  write_jsonl(path, ["xy"])
  os.utime(path, ns=(1, 1))
  assert len({first, touched, open_source(path, tmp_path).identity}) == 3


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="data source 'nosuch/\\*.txt': no such file; give") as caught:
    open_source("nosuch/*.txt", tmp_path)
  assert_one_line(caught)


def test_directory(tmp_path):
  (tmp_path / "x.txt").mkdir()
  for source in (tmp_path / "x.txt", tmp_path / "*.txt"):
    with pytest.raises(ValueError, match=f"x.txt is a directory; use a glob such as {tmp_path}/x.txt/\\*.txt, or hf:"):
      open_source(source, tmp_path)


def test_what_cannot_be_read_is_named(tmp_path):
  os.mkfifo(tmp_path / "a.txt")
  (tmp_path / "b.txt").symlink_to("b.txt")
  (tmp_path / "c.txt").symlink_to("nothing.txt")
  for name, message in [("a", "a device or a pipe, which cannot be read twice; copy"),
                        ("[b]", "b.txt cannot be read .Too many levels of symbolic links."),
                        ("[c]", "c.txt cannot be read .No such file or directory.")]:
    with pytest.raises(ValueError, match=message) as caught:
      open_source(tmp_path / f"{name}.txt", tmp_path)
    assert_one_line(caught)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
  path = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
  documents = open_source(path, tmp_path)
  texts = iter(documents)
  assert next(texts) == "x"
  with open(path, "a", encoding="utf-8") as file:
    file.write('{"text": "z"}\n')
  with pytest.raises(ValueError, match="a.jsonl has changed since the start; run again when nothing writes to it"):
    list(texts)
  assert list(open_source(path, tmp_path)) == ["x", "y", "z"]


def test_rows_without_text_are_counted_once(tmp_path, capsys):
  path = write_jsonl(tmp_path / "a.jsonl", ["x", None, "y", None, None])
  documents = open_source(path, tmp_path)
  assert next(iter(documents)) == "x" and list(documents) == ["x", "y"] == list(documents)
  assert capsys.readouterr().err == f"data source '{path}': 3 rows whose text is null are left out\n"


@pytest.fixture(name="prepared", scope="module")
def fixture_prepared(tmp_path_factory):
  """A TFDS directory with a dataset that no registry knows."""
  data_dir = tmp_path_factory.mktemp("tfds")
  program = ("import sys, numpy as np, tensorflow_datasets as tfds\n"
             "class MorTestLines(tfds.core.GeneratorBasedBuilder):\n"
             "  VERSION = tfds.core.Version('1.0.0')\n"
             "  def _info(self):\n"
             "    features = {'body': tfds.features.Text(), 'id': np.int64}\n"
             "    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),\n"
             "                                 disable_shuffling=True)\n"
             "  def _split_generators(self, dl_manager):\n"
             "    return {name: self._generate_examples(name) for name in ('train', 'test')}\n"
             "  def _generate_examples(self, name):\n"
             "    for i in range(5):\n"
             "      yield i, {'body': f'{name} ü {i}', 'id': i}\n"
             "MorTestLines(data_dir=sys.argv[1], file_format='array_record').download_and_prepare()\n")
  subprocess.run([sys.executable, "-c", program, str(data_dir)], check=True, capture_output=True)
  return data_dir


def test_tfds(prepared, tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
  train, test = (open_source(f"tfds:mor_test_lines{split}", tmp_path, "body") for split in ("", "#test"))
  assert list(train) == [f"train ü {i}" for i in range(5)]
  assert list(test) == [f"test ü {i}" for i in range(5)]
  assert not set(train.parts) & set(test.parts)


@pytest.mark.parametrize("source, text_key, error, message", [
    ("tfds:mor_no_such", "body", FileNotFoundError, "no such dataset.*array_record.*TFDS_DATA_DIR"),
    ("tfds:mor_test_lines", "text", ValueError, r"no field 'text' \((body, id|id, body)\); set data"),
    ("tfds:mor_test_lines", "id", ValueError, "field 'id' is not text; set data.text_key"),
    ("tfds:mor_test_lines#dev", "body", ValueError, "'tfds:mor_test_lines#dev'.*name one of its splits after '#'"),
    ("tfds:", "body", ValueError, "give the name of a prepared TFDS dataset"),
    ("tfds:ag_news_subset", "body", FileNotFoundError, "not prepared under .*; run download_and_prepare"),
])
def test_tfds_errors(prepared, tmp_path, monkeypatch, source, text_key, error, message):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
  with pytest.raises(error, match=message) as caught:
    list(open_source(source, tmp_path, text_key))
  assert_one_line(caught)


def test_tfds_as_tfrecord(prepared, tmp_path, monkeypatch):
  subprocess.run(["cp", "-r", f"{prepared}/mor_test_lines", str(tmp_path)], check=True)
  info = tmp_path / "mor_test_lines/1.0.0/dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  with pytest.raises(ValueError, match="prepared as tfrecord.*file_format='array_record'"):
    open_source("tfds:mor_test_lines", tmp_path, "body")


def test_tfds_names_the_record_of_bytes_that_are_no_utf8(tmp_path, monkeypatch, prepared):
  monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
  documents = open_source("tfds:mor_test_lines#test", tmp_path, "body")
  records = [{"body": b"fine"}, {"body": "f\u00fcr".encode("latin-1")}]
  import tensorflow_datasets as tfds  # pylint: disable=import-outside-toplevel
  monkeypatch.setattr(tfds, "data_source", lambda *args, **options: records)
  with pytest.raises(ValueError, match="'tfds:mor_test_lines#test', record 1: not UTF-8 .*; convert") as caught:
    list(documents)
  assert_one_line(caught)


def test_tfds_says_that_tensorflow_is_missing(tmp_path, monkeypatch):
  """The code of c4 needs it, so TFDS does not know that name without it."""
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  find_spec = sources.importlib.util.find_spec
  monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: name != "tensorflow" and find_spec(name))
  with pytest.raises(FileNotFoundError, match="'tfds:c4': .*without TensorFlow, which is not installed.*; prepare it with"):
    open_source("tfds:c4", tmp_path)


def test_hf_without_datasets(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ValueError, match="needs the package datasets; pip install datasets"):
    open_source("hf:x", tmp_path)


def test_hf(tmp_path, capsys):
  datasets = pytest.importorskip("datasets", reason="the optional package datasets is not installed")
  train, test = (datasets.Dataset.from_dict({"text": [name, "ü"], "n": [1, 2]}) for name in ("a", "b"))
  train.save_to_disk(str(tmp_path / "one"))
  datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "two"))
  (tmp_path / "empty").mkdir()
  assert list(open_source(f"hf:{tmp_path}/one", tmp_path)) == ["a", "ü"]
  datasets.Dataset.from_dict({"text": ["a", None, "b", None]}).save_to_disk(str(tmp_path / "nulls"))
  assert list(open_source(f"hf:{tmp_path}/nulls", tmp_path)) == ["a", "b"]
  assert capsys.readouterr().err.endswith("nulls': 2 rows whose text is null are left out\n")
  assert list(open_source(f"hf:{tmp_path}/two#test", tmp_path)) == ["b", "ü"]
  for source, key, message in [
      ("two#dev", "text", r"no split 'dev' \(train, test\)"), ("empty", "text", "save_to_disk"),
      ("one", "body", r"no field 'body' \(text, n\)"), ("one", "n", "field 'n' is not text")]:
    with pytest.raises(ValueError, match=message) as caught:
      open_source(f"hf:{tmp_path}/{source}", tmp_path, key)
    assert_one_line(caught)
  with pytest.raises(FileNotFoundError, match="no such directory"):
    open_source(f"hf:{tmp_path}/none", tmp_path)
