"""Files and functions stay small, names are used once, and docstrings say what a function does."""

import ast
import collections
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(p for room in ("mor", "benchmarks") for p in (ROOT / room).rglob("*.py") if p.name != "__init__.py")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

SHORTEST, LONGEST = 40, 400  # lines of a module
LONGEST_FUNCTION = 60
TABLES = ["mor/model/routers/table.py", "mor/data/tasks/table.py", "mor/__main__.py"]  # one line an entry, and the entry point: may be tiny

# Words that look like a verb in the third person at the head of a docstring, and are none.
FALSE_FRIENDS = frozenset("""Always Arrays As Bits Bytes Cells Chunks Class Classes Columns Computations Cross Depths Does Entries Factors Fields Figures Files Flags
    Functions Has Heads Hidden Ids Indices Inputs Instructions Is Items Its Keys Layers Less Lines Logits Loss Losses Messages Models Norms Nothing
    Numbers Options Ours Outputs Parameters Parts Pass Paths Perhaps Points Positions Products Prompts Queries Requests Results Routers Rows Settings
    Sizes Slots Statistics Stats Tensors Texts Theirs This Thresholds Tokens Us Values Variables Vectors Was Weights Words Yes Zeros""".split())



def name_of(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def is_property(node) -> bool:
  """A property is read as a noun, so its docstring may be a noun phrase."""
  return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def begins_with_verb(docstring: str) -> bool:
  first = re.match(r"[A-Z][a-z]*(-[a-z]+)?s\b(?!')", docstring)
  return bool(first) and first.group() not in FALSE_FRIENDS


def function_faults(node) -> list[str]:
  faults = []
  lines = node.end_lineno - node.lineno + 1
  if lines > LONGEST_FUNCTION:
    faults.append(f"{node.lineno}: {node.name} has {lines} lines, over {LONGEST_FUNCTION}")
  docstring = ast.get_docstring(node)
  if docstring and not is_property(node) and not begins_with_verb(docstring):
    faults.append(f"{node.lineno}: the docstring of {node.name} does not begin with a verb in the third person: {docstring.split()[0]!r}")
  return faults


def find_faults(name: str, text: str) -> list[str]:
  """Returns what the file does against the style, one line a fault."""
  tree, lines, faults = ast.parse(text), len(text.splitlines()), []
  if lines > LONGEST:
    faults.append(f"{lines} lines: split the idea")
  if lines < SHORTEST and name not in TABLES:
    faults.append(f"{lines} lines: part of a larger idea, in another file")
  if not ast.get_docstring(tree):
    faults.append("the module has no docstring")
  for node in ast.walk(tree):
    if isinstance(node, FUNCTIONS):
      faults += function_faults(node)
    elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and isinstance(node.value, ast.Lambda):
      faults.append(f"{node.lineno}: an assigned lambda; write `def`")
  for node in tree.body:
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
      faults.append(f"{node.lineno}: {node.name} has no docstring")
  return faults


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_style(path):
  faults = find_faults(name_of(path), path.read_text(encoding="utf-8"))
  assert not faults, "\n".join(faults)


def test_no_two_classes_share_a_name():
  homes = collections.defaultdict(list)
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ClassDef) and name_of(path).startswith("mor/"):
        homes[node.name].append(name_of(path))
  shared = {name: files for name, files in homes.items() if len(files) > 1}
  assert not shared


@pytest.mark.parametrize("fault, text", [
    ("assigned lambda", "double = lambda x: 2 * x"),
    ("begin with a verb", 'def double(x):\n  """The double of x."""'),
    ("begin with a verb", 'def double(x):\n  """Tokens, twice."""'),
    ("begin with a verb", 'class Pair:\n  """Two."""\n  def double(self):\n    """Whether it is twice."""'),
    ("has no docstring", "def double(x):\n  return 2 * x"),
    ("over 60", 'def double(x):\n  """Returns the double."""\n' + "  x = x\n" * 60),
    ("split the idea", "x = 1\n" * 400),
    ("part of a larger idea", ""),
])
def test_each_rule_finds_its_fault(fault, text):
  long_enough = '"""A module."""\n' + "\n" * (0 if "larger" in fault else 40)
  assert [line for line in find_faults("mor/x.py", long_enough + text) if fault in line]
  good = '\n\ndef double(x):\n  """Returns the double."""\n  return 2 * x\n\n\nclass Pair:\n  """Two."""\n  @property\n  def one(self):\n    """The first."""\n'
  assert not find_faults("mor/x.py", long_enough + "\n" * 40 + good)
