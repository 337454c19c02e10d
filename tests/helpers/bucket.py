"""A gs:// that is a local directory, for tests: no network, no library of the cloud."""

import importlib.util
import os
import re

from etils.epath import backend
from fsspec.implementations import local
from fsspec.registry import _registry
from orbax.checkpoint._src.path import gcs_utils


def install(monkeypatch, root) -> None:
  """Makes gs://NAME/PATH the file `root`/NAME/PATH, for etils and for orbax's arrays.

  Like a bucket, it makes directories by itself and never renames or appends.
  """

  class Bucket(local.LocalFileSystem):
    protocol = ("gcs", "gs")

    def __init__(self, finalize_on_close=False, **options):
      super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path):
      return super()._strip_protocol(re.sub("^(gs|gcs)://", f"{root}/", os.fspath(path)))

    def open(self, path, mode="rb", **options):
      assert "a" not in mode, f"{path}: an object store does not append"
      return super().open(path, mode, **options)

    def glob(self, path, **options):
      return [found.removeprefix(f"{root}/") for found in super().glob(path, **options)]  # BUCKET/PATH

    def mv(self, *unused, **options):
      raise AssertionError("a bucket does not rename")

    rename = move = mv

  has = importlib.util.find_spec
  monkeypatch.setattr(
      importlib.util, "find_spec", lambda name, *rest: has("fsspec" if name == "gcsfs" else name, *rest))
  monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", lambda path: {
      "driver": "file", "path": f"{root}/{path.removeprefix('gs://')}" + ("" if path.endswith("_sharding") else "/")})
  monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
  monkeypatch.setitem(_registry, "gcs", Bucket)
  Bucket.clear_instance_cache()
  backend.fsspec_backend._get_filesystem.cache_clear()
