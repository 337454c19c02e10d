"""Every notebook runs from top to bottom, shortened by an environment variable."""

import ast
import importlib
import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_figures(path, tmp_path, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as its reader has
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.setenv("MOR_NOTEBOOK_STEPS", "20")
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
      notebook, timeout=300, kernel_name="python3",
      resources={"metadata": {"path": str(path.parent)}}).execute()
  shown = [kind for cell in code_cells(notebook) for output in cell.outputs
           for kind in output.get("data", {})]
  assert "image/png" in shown and "text/html" in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short(path):
  lines = [line for cell in code_cells(nbformat.read(path, as_version=4))
           for line in cell.source.splitlines() if line.strip()]
  assert len(lines) < 80


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_exists(path):
  """Quickly, so that a module that moves is seen before the notebooks run."""
  tree = ast.parse("\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4))))
  ours = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("mor", "configs", "benchmarks"):
      for alias in node.names:
        found = getattr(importlib.import_module(node.module), alias.name, None)
        ours[alias.asname or alias.name] = found or importlib.import_module(f"{node.module}.{alias.name}")
  assert len(ours) > 3
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
      assert hasattr(ours[node.value.id], node.attr), f"{path.name}: {node.value.id} has no {node.attr}"
