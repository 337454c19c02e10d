"""Files of tensors: what is there is read, what lies is named."""

import json
import pathlib
import struct

import numpy as np
import pytest
import safetensors.numpy

from mor.conversion import tensors as tensors_lib


def entry(start, stop, shape, dtype="F32"):
  return dict(dtype=dtype, shape=shape, data_offsets=[start, stop])


def write(path: pathlib.Path, header, data: bytes, length: int | None = None) -> pathlib.Path:
  """A safetensors file by hand."""
  header = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
  return path


def test_a_file_is_read_by_name(tmp_path):
  header = dict(__metadata__=dict(format="pt"), b=entry(8, 12, [2], "BF16"), a=entry(0, 8, [1, 2]),
                c=entry(12, 14, [1], "F16"), d=entry(14, 22, [1], "I64"))
  numbers = np.array([1.5, -2.25], np.float32)
  data = numbers.tobytes() + numbers.tobytes()[2:4] + numbers.tobytes()[6:8] + np.float16(0.1).tobytes() + b"\0" * 8
  file = tensors_lib.open_path(write(tmp_path / "x.safetensors", header, data))
  assert isinstance(file, tensors_lib.Tensors)
  assert dict(file.shapes) == dict(a=(1, 2), b=(2,), c=(1,), d=(1,))
  np.testing.assert_array_equal(file.read("a"), numbers[None])
  np.testing.assert_array_equal(file.read("b"), numbers)
  assert file.read("c") == np.float32(np.float16(0.1)) and file.read("b").dtype == np.float32
  with pytest.raises(ValueError, match="x.safetensors: tensor 'd' has unsupported type I64"):
    file.read("d")


@pytest.mark.parametrize("header,data,length,message", [
    (dict(a=entry(0, 8, [2])), 8, 1 << 40, "the header claims 1099511627776 bytes and the file has"),
    (dict(a=entry(0, 8, [2])), 8, 1000, "the header claims 1000 bytes and the file has"),
    (b"{nope", 8, None, "the header is not a JSON object"),
    (b"[1, 2]", 8, None, "the header is not a JSON object"),
    (b"[" * 100000, 8, None, "the header is not a JSON object"),
    (b"\xff\xfe", 8, None, "the header is not a JSON object"),
    (dict(a=3), 8, None, "the header is not a JSON object"),
    (dict(a=dict(dtype="F32", shape=[2])), 8, None, "the header is not a JSON object"),
    (dict(a=entry(-8, 8, [4])), 8, None, "the header is not a JSON object"),
    (dict(a=entry(0, 8, [-2])), 8, None, "the header is not a JSON object"),
    (dict(a=entry(0, 8, [2]), b=entry(4, 12, [2])), 12, None, "tensor 'b' overlaps 'a'"),
    (dict(a=entry(0, 8, [2]), b=entry(0, 8, [2])), 8, None, "tensor 'b' overlaps 'a'"),
    (dict(a=entry(0, 8, [2]), b=entry(12, 20, [2])), 20, None, "no tensor covers the bytes before 'b'"),
    (dict(a=entry(0, 8, [2]), b=entry(8, 16, [2])), 12, None, "tensor 'b' ends at byte 16 of 12: the file is cut"),
    (dict(a=entry(0, 8, [2])), 12, None, "4 bytes belong to no tensor"),
    (dict(a=entry(0, 8, [3])), 8, None, r"tensor 'a' of shape \(3,\) and type F32 claims 8 bytes"),
    (dict(a=entry(0, 8, [2**62, 2**62])), 8, None, "tensor 'a' of shape"),
    (dict(a=entry(0, 8, [2], "Q7")), 8, None, "tensor 'a' has unsupported type 'Q7'"),
    (dict(a=entry(0, 8, [2], [])), 8, None, "the header is not a JSON object of dtype, shape"),
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8,
     None, "tensor 'a' is there twice"),
])
def test_a_header_that_lies(header, data, length, message, tmp_path):
  path = write(tmp_path / "x.safetensors", header, b"\0" * data, length)
  refuses(path, f"x.safetensors: {message}")


def test_a_file_cut_anywhere(tmp_path):
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(dict(a=np.arange(5.0), b=np.arange(3.0)), path)
  whole = path.read_bytes()
  for size in range(len(whole)):
    path.write_bytes(whole[:size])
    refuses(path, "x.safetensors: (the header claims|tensor '[ab]' ends at byte)")


class Sharded:
  """A folder of two shards and its index."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.index = folder / "model", folder / "model" / "model.safetensors.index.json"
    self.folder.mkdir()
    self.weight_map = dict(a="1.safetensors", b="2.safetensors", c="2.safetensors")
    self.shard(self.folder / "1.safetensors", "a")
    self.shard(self.folder / "2.safetensors", "bc")
    self.shard(folder / "out.safetensors", "a")
    self.save()

  def shard(self, path, keys):
    safetensors.numpy.save_file({key: np.full(2, ord(key), np.float32) for key in keys}, path)

  def save(self, **changes):
    self.index.write_text(json.dumps(dict(weight_map=self.weight_map | changes)))


@pytest.fixture
def sharded(tmp_path):
  return Sharded(tmp_path)


def test_shards_are_one(sharded):
  file = tensors_lib.open_path(sharded.folder)
  assert set(file.shapes) == set("abc") and file.where == str(sharded.folder)
  assert file.read("c").tolist() == [99.0, 99.0]
  assert file.file("a").endswith("1.safetensors") and file.file("c").endswith("2.safetensors")


@pytest.mark.parametrize("name", [
    "../out.safetensors", "{}/out.safetensors", "link.safetensors", "sub/../../out.safetensors",
    "linked/out.safetensors", "../model/1.safetensors", "",
])
def test_an_index_may_not_lead_out(name, sharded):
  (sharded.folder / "link.safetensors").symlink_to("../out.safetensors")
  (sharded.folder / "linked").symlink_to("..", target_is_directory=True)
  (sharded.folder / "sub").mkdir()
  sharded.save(a=name.format(sharded.folder.parent))
  refuses(sharded.folder, "index.json names the file '.*', (which is not in its folder|and there|for tensor 'a')")
  if name:
    refuses(sharded.folder, "which is not in its folder")


def test_links_within_the_folder_and_the_hubs_are_followed(sharded, tmp_path):
  (sharded.folder / "0.safetensors").symlink_to("1.safetensors")
  sharded.save(a="0.safetensors")
  assert set(tensors_lib.open_path(sharded.folder).shapes) == set("abc")
  cached = tmp_path / "models--x" / "snapshots" / "1f"
  (tmp_path / "models--x" / "blobs").mkdir(parents=True)
  cached.mkdir(parents=True)
  for number, path in enumerate(sharded.folder.iterdir()):
    (tmp_path / "models--x" / "blobs" / str(number)).write_bytes(path.read_bytes())
    (cached / path.name).symlink_to(f"../../blobs/{number}")
  assert set(tensors_lib.open_path(cached).shapes) == set("abc")


def test_an_index_that_lies(sharded):
  sharded.save(a="3.safetensors")
  refuses(sharded.folder, "index.json names the file '3.safetensors' for tensor 'a', and there is none")
  sharded.save(d="1.safetensors")
  refuses(sharded.folder, "index.json says that tensor 'd' is in 1.safetensors, which does not hold it")
  sharded.save(a="config.json")
  (sharded.folder / "config.json").write_text("{}")
  refuses(sharded.folder, "config.json is no checkpoint")
  sharded.save()
  sharded.shard(sharded.folder / "2.safetensors", "abc")
  refuses(sharded.folder, "tensor 'a' is both in .*1.safetensors and in .*2.safetensors")
  for text, message in [("{}", "has no weight_map"), ('{"weight_map": {"a": 3}}', "has no weight_map"),
                        ("nope", "is not JSON"), ("[" * 100000, "is not JSON")]:
    sharded.index.write_text(text)
    refuses(sharded.folder, message)


def test_pickles(tmp_path):
  import torch
  path = tmp_path / "x.pt"
  torch.save(dict(a=torch.ones(2, dtype=torch.bfloat16), b=torch.ones(2, dtype=torch.int32)), path)
  file = tensors_lib.open_path(path)
  assert isinstance(file, tensors_lib.Tensors) and dict(file.shapes) == dict(a=(2,), b=(2,))
  assert file.read("a").dtype == np.float32 and file.read("a").tolist() == [1.0, 1.0]
  with pytest.raises(ValueError, match="x.pt: tensor 'b' has unsupported type torch.int32"):
    file.read("b")
  torch.save(dict(a=torch.ones(2), epoch=3), path)
  refuses(path, "entry 'epoch' is a int, not a dense tensor")
  torch.save([torch.ones(2)], path)
  refuses(path, "x.pt holds a list, not a state dict")
  path.write_bytes(path.read_bytes()[:100])
  refuses(path, "x.pt is not a file of tensors")
  path.write_bytes(b"")
  refuses(path, "x.pt is not a file of tensors")


class Command:
  """What a pickle would run when it is loaded."""

  def __reduce__(self):
    return pathlib.Path.touch, (pathlib.Path("ran"),)


def test_pickles_run_nothing(tmp_path, monkeypatch):
  import torch
  monkeypatch.chdir(tmp_path)
  torch.save(dict(a=Command()), "x.pt")
  refuses(pathlib.Path("x.pt"), "x.pt is not a file of tensors")
  assert not pathlib.Path("ran").exists()


def test_other_files_are_refused(tmp_path):
  (tmp_path / "x.h5").write_bytes(b"")
  refuses(tmp_path / "x.h5", "x.h5 is no checkpoint")
  refuses(tmp_path, "holds none of model.safetensors, pytorch_model.bin")
  with pytest.raises(FileNotFoundError, match="absent.safetensors: no such file"):
    tensors_lib.open_path(tmp_path / "absent.safetensors")


def refuses(path: pathlib.Path, message: str) -> None:
  """Opening is one line that says so."""
  with pytest.raises(ValueError, match=message) as caught:
    tensors_lib.open_path(path)
  assert "\n" not in str(caught.value)
