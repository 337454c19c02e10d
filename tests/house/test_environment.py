"""The command line in environments that lack something: a home, a device, UTF-8, patience."""

import os
import pathlib
import signal
import subprocess
import sys

from absl.testing import flagsaver
import pytest

import mor
from mor import __main__ as entry
from mor import distributed
from mor import main
from mor import paths
from mor.data import cache

ROOT = pathlib.Path(__file__).parents[2]


def run(*argv, code="from mor import __main__; __main__.run()", **environment):
  """Runs the command line in a process of its own; a variable that is None is unset."""
  kept = {k: v for k, v in (os.environ | environment | {"PYTHONPATH": str(ROOT)}).items() if v is not None}
  return subprocess.run([sys.executable, "-c", code, *argv], env=kept, capture_output=True, text=True, check=False,
                        encoding="utf-8")


def test_a_platform_without_device_is_one_line(tmp_path):
  done = run("--config=quickstart", f"--workdir={tmp_path / 'run'}", JAX_PLATFORMS="cuda")
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert done.stderr.startswith("error: JAX_PLATFORMS=cuda has no device here")
  assert "pip install 'mor[cuda12]'" in done.stderr and not (tmp_path / "run").exists()


def test_only_modes_that_need_a_device_ask_for_one(monkeypatch):
  def fail():
    raise RuntimeError("Unable to initialize backend 'foo': it is not in the list. (set JAX_PLATFORMS='')")

  monkeypatch.setattr(main.jax, "devices", fail)
  with flagsaver.flagsaver(mode="fields"):
    main._join()
  with flagsaver.flagsaver(mode="train"), pytest.raises(ValueError, match="it is not in the list[)]; unset it"):
    main._join()


def test_a_user_without_home_keeps_no_cache(monkeypatch, capsys):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

  def missing():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(pathlib.Path, "home", missing)
  assert paths.user_cache() is None
  paths.temporary_cache.cache_clear()
  root = cache.root("")
  assert root.is_dir() and root == cache.root("")
  assert capsys.readouterr().err.count("\n") == 1
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  main._keep_compiled_programs()
  assert "compiled programs are not kept; set XDG_CACHE_HOME" in capsys.readouterr().err
  paths.temporary_cache.cache_clear()


def test_a_home_that_cannot_be_written_keeps_no_cache(monkeypatch, tmp_path):
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
  assert paths.user_cache() is None
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
  assert paths.user_cache() == tmp_path / "there" / "mor" and paths.user_cache().is_dir()


def test_an_ascii_terminal_shows_text():
  code = "import sys; from mor import main; main.app.run = lambda *a, **k: print('\u00e9'); main.run()"
  assert run(code=code, PYTHONIOENCODING="ascii").stdout == "\\xe9\n"


def test_an_interrupted_import_is_quiet():
  """The interrupt comes when jax is imported, before any code of `main` runs."""
  code = ("import os, signal, sys\n"
          "class Finder:\n"
          "  def find_spec(self, name, *unused):\n"
          "    if name == 'jax': os.kill(os.getpid(), signal.SIGINT)\n"
          "sys.meta_path.insert(0, Finder())\n"
          "import runpy\n"
          "runpy.run_module('MODULE', run_name='__main__', alter_sys=True)\n")
  for module in ("mor", "mor.main"):
    done = run(code=code.replace("MODULE", module))
    assert done.returncode == -signal.SIGINT and done.stderr == "" and done.stdout == ""


def test_an_imported_command_line_leaves_ctrl_c_alone(monkeypatch):
  """A notebook may import it: only `run` may change what SIGINT does, and it gives it back."""
  seen = []
  monkeypatch.setattr(main, "run", lambda: seen.append(signal.getsignal(signal.SIGINT)))
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a process in the background of a script
  try:
    entry.run()
    assert seen == [signal.SIG_IGN]
  finally:
    signal.signal(signal.SIGINT, before)


def test_nothing_imports_torch_or_tensorflow():
  code = "import sys; from mor import main; print(*sorted({'torch', 'tensorflow', 'tensorboardX'} & set(sys.modules)))"
  done = run(code=code)
  assert done.returncode == 0 and done.stdout == "\n"


def test_the_package_lists_its_names():
  assert {"load", "Model", "Engine"} <= set(dir(mor))


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("no backend")])
def test_an_error_is_judged_without_asking_for_devices(monkeypatch, error):
  def fail():
    raise RuntimeError("Unable to initialize backend")

  monkeypatch.setattr(distributed.jax, "process_count", fail)
  assert not distributed.is_lost(error)
