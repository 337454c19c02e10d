"""Files and functions stay small, and what is public says what it does."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(p for p in (ROOT / "mor").rglob("*.py") if p.name != "__init__.py")
LONG = {"mor/conversion/modeling_mor.py": 450}  # an exported model is one file
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_style(path):
  text = path.read_text(encoding="utf-8")
  tree = ast.parse(text)
  most = LONG.get(str(path.relative_to(ROOT)), 300)
  assert len(text.splitlines()) <= most, f"over {most} lines: split the idea"
  assert ast.get_docstring(tree), "the module has no docstring"
  for node in ast.walk(tree):
    if isinstance(node, FUNCTIONS):
      lines = node.end_lineno - node.lineno + 1
      limit = 100 if path.match("mor/train/loop.py") else 60
      assert lines <= limit, f"{node.name} has {lines} lines, over {limit}"
  for node in tree.body:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
      assert ast.get_docstring(node), f"{node.name} has no docstring"
