"""docs/laws.md names a test for every law, and the tests are there."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs/laws.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| law", "| ---"))]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`( \*slow\*)?")


@functools.cache
def find_tests(file):
  """Returns the tests of a file by name, and whether each is slow."""
  tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
  return {node.name: "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
          for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_the_laws_are_numbered():
  assert re.findall(r"^## (\d+)\.", TEXT, re.MULTILINE) == [str(i) for i in range(1, TEXT.count("\n## ") + 1)]
  assert len(ROWS) > 60


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_law_has_its_tests(row):
  law, tests = row.strip("| ").split(" | ")
  named = NAMED.findall(tests)
  assert named and len(named) == len(tests.split("<br>")), f"{law}: no test holds it"
  for file, name, slow in named:
    assert (ROOT / file).is_file(), f"{law}: there is no {file}"
    found = find_tests(file)
    assert name in found, f"{law}: {file} has no {name}"
    assert found[name] == bool(slow), f"{law}: *slow* of {name} is wrong"
