"""Every notebook runs from top to bottom, shortened by an environment variable."""

import ast
import importlib
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLAB = ROOT / "tests" / "helpers" / "colab.txt"


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stores_its_pictures(path):
  stored = [kind for cell in code_cells(nbformat.read(path, as_version=4)) for output in cell.outputs
            for kind in output.get("data", {})]
  assert "image/png" in stored


def test_all_notebooks_begin_alike():
  assert len({code_cells(nbformat.read(path, as_version=4))[0].source for path in NOTEBOOKS}) == 1


@pytest.fixture
def launcher(monkeypatch):
  """The functions that the first cell runs; the kernel's paths are restored afterwards."""
  monkeypatch.setattr(sys, "path", [*sys.path])
  return runpy.run_path(str(ROOT / "launch" / "notebook.py"))


def test_what_is_missing_or_too_old_is_found(launcher, monkeypatch):
  find_missing = launcher["find_missing"]
  installed = {"jax": "0.7.2", "flax": "0.12.9", "numpy": "2.0.2"}

  def version(name):
    if name not in installed:
      raise importlib.metadata.PackageNotFoundError(name)
    return installed[name]

  monkeypatch.setattr(importlib.metadata, "version", version)
  monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["jax-cuda12-plugin<=0.7.2; extra == 'cuda12'"])
  requires = ["jax>=0.10.2,<0.13", "flax>=0.12.8", "numpy>=2.0", "gguf>=0.17", "torch>=2.4; extra == 'torch'",
              "jax[cuda12]; extra == 'cuda12'"]
  assert find_missing(requires, "") == ["jax>=0.10.2,<0.13", "gguf>=0.17"]
  assert find_missing(requires, "torch") == ["jax>=0.10.2,<0.13", "gguf>=0.17", "torch>=2.4"]
  assert find_missing(requires, "cuda12")[2:] == ["jax-cuda12-plugin<=0.7.2"]
  assert find_missing(None, "") == ["mor"]


def test_a_kernel_that_is_ready_installs_nothing(launcher, monkeypatch):
  monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
  monkeypatch.setattr(shutil, "which", lambda name: None)
  launcher["prepare"](str(ROOT))
  assert str(ROOT) in sys.path


def test_a_replaced_package_asks_for_a_restart(launcher, monkeypatch):
  """Colab's kernel has imported NumPy before the first cell."""
  scope = launcher["prepare"].__globals__
  before, after = {"numpy": "1.0", "gguf": "0.1"}, {"numpy": "2.0", "gguf": "0.2"}
  versions = iter([before, after, before, dict(before, gguf="0.2")])
  monkeypatch.setitem(scope, "find_missing", lambda *args: ["numpy>=2.0"])
  monkeypatch.setitem(scope, "find_extra", lambda: "tpu")
  monkeypatch.setitem(scope, "_versions", lambda: next(versions))
  monkeypatch.setitem(scope, "_imported", lambda: {"numpy"})
  commands = []

  def install(command, **kwargs):
    commands.append(command)
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(subprocess, "run", install)
  with pytest.raises(SystemExit, match="numpy had been imported before .*: restart the kernel"):
    launcher["prepare"](str(ROOT))
  assert commands[0][-1] == f"{ROOT}[tpu]"
  launcher["prepare"](str(ROOT))  # what was replaced now had not been imported


def test_an_address_gives_every_notebook_a_badge(tmp_path):
  for folder in ("launch", "notebooks"):
    shutil.copytree(ROOT / folder, tmp_path / folder)
  command = [sys.executable, str(tmp_path / "launch" / "set_repository.py")]
  assert subprocess.run([*command, "nowhere"], check=False, capture_output=True).returncode == 2
  for owner in ("first/one", "second/two"):
    subprocess.run([*command, f"https://github.com/{owner}.git"], check=True)
  for path in NOTEBOOKS:
    notebook = nbformat.read(tmp_path / "notebooks" / path.name, as_version=4)
    title = notebook.cells[0].source
    assert title.count("Open in Colab") == 1 and "first/one" not in title and "# " in title
    assert f"/github/second/two/blob/main/notebooks/{path.name}" in title
    assert 'REPOSITORY = "https://github.com/second/two"' in code_cells(notebook)[0].source


@pytest.mark.slow
def test_first_cells_run_with_the_packages_of_colab(tmp_path):
  """In a fresh environment with Colab's versions of the shared packages; installs with pip."""
  subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "colab")], check=True)
  python = str(tmp_path / "colab" / "bin" / "python")
  subprocess.run([python, "-m", "pip", "install", "-q", "-r", str(COLAB)], check=True)
  cells = code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[:2]
  code = "import numpy\n" + "\n".join(cell.source for cell in cells)  # Colab's kernel has imported NumPy
  clone = tmp_path / "a clone"
  shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "*.egg-info", "runs"))
  environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
  ends = []
  for _ in range(2):
    ends.append(subprocess.run([python, "-c", code], cwd=clone / "notebooks", env=environment, capture_output=True,
                               text=True, check=False))
    if ends[-1].returncode == 0:
      break
    assert "restart the kernel" in ends[-1].stderr, ends[-1].stderr
  assert ends[-1].returncode == 0 and "installing mor" in ends[0].stdout
