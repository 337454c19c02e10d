"""Readers of text files, one per format: a path in, documents out.

  .txt           the whole file is one document
  .jsonl         one JSON object a line; the document is its field `text_key`
  .array_record  every record is one document in UTF-8

`.txt` and `.jsonl` may be compressed (`.gz`, `.xz`). Bytes are decoded as UTF-8
and not changed: line ends stay as they are. A damaged file raises an error that names the
file and the line.
"""

from collections.abc import Callable, Iterator
import functools
import gzip
import json
import lzma
import pathlib
from typing import BinaryIO
import zlib

SOTU = pathlib.Path(__file__).parent / "corpora" / "sotu.txt.xz"  # shipped with the package

_OPENERS: dict[str, Callable[[pathlib.Path], BinaryIO]] = {
    "": functools.partial(open, mode="rb"), ".gz": gzip.open, ".xz": lzma.open}
_DAMAGE = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)


def read(path: pathlib.Path, text_key: str) -> Iterator[str]:
  """Yields the documents of one file.

  Raises:
    ValueError: the suffix is unknown, or the file is damaged or malformed.
  """
  suffix, compression = _suffixes(path)
  if suffix not in READERS or (compression and suffix == ".array_record"):
    raise ValueError(f"{path}: cannot read files of this kind; use .txt or .jsonl (also .gz, .xz) "
                     "or .array_record")
  yield from READERS[suffix](path, text_key)


def _suffixes(path: pathlib.Path) -> tuple[str, str]:
  if path.suffix in (".gz", ".xz"):
    return path.with_suffix("").suffix, path.suffix
  return path.suffix, ""


def _read_txt(path: pathlib.Path, text_key: str) -> Iterator[str]:
  del text_key
  try:
    with _OPENERS[_suffixes(path)[1]](path) as file:
      content = file.read()
  except _DAMAGE as error:
    raise ValueError(f"{path} is damaged ({error}); restore the file") from error
  try:
    yield content.decode("utf-8")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file to "
                     "UTF-8") from error


def _read_jsonl(path: pathlib.Path, text_key: str) -> Iterator[str]:
  number = 0
  try:
    with _OPENERS[_suffixes(path)[1]](path) as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield _text_of(line, text_key, f"{path}, line {number}")
  except _DAMAGE as error:
    raise ValueError(f"{path} is damaged after line {number} ({error}); restore the "
                     "file") from error


def _text_of(line: bytes, text_key: str, where: str) -> str:
  try:
    record = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    raise ValueError(f"{where}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
  except json.JSONDecodeError as error:
    raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}); repair or delete "
                     "the line") from error
  if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
    fields = ", ".join(record) if isinstance(record, dict) else "not an object"
    raise ValueError(f"{where}: no text in field {text_key!r} ({fields}); set data.text_key")
  try:
    record[text_key].encode("utf-8")
  except UnicodeEncodeError as error:
    raise ValueError(f"{where}: half a surrogate pair ({error.reason}); repair or delete the "
                     "line") from error
  return record[text_key]


def _read_array_record(path: pathlib.Path, text_key: str) -> Iterator[str]:
  del text_key
  from array_record.python import array_record_module

  index = 0
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    for index in range(reader.num_records()):
      yield reader.read([index])[0].decode("utf-8")
    reader.close()  # raises if opening failed
  except (RuntimeError, IndexError) as error:
    raise ValueError(f"{path}, record {index}: damaged ({error}); restore the file") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}, record {index}: not UTF-8 text ({error.reason}); a TFDS dataset is "
                     "read with data.source=tfds:NAME") from error


READERS: dict[str, Callable[[pathlib.Path, str], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".array_record": _read_array_record,
}
