"""Sources of documents: `data.source` in, `Documents` out.

  sotu             the shipped State of the Union addresses
  tfds:NAME        a TFDS dataset prepared as ArrayRecord in the user's TFDS directory
  hf:DIR           a Hugging Face dataset written by `save_to_disk`
  PATH or GLOB     files of the formats in `readers.py`, in order of name

NAME and DIR may end in `#SPLIT` (default `#train`). Nothing is downloaded.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import glob
import hashlib
import importlib.util
import os
import pathlib
import sys

from mor import distributed
from mor import json_file
from mor.data import cache
from mor.data import lines
from mor.data import readers


@dataclasses.dataclass(frozen=True)
class Documents:
  """Texts that can be read several times.

  Attributes:
    parts: one string per file: name, size, time of change. Equal parts mean equal texts.
    read: function that starts a pass over the texts.
    files: every file of the texts, and how it is read, for `identity.make`.
  """

  parts: tuple[str, ...]
  read: Callable[[], Iterator[str]]
  files: tuple[tuple[pathlib.Path, str], ...] = ()

  def __iter__(self) -> Iterator[str]:
    return self.read()

  @property
  def identity(self) -> str:
    return cache.key(*self.parts)


def open_source(source: str, text_key: str, cache_root: pathlib.Path) -> Documents:
  """Returns the documents of `data.source` or `data.validation_source`.

  Raises:
    FileNotFoundError: no such file or directory.
    ValueError: the source exists and cannot be used, or is a task. The content is checked only when
      it is read.
  """
  if source == "sotu":
    return _open_sotu(cache_root)
  kind, _, name = source.partition(":")
  if kind == "task":
    raise ValueError(f"{source!r} is a task, which has no texts; give it as data.source, to train on it")
  if kind in ("tfds", "hf"):
    name, _, split = name.partition("#")
    return {"tfds": _open_tfds, "hf": _open_hf}[kind](name, split or "train", text_key)
  return _open_files(source, text_key)


def _open_files(source: str, text_key: str) -> Documents:
  pattern = os.path.expanduser(source)
  paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
  paths = [pathlib.Path(path).absolute() for path in paths]
  if not paths:
    raise FileNotFoundError(f"data source {source!r}: no such file; give 'sotu', tfds:NAME, "
                            "hf:DIR, or a path or glob of .txt, .jsonl or .array_record files")
  for path in paths:
    if path.is_dir():
      raise ValueError(f"data source {source!r}: {path} is a directory; use a glob such as "
                       f"{path}/*.txt, or hf:{path}")
    if path.exists() and not path.is_file():
      raise ValueError(f"data source {source!r}: {path} is a device or a pipe, which cannot be read twice; "
                       "copy its text to a file")

  stamps = tuple(map(_stamp, paths))

  def read() -> Iterator[str | None]:
    for path, stamp in zip(paths, stamps):
      yield from readers.read(path, text_key)
      if _stamp(path) != stamp:
        raise ValueError(f"{path} has changed since the start; run again when nothing writes to it")

  files = tuple((path, readers.kind(path)) for path in paths)
  return Documents(stamps, _without_nulls(f"data source {source!r}", read), files)


def _open_sotu(cache_root: pathlib.Path) -> Documents:
  stamp = hashlib.sha256(readers.SOTU.read_bytes()).hexdigest()

  def read() -> Iterator[str]:
    from mor.data import builder  # imports tensorflow_datasets, which a warm cache never needs

    directory = cache.publish(cache_root / "tfds" / cache.key("sotu", stamp), builder.prepare)
    yield from _tfds_texts("state_of_the_union", directory, "train", "text")

  return Documents((f"sotu {stamp}",), read, ((readers.SOTU, "sotu"),))


def _open_tfds(name: str, split: str, text_key: str) -> Documents:
  import tensorflow_datasets as tfds

  data_dir = os.environ.get("TFDS_DATA_DIR") or None
  what = f"data source 'tfds:{name}'"
  try:
    dataset = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    raise FileNotFoundError(f"{what}: {_why_not_found()}; prepare it with file_format='array_record' "
                            "and set TFDS_DATA_DIR to its directory") from error
  except Exception as error:  # pylint: disable=broad-except
    remedy = ("install TensorFlow, which its code needs" if isinstance(error, ImportError) else
              "give the name of a prepared TFDS dataset")
    raise ValueError(f"{what}: {json_file.first_line(error)}; {remedy}") from error
  if not dataset.is_prepared():
    raise FileNotFoundError(f"{what}: not prepared under {dataset.data_dir}; run "
                            "download_and_prepare with file_format='array_record', or set "
                            "TFDS_DATA_DIR")
  found = dataset.info.file_format.file_suffix if dataset.info.file_format else "no known format"
  if found != "array_record":
    raise ValueError(f"{what}: prepared as {found}, which needs TensorFlow; prepare it again with "
                     "file_format='array_record'")
  if text_key not in dataset.info.features:
    raise ValueError(f"{what}: no field {text_key!r} ({', '.join(dataset.info.features)}); set "
                     "data.text_key")
  paths = sorted(pathlib.Path(dataset.data_dir).iterdir())
  stamps = tuple(f"{_stamp(path)}#{split}" for path in paths)
  reader = f"tfds:{dataset.info.full_name}#{split}"
  files = tuple((path, reader) for path in paths if ".array_record" in path.name)
  return Documents(stamps, functools.partial(_tfds_texts, name, data_dir, split, text_key), files)


def _tfds_texts(name: str, data_dir: pathlib.Path | str | None, split: str,
                text_key: str) -> Iterator[str]:
  import tensorflow_datasets as tfds

  try:
    records = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
  except (ValueError, KeyError) as error:
    raise ValueError(f"data source 'tfds:{name}#{split}': {json_file.first_line(error)}; name one of its "
                     "splits after '#'") from error
  for index in range(len(records)):
    where = f"data source 'tfds:{name}#{split}', record {index}"
    try:
      text = records[index][text_key]
    except Exception as error:  # of TFDS and of ArrayRecord; pylint: disable=broad-except
      raise ValueError(f"{where}: damaged ({json_file.first_line(error)}); prepare the dataset again") from error
    if not isinstance(text, bytes):
      raise ValueError(f"{where}: field {text_key!r} is not text; set data.text_key")
    try:
      yield lines.decode(text)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from error


def _open_hf(directory: str, split: str, text_key: str) -> Documents:
  try:
    import datasets
  except ImportError as error:
    raise ValueError(f"data source 'hf:{directory}' needs the package datasets; pip install "
                     "datasets (or 'mor[hf]'), or export the texts as .jsonl") from error
  path = pathlib.Path(directory).expanduser().absolute()
  what = f"data source 'hf:{directory}'"
  if not path.is_dir():
    raise FileNotFoundError(f"{what}: no such directory; give one written by save_to_disk")
  try:
    dataset = datasets.load_from_disk(str(path))
  except Exception as error:  # pylint: disable=broad-except
    raise ValueError(f"{what}: {json_file.first_line(error)}; give a directory written by "
                     "save_to_disk") from error
  if isinstance(dataset, datasets.DatasetDict):
    if split not in dataset:
      raise ValueError(f"{what}: no split {split!r} ({', '.join(dataset)}); name one after '#'")
    dataset = dataset[split]
  if text_key not in dataset.column_names:
    raise ValueError(f"{what}: no field {text_key!r} ({', '.join(dataset.column_names)}); set "
                     "data.text_key")
  if getattr(dataset.features[text_key], "dtype", "") not in ("string", "large_string"):
    raise ValueError(f"{what}: field {text_key!r} is not text; set data.text_key")
  texts = dataset.select_columns(text_key)
  paths = sorted(p for p in path.rglob("*") if p.is_file())
  stamps = tuple(f"{_stamp(p)}#{split}" for p in paths)

  def read() -> Iterator[str | None]:
    index = -1
    try:
      for index, record in enumerate(texts):
        yield record[text_key]
    except Exception as error:  # of Arrow; pylint: disable=broad-except
      raise ValueError(f"{what}, record {index + 1}: damaged ({json_file.first_line(error)}); write it again with "
                       "save_to_disk") from error

  files = tuple((p, f"hf#{split}") for p in paths if p.suffix == ".arrow")
  return Documents(stamps, _without_nulls(what, read), files)


def _without_nulls(what: str, start: Callable[[], Iterator[str | None]]) -> Callable[[], Iterator[str]]:
  """Returns a function that starts passes without rows that are null; the first whole pass says how many these are."""
  told = False

  def read() -> Iterator[str]:
    nonlocal told
    num_null = 0
    for text in start():
      if text is None:
        num_null += 1
      else:
        yield text
    if num_null and not told and distributed.is_main():
      print(f"{what}: {num_null} rows whose text is null are left out", file=sys.stderr, flush=True)
    told = True

  return read


def _why_not_found() -> str:
  if importlib.util.find_spec("tensorflow"):
    return "no such dataset"
  return "no such dataset is prepared, and without TensorFlow, which is not installed, TFDS does not know all of its own"


def _stamp(path: pathlib.Path) -> str:
  try:
    status = path.stat()
  except OSError as error:
    raise readers.unreadable(path, error) from error
  return f"{path} {status.st_size} {status.st_mtime_ns}"
