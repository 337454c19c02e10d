"""Readers of text files, one per format: a path in, documents out.

  .txt           the whole file is one document
  .jsonl         one JSON object a line; the document is its field `text_key`
  .array_record  every record is one document in UTF-8

`.txt` and `.jsonl` may be compressed (`.gz`, `.xz`). Bytes are decoded as UTF-8
and not changed: line ends stay as they are, and only a byte order mark at the start of a
file is no text. A damaged file raises an error that names the file and the line.
"""

from collections.abc import Callable, Iterator
import functools
import gzip
import lzma
import pathlib
from typing import Any, BinaryIO
import zlib

from mor.data import lines as lines_lib

SOTU = pathlib.Path(__file__).parent / "corpora" / "sotu.txt.xz"  # shipped with the package

_OPENERS: dict[str, Callable[[pathlib.Path], BinaryIO]] = {
    "": functools.partial(open, mode="rb"), ".gz": gzip.open, ".xz": lzma.open}
_DAMAGE = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)


def read(path: pathlib.Path, text_key: str) -> Iterator[str | None]:
  """Yields the documents of one file; None for a row whose text is null.

  Raises:
    ValueError: the suffix is unknown, or the file is damaged or malformed, or cannot be read.
  """
  suffix, compression = _suffixes(path)
  if suffix not in READERS or (compression and suffix == ".array_record"):
    raise ValueError(f"{path}: cannot read files of this kind; use .txt or .jsonl (also .gz, .xz) "
                     "or .array_record")
  yield from READERS[suffix](path, text_key)


def records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields file and line, for messages, and the JSON object of each line that is not blank.

  Raises:
    ValueError: as `read`.
  """
  number = 0
  try:
    with _OPENERS[_suffixes(path)[1]](path) as file:
      for number, line in enumerate(file, 1):
        where = f"{path}, line {number}"
        line = _at(where, lines_lib.without_mark, line) if number == 1 else line
        if line.strip():
          yield where, _at(where, lines_lib.parse, line)
  except _DAMAGE as error:
    raise ValueError(f"{path} is damaged after line {number} ({error}); restore the file") from error
  except OSError as error:
    raise unreadable(path, error) from error


def text_of(where: str, record: dict[str, Any], field: str) -> str | None:
  """Returns the text of a field of an object; None if it is null.

  Raises:
    ValueError: there is no such field, or it holds something else.
  """
  if field not in record:
    raise ValueError(f"{where}: no text in field {field!r} ({lines_lib.names(record)}); set data.text_key")
  text = record[field]
  if text is None:
    return None
  if not isinstance(text, str):
    raise ValueError(f"{where}: field {field!r} is of type {type(text).__name__}, not text; set data.text_key")
  _at(where, lines_lib.check_pairs, text)
  return text


def unreadable(path: pathlib.Path, error: OSError) -> ValueError:
  """Returns the error for a file that the system does not let us read."""
  return ValueError(f"{path} cannot be read ({error.strerror or error}); repair that, or leave the file out")


def kind(path: pathlib.Path) -> str:
  """Returns the suffix that chooses the reader of a file, e.g. ".txt" for "a.txt.gz"."""
  return _suffixes(path)[0]


def _suffixes(path: pathlib.Path) -> tuple[str, str]:
  if path.suffix in (".gz", ".xz"):
    return path.with_suffix("").suffix, path.suffix
  return path.suffix, ""


def _at(where: str, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function whose errors do not say where."""
  try:
    return function(*args)
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def _read_txt(path: pathlib.Path, text_key: str) -> Iterator[str]:
  del text_key
  try:
    with _OPENERS[_suffixes(path)[1]](path) as file:
      content = file.read()
  except _DAMAGE as error:
    raise ValueError(f"{path} is damaged ({error}); restore the file") from error
  except OSError as error:
    raise unreadable(path, error) from error
  content = _at(str(path), lines_lib.without_mark, content)
  try:
    text = content.decode("utf-8")
  except UnicodeDecodeError as error:
    line = content.count(b"\n", 0, error.start) + 1
    raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file to "
                     "UTF-8") from error
  del content
  yield text


def _read_jsonl(path: pathlib.Path, text_key: str) -> Iterator[str | None]:
  for where, record in records(path):
    yield text_of(where, record, text_key)


def _read_array_record(path: pathlib.Path, text_key: str) -> Iterator[str]:
  del text_key
  from array_record.python import array_record_module

  index = 0
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    for index in range(reader.num_records()):
      yield reader.read([index])[0].decode("utf-8")
    reader.close()  # raises if opening failed
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}, record {index}: not UTF-8 text ({error.reason}); a TFDS dataset is "
                     "read with data.source=tfds:NAME") from error
  except (RuntimeError, IndexError, ValueError) as error:
    raise ValueError(f"{path}, record {index}: damaged ({error}); restore the file") from error


READERS: dict[str, Callable[[pathlib.Path, str], Iterator[str | None]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".array_record": _read_array_record,
}
