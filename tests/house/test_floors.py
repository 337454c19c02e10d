"""The order of files in `mor/FLOORS` holds, imports inside functions included."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(p for p in (ROOT / "mor").rglob("*.py") if p.name != "__init__.py")
LINES = [line.partition("#")[0].strip() for line in (ROOT / "mor/FLOORS").read_text().splitlines()]
FLOORS = [line for line in LINES if line]

# Files that an export holds: there they lie beside each other in a folder, so they import each other relatively.
EXPORTED = ("mor.conversion.cache_mor", "mor.conversion.modeling_mor")

# Heavy packages, and the only files that may import them.
HOMES = {
    "array_record": "mor.data.",
    "datasets": "mor.data.",
    "grain": "mor.data.",
    "matplotlib": "mor.plots",
    "ml_collections": ("mor.config", "mor.experiments", "mor.data.", "mor.main"),
    "tensorflow_datasets": "mor.data.",
    # The exported model; pickled weights.
    "torch": (*EXPORTED, "mor.conversion.tensors"),
}


def module_name(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: pathlib.Path) -> list[str]:
  """Dotted names of everything that the file imports; `from a import b` is a.b."""
  names = []
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 1 and module_name(path) in EXPORTED:
      names.append(f"{module_name(path).rpartition('.')[0]}.{node.module}")
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: relative import; write it from `mor`"
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


def test_floors_lists_every_file_once():
  modules = set(map(module_name, FILES))
  assert not modules - set(FLOORS), "not in mor/FLOORS"
  assert not set(FLOORS) - modules, "in mor/FLOORS, but no such file"
  assert len(FLOORS) == len(modules), "listed twice in mor/FLOORS"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_only_modules_from_above(path):
  above = FLOORS[:FLOORS.index(module_name(path))]
  for name in imports(path):
    if name.split(".")[0] == "mor":
      assert name in FLOORS, f"imports {name}, which is no module: import the module, not a name"
      assert name in above, f"imports {name}, which is not above it in mor/FLOORS"


def room_of(module: str) -> str:
  """A folder of `mor`, with the folders in it; a module beside the folders is a room of its own."""
  return ".".join(module.split(".")[:2])


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
  """A path from a room back to itself, or nothing."""
  clear = set()

  def walk(path):
    for room in sorted(edges.get(path[-1], ())):
      if room in path:
        return path[path.index(room):] + [room]
      if room not in clear and (found := walk(path + [room])):
        return found
    clear.add(path[-1])
    return []

  return next((found for room in sorted(edges) if (found := walk([room]))), [])


def test_no_cycle_between_rooms():
  edges = {}
  for path in FILES:
    room = room_of(module_name(path))
    edges.setdefault(room, set()).update(room_of(name) for name in imports(path) if name in FLOORS)
    edges[room].discard(room)
  assert not find_cycle(edges), " imports ".join(find_cycle(edges))


def test_a_cycle_is_found():
  assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": {"d"}, "d": set()}) == []
  assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}}) == ["b", "c", "b"]


def test_floors_name_each_room_as_a_whole():
  rooms = [room_of(module) for module in FLOORS]
  starts = [room for room, before in zip(rooms, [None, *rooms]) if room != before]
  assert len(starts) == len(set(starts)), f"in parts: {sorted({room for room in starts if starts.count(room) > 1})}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_training_and_inference_do_not_meet(path):
  for ours, theirs in [("mor.train.", "mor.decode."), ("mor.train.", "mor.serve."), ("mor.decode.", "mor.train."), ("mor.serve.", "mor.train.")]:
    if module_name(path).startswith(ours):
      assert not [name for name in imports(path) if name.startswith(theirs)]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_stay_at_home(path):
  for name in imports(path):
    home = HOMES.get(name.split(".")[0], "")
    assert module_name(path).startswith(home), f"imports {name}, which belongs in {home}"


def test_package_files_are_empty():
  for path in (ROOT / "mor").rglob("__init__.py"):
    if path.parent != ROOT / "mor":
      assert not path.read_text().strip(), f"{path} is not empty"


def test_every_folder_is_a_package():
  for path in FILES:
    assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"
