"""A directory with hashes is what was written, or the file that differs is named."""

import os
import subprocess

from etils import epath
import pytest

from mor import integrity


@pytest.fixture
def directory(tmp_path):
  for name, content in {"meta/metadata": "{}", "state/d/a": "weights" * 9, "state/manifest": "", "_METADATA": "x"}.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
  integrity.write(epath.Path(tmp_path))
  (tmp_path / "commit_success.txt").write_text("orbax writes this one afterwards")
  return epath.Path(tmp_path)


def test_sha256sum_reads_the_hashes(directory):
  assert integrity.check(directory) and integrity.is_whole(directory)
  done = subprocess.run(["sha256sum", "--check", "--strict", integrity.NAME], cwd=directory, capture_output=True, text=True,
                        check=True)
  assert sorted(done.stdout.split()[::2]) == ["_METADATA:", "meta/metadata:", "state/d/a:", "state/manifest:"]


@pytest.mark.parametrize("name", ["state/d/a", "_METADATA", integrity.NAME])
def test_flips_of_bits_are_found(name, directory):
  path = directory / name
  whole = path.read_bytes()
  for bit in range(0, 8 * len(whole), 7):
    content = bytearray(whole)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError):
      integrity.check(directory)
  path.write_bytes(whole)
  assert integrity.check(directory)


@pytest.mark.parametrize("size", [0, 1, 67, 68, 69, 90, 150])
def test_hashes_that_are_cut_are_found(size, directory):
  os.truncate(directory / integrity.NAME, size)
  with pytest.raises(ValueError):
    integrity.check(directory)


def test_a_file_too_few_or_too_many_is_named(directory):
  (directory / "state/d/b").write_text("")
  with pytest.raises(ValueError, match="state/d/b is not listed"):
    integrity.check(directory)
  assert integrity.is_whole(directory) and integrity.check(directory, "meta/")
  (directory / "state/d/b").unlink()
  (directory / "meta/metadata").unlink()
  with pytest.raises(ValueError, match="meta/metadata is missing"):
    integrity.check(directory, "meta/")
  assert not integrity.is_whole(directory)


def test_shares_are_all_files_once(directory):
  (directory / "state/d/a").write_text("other")
  found = []
  for i in range(3):
    try:
      integrity.check(directory, share=(i, 3))
    except ValueError:
      found.append(i)
  assert len(found) == 1


def test_a_directory_without_hashes_is_no_damage(directory):
  (directory / integrity.NAME).unlink()
  assert not integrity.check(directory) and integrity.is_whole(directory)
