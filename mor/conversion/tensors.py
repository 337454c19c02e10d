"""Tensors of a checkpoint by name, read one at a time.

  tensors = open_path("folder")          # or one .safetensors, .bin, .pt, .pth file
  tensors.shapes["model.norm.weight"]
  tensors.read("model.norm.weight")      # float32; bfloat16 and float16 widen exactly

A folder holds one file, or shards and an index that says which shard a tensor
is in. Files are mapped, not loaded, so a large model is not held twice. A
pickle is loaded by torch with `weights_only`.

Every ValueError is one line that names the file, and the tensor where it is one's.
"""

from collections.abc import Mapping
import json
import math
import os
import pathlib
from typing import Protocol, runtime_checkable

import ml_dtypes  # also teaches NumPy "bfloat16", which safetensors asks it for
import numpy as np
import safetensors

from mor import json_file

_PICKLES = (".bin", ".pt", ".pth")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
         "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}
_MAX_HEADER = 100_000_000  # bytes; the library's limit
_MAX_AXES = 64


@runtime_checkable
class Tensors(Protocol):
  """Named tensors.

  Attributes:
    where: the folder or file, for messages.
    shapes: by name, `(out, in)`.
  """

  where: str
  shapes: Mapping[str, tuple[int, ...]]

  def file(self, key: str) -> str:
    """Returns the name of the file that holds a tensor."""

  def read(self, key: str) -> np.ndarray:
    """Returns the tensor as float32.

    Raises:
      ValueError: its numbers are of a kind that float32 does not hold exactly.
    """


def open_path(path: pathlib.Path) -> Tensors:
  """Opens a file or a folder.

  Raises:
    ValueError: there are no tensors, or the file or the index lies.
    OSError: a file cannot be read.
  """
  if not path.is_dir():
    return _open_file(path)
  for name in _SINGLE:
    if (path / name).exists():
      return _open_file(path / name)
  for name in _INDEX:
    if (path / name).exists():
      return _Shards(path, path / name)
  raise ValueError(f"{path} holds none of {', '.join(_SINGLE + _INDEX)}; name the folder of the checkpoint")


def read_finite(tensors: Tensors, key: str) -> np.ndarray:
  """Returns a tensor as float32.

  Raises:
    ValueError: it has a number that is not finite, or of a kind that float32 does not hold.
  """
  array = tensors.read(key)
  if not np.isfinite(array).all():
    bad = ~np.isfinite(array)
    first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
    raise ValueError(f"{tensors.file(key)}: tensor {key!r} has {bad.sum()} numbers that are not finite, the first at "
                     f"{first}; take a checkpoint from before they came")
  return array


def _open_file(path: pathlib.Path) -> Tensors:
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file")
  if path.suffix == ".safetensors":
    return _Safetensors(path)
  if path.suffix in _PICKLES:
    return _Pickle(path)
  raise ValueError(f"{path} is no checkpoint; use a .safetensors, {', '.join(_PICKLES)} file or a folder")


class _Safetensors:
  """One .safetensors file."""

  def __init__(self, path: pathlib.Path):
    self.where = str(path)
    try:
      self._file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
      raise ValueError(f"{path}: {_lie(path) or json_file.first_line(error)}; fetch the file again") from error
    slices = {key: self._file.get_slice(key) for key in self._file.keys()}
    self.shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
    self._dtypes = {key: part.get_dtype() for key, part in slices.items()}

  def file(self, key: str) -> str:
    return self.where

  def read(self, key: str) -> np.ndarray:
    if self._dtypes[key] not in _FLOATS:
      raise ValueError(f"{self.where}: tensor {key!r} has unsupported type {self._dtypes[key]}; "
                       f"use a checkpoint in {', '.join(_FLOATS)}")
    return self._file.get_tensor(key).astype(np.float32)


class _Pickle:
  """One file of `torch.save`."""

  def __init__(self, path: pathlib.Path):
    try:
      import torch
    except ImportError as error:
      raise ValueError(f"{path} is a pickle, which torch reads; pip install 'mor[torch]'") from error
    self.where = str(path)
    try:
      state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
      raise
    except Exception as error:  # a broken pickle can raise anything
      raise ValueError(f"{path} is not a file of tensors that torch.load(weights_only=True) reads "
                       f"({json_file.first_line(error)}); save the state dict alone") from error
    if not isinstance(state, dict):
      raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict; save model.state_dict()")
    for key, value in state.items():
      if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise ValueError(f"{path}: entry {key!r} is a {type(value).__name__}, not a dense tensor; "
                         "save model.state_dict() alone")
      if value.numel() * value.element_size() > path.stat().st_size:
        raise ValueError(f"{path}: tensor {key!r} of shape {tuple(value.shape)} is larger than the file; save a copy of "
                         "it that repeats nothing")
    self._state, self.shapes = state, {key: tuple(value.shape) for key, value in state.items()}
    self._floats = (torch.float32, torch.float16, torch.bfloat16)

  def file(self, key: str) -> str:
    return self.where

  def read(self, key: str) -> np.ndarray:
    value = self._state[key]
    if value.dtype not in self._floats:
      raise ValueError(f"{self.where}: tensor {key!r} has unsupported type {value.dtype}; "
                       f"use a checkpoint in {', '.join(map(str, self._floats))}")
    return value.detach().float().numpy()


class _Shards:
  """Files that an index names."""

  def __init__(self, folder: pathlib.Path, index: pathlib.Path):
    self.where = str(folder)
    weight_map = json_file.read(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
      raise ValueError(f"{index} has no weight_map from tensors to files; fetch it again")
    files = {name: _open_file(_inside(folder, index, name)) for name in sorted(set(weight_map.values()))}
    self._holder: dict[str, Tensors] = {}
    for file in files.values():
      for key in file.shapes:
        if key in self._holder:
          raise ValueError(f"tensor {key!r} is both in {self._holder[key].where} and in {file.where}; "
                           "remove the files of another checkpoint")
        self._holder[key] = file
    for key, name in weight_map.items():
      if key not in files[name].shapes:
        raise ValueError(f"{index} says that tensor {key!r} is in {name}, which does not hold it; fetch both again")
    self.shapes = {key: file.shapes[key] for key, file in self._holder.items()}

  def file(self, key: str) -> str:
    return self._holder[key].where

  def read(self, key: str) -> np.ndarray:
    return self._holder[key].read(key)


def _inside(folder: pathlib.Path, index: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the path of a shard, which may not lead out of the folder.

  The hub's cache is let through: snapshots/REVISION/FILE links to blobs/HASH.
  """
  root, path = pathlib.Path(os.path.realpath(folder)), folder / name
  roots = [root] + ([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])
  if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts or not any(
      pathlib.Path(os.path.realpath(path)).is_relative_to(allowed) for allowed in roots):
    raise ValueError(f"{index} names the file {name!r}, which is not in its folder; copy it there")
  if not path.is_file():
    keys = [key for key, file in json_file.read(index)["weight_map"].items() if file == name]
    raise ValueError(f"{index} names the file {name!r} for tensor {keys[0]!r}, and there is none; fetch it")
  return path


def _lie(path: pathlib.Path) -> str:
  """Returns the fault of a safetensors header; "" if none is found.

  The library finds the fault; this names the tensor.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
      return f"the header claims {length} bytes and the file has {size}"
    header = file.read(min(length, _MAX_HEADER))
  try:
    pairs = json.loads(header, object_pairs_hook=list)
    entries = [(key, dict(entry)) for key, entry in pairs if key != "__metadata__"]
    spans = [(*entry["data_offsets"], key, entry["dtype"], entry["shape"]) for key, entry in entries]
    numbers = [number for start, stop, _, _, shape in spans for number in (start, stop, *shape)]
    regular = (all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers)
               and all(isinstance(dtype, str) and len(shape) < _MAX_AXES for _, _, _, dtype, shape in spans))
  except (ValueError, TypeError, KeyError, RecursionError):
    regular = False
  if not regular:
    return "the header is not a JSON object of dtype, shape and data_offsets"
  end, before, seen = 0, None, set()
  for start, stop, key, dtype, shape in sorted(spans, key=lambda span: span[:3]):
    if key in seen:
      return f"tensor {key!r} is there twice"
    if dtype not in _BITS:
      return f"tensor {key!r} has unsupported type {json_file.show(dtype)}"
    if math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
      return f"tensor {key!r} of shape {tuple(shape)} and type {dtype} claims {stop - start} bytes"
    if start < end:
      return f"tensor {key!r} overlaps {before!r}"
    if start > end:
      return f"no tensor covers the bytes before {key!r}"
    if stop > size - 8 - length:
      return f"tensor {key!r} ends at byte {stop} of {size - 8 - length}: the file is cut short"
    end, before = stop, key
    seen.add(key)
  return f"{size - 8 - length - end} bytes belong to no tensor" if end < size - 8 - length else ""
