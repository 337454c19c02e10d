"""Every format gives the documents exactly; damage names the file and line."""

import gzip
import json
import lzma

from array_record.python import array_record_module
import pytest

from mor.data import readers

TEXTS = ["One\r\nline — ünï\n\ncode.", "  two ", "three\u2028more\x85\x0c"]
OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def write(path, content):
  with OPENERS[path.suffix if path.suffix in OPENERS else ""](path, "wb") as file:
    file.write(content)
  return path


def as_jsonl(texts, key="text"):
  return "".join(json.dumps({key: text, "n": 1}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_array_record(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return path


@pytest.mark.parametrize("compression", list(OPENERS))
def test_jsonl(tmp_path, compression):
  path = write(tmp_path / f"a.jsonl{compression}", as_jsonl(TEXTS, key="body") + b"\n  \n")
  assert list(readers.read(path, "body")) == TEXTS


@pytest.mark.parametrize("compression", list(OPENERS))
def test_txt_is_one_document(tmp_path, compression):
  path = write(tmp_path / f"a.txt{compression}", TEXTS[0].encode())
  assert list(readers.read(path, "text")) == TEXTS[:1]


def test_array_record(tmp_path):
  path = write_array_record(tmp_path / "a.array_record", [text.encode() for text in TEXTS])
  assert list(readers.read(path, "text")) == TEXTS


def test_shipped_corpus():
  (text,) = readers.read(readers.SOTU, "text")
  assert len(text.split("\n\n")) == 233
  assert len(text.replace("\n\n", "").encode()) == 10_761_158


@pytest.mark.parametrize("line, message", [
    (b'{"text": "cut', "line 3: not JSON .*, column 14.*; repair"),
    (b'{"text": "\xff"}', "line 3: not UTF-8"),
    (b'{"body": "x", "id": 1}', r"line 3: no text in field 'text' \(body, id\); set data.text_key"),
    (b'{"text": 5}', "line 3: field 'text' is of type int, not text; set data.text_key"),
    (b'["x"]', "line 3: not an object; repair or delete the line"),
    (b'{"id": ' + b"7" * 5000 + b', "text": "x"}', "line 3: a number of too many digits; write it as text"),
    (b'{"text": "x", "in": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 3: values in values, too deep to be read"),
    (b'{"a\\nb": 1' + b"".join(b', "%d": 0' % i for i in range(99)) + b"}", r"line 3: no text in .*\('a\\nb', 0, .*, \.\.\.\)"),
    (b'\0\0\0', "line 3: not JSON"),
    (rb'{"text": "\ud800"}', "line 3: half a surrogate pair"),
])
def test_malformed_jsonl_names_the_line(tmp_path, line, message):
  path = write(tmp_path / "a.jsonl", as_jsonl(TEXTS[:2]) + line + b"\n")
  with pytest.raises(ValueError, match=f"^{path}, {message}") as caught:
    list(readers.read(path, "text"))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.txt.gz", "a.txt.xz"])
@pytest.mark.parametrize("harm", [
    lambda b: b[:len(b) // 2], lambda b: b[:80] + b"\0" * 40 + b[120:], lambda b: b"junk"], ids=["cut", "zeroed", "junk"])
def test_damaged_file_is_named(tmp_path, name, harm):
  path = write(tmp_path / name, as_jsonl([str(hash(str(i))) for i in range(200)]))
  path.write_bytes(harm(path.read_bytes()))
  with pytest.raises(ValueError, match=f"^{path} is damaged.*restore the file") as caught:
    list(readers.read(path, "text"))
  assert "\n" not in str(caught.value)


def test_txt_that_is_not_utf8_names_the_line(tmp_path):
  path = write(tmp_path / "a.txt", "one\ntwo\ndrei für\n".encode("latin-1"))
  with pytest.raises(ValueError, match=f"^{path}, line 3: not UTF-8"):
    list(readers.read(path, "text"))


def test_array_record_errors(tmp_path):
  path = write_array_record(tmp_path / "a.array_record", [b"fine", b"\xff\xfe"])
  with pytest.raises(ValueError, match=f"^{path}, record 1: not UTF-8 text.*tfds:NAME"):
    list(readers.read(path, "text"))
  whole = path.read_bytes()
  for damaged in (b"junk" * 100, whole[:len(whole) * 2 // 3], whole.replace(b"fine", b"mine")):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"^{path}, record 0: damaged"):
      list(readers.read(path, "text"))


@pytest.mark.parametrize("name", ["a.csv", "a", "a.xz", "a.array_record.gz"])
def test_unknown_format(tmp_path, name):
  path = write(tmp_path / name, b"x")
  with pytest.raises(ValueError, match=f"^{path}: cannot read files of this kind; use .txt"):
    list(readers.read(path, "text"))


@pytest.mark.parametrize("compression", list(OPENERS))
def test_a_byte_order_mark_is_no_text(tmp_path, compression):
  mark = b"\xef\xbb\xbf"
  path = write(tmp_path / f"a.jsonl{compression}", mark + as_jsonl(TEXTS))
  assert list(readers.read(path, "text")) == TEXTS
  path = write(tmp_path / f"a.txt{compression}", mark + "one \ufeff two".encode())
  assert list(readers.read(path, "text")) == ["one \ufeff two"], "in the middle it is text"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_other_encodings_are_named(tmp_path, encoding, name):
  mark = "\ufeff" if encoding.endswith("be") else ""
  path = write(tmp_path / name, (mark + "one\ntwo\n").encode(encoding))
  wanted = encoding[:6].upper()
  with pytest.raises(ValueError, match=f"^{path}.*: {wanted}, not UTF-8; convert the file, e.g. with iconv -f {wanted}"):
    list(readers.read(path, "text"))


def test_null_is_a_row_without_text(tmp_path):
  path = write(tmp_path / "a.jsonl", b'{"text": "a"}\r\n{"text": null}\r\n{"text": "b"}\r\n')
  assert list(readers.read(path, "text")) == ["a", None, "b"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.xz"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
  path = tmp_path / name
  path.mkdir()
  with pytest.raises(ValueError, match=f"^{path} cannot be read .Is a directory."):
    list(readers.read(path, "text"))
