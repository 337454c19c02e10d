"""Phases of a slot: one function changes them, along one table, from the functions that the table names."""

import ast
import pathlib

import pytest

from mor.decode import slots as slots_lib

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "mor").rglob("*.py"))
CONSTRUCTION, MOVE = "decode.slots._make_empty", "decode.slots.move"


class Visitor(ast.NodeVisitor):
  """Collects keywords `phase_B=` and keys "phase_B", and calls of `move`, by the function that has them."""

  def __init__(self, module: str):
    self.path, self.writes, self.moves = [module], [], []

  def visit_FunctionDef(self, node):
    self.path.append(node.name)
    self.generic_visit(node)
    self.path.pop()

  def visit_Call(self, node):
    here = ".".join(self.path)
    self.writes += [here for keyword in node.keywords if keyword.arg == "phase_B"]
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = getattr(getattr(node.func, "value", None), "id", "")
    if name == "move" and (owner == "slots_lib" or self.path[0] == "decode.slots"):
      self.moves.append((here, *(phases(argument) for argument in node.args[2:])))
    self.generic_visit(node)

  def visit_Constant(self, node):
    if node.value == "phase_B":
      self.writes.append(".".join(self.path))


def phases(node: ast.expr) -> list[int]:
  """The phases that an argument of `move` names, which must be constants."""
  if isinstance(node, ast.Tuple):
    return [phase for element in node.elts for phase in phases(element)]
  name = node.attr if isinstance(node, ast.Attribute) else node.id
  value = getattr(slots_lib, name)
  return list(value) if isinstance(value, tuple) else [value]


def visit(module: str, text: str) -> Visitor:
  visitor = Visitor(module)
  visitor.visit(ast.parse(text))
  return visitor


def visit_all() -> list[Visitor]:
  return [visit(".".join(path.relative_to(ROOT / "mor").with_suffix("").parts), path.read_text(encoding="utf-8"))
          for path in FILES]


def test_only_move_writes_a_phase():
  writes = {here for visitor in visit_all() for here in visitor.writes}
  assert writes == {CONSTRUCTION, MOVE}


def test_every_move_stands_in_the_table_and_every_entry_is_used():
  made = {}
  for visitor in visit_all():
    for here, old, (new,) in visitor.moves:
      for phase in old:
        made.setdefault((phase, new), set()).add(here)
  assert made == {change: set(functions) for change, functions in slots_lib.MOVES.items()}


@pytest.mark.parametrize("text", [
    "def f(slots):\n  return slots.replace(phase_B=slots.phase_B)",
    "def f(slots):\n  return slots.replace(**{'phase_B': 1})",
])
def test_a_write_is_found(text):
  assert visit("x", text).writes == ["x.f"]


def test_a_move_is_found():
  text = "def f(slots, on_B):\n  return slots_lib.move(slots, on_B, (slots_lib.LEAVE, slots_lib.CHECK), slots_lib.DONE)"
  assert visit("x", text).moves == [("x.f", [slots_lib.LEAVE, slots_lib.CHECK], [slots_lib.DONE])]
