"""Each router keeps its contract, and no other code compares its name."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import pytest

from mor.conversion import hf_export
from mor.model.routers import table
from tests.helpers import tiny

ROOT = pathlib.Path(__file__).parents[2]
# The exported file stands alone, and the official code's names are not ours.
MAY_COMPARE = ("mor/conversion/modeling_mor.py", "mor/conversion/official_import.py")


def make(name, **fields):
  return table.make(tiny.config(model=dict(router=tiny.router(name, **fields))).model)


@pytest.mark.parametrize("arch", ["linear", "wide_mlp"])
@pytest.mark.parametrize("name", table.ROUTERS)
def test_initial_parameters_are_those_that_the_rows_declare(name, arch):
  router = make(name, arch=arch)
  shapes = jax.eval_shape(router.init, jax.random.key(0))
  found = {f"{group}/{leaf}": value.shape for group, leaves in shapes.items() for leaf, value in leaves.items()}
  declared = {row.path: (row.count, *sum(row.shape(router.config), ()))
              for row in router.parameters if row.collection == "params"}
  assert found == declared


@pytest.mark.parametrize("name", table.ROUTERS)
def test_expected_load_and_widths_are_of_every_step(name):
  router = make(name)
  for sizes in (router.widths(12), router.fractions(12)):
    assert len(sizes) == 3 and list(sizes) == sorted(sizes, reverse=True)
  assert all(isinstance(width, int) and 1 <= width <= 12 for width in router.widths(12))
  assert all(0 < fraction <= 1 for fraction in router.fractions(12))


@pytest.mark.parametrize("name", table.ROUTERS)
def test_every_loss_has_a_weight_and_what_it_divides_by_is_counted(name):
  """`counts` alone must do for `losses`: with accumulation nothing else is known."""
  router = make(name)
  h_BTD, valid_BT, one = jnp.ones((2, 12, 20)), jnp.ones((2, 12), bool), jnp.float32(1)
  params = router.init(jax.random.key(0))

  def losses():
    plan = router.enter(params, h_BTD, valid_BT)
    routed = [router.select(plan, h_BTD, valid_BT, r).sums for r in range(3)]
    sums = {**jax.tree.map(lambda *steps: jnp.stack(steps), *routed), **getattr(plan, "sums", {}), "tokens": one}
    counts = router.counts(valid_BT, one, lambda: getattr(plan, "sums", {}))
    return router.losses(sums, table.base.norms(counts))
  assert set(jax.eval_shape(losses)) <= set(router.coefs)


def test_an_unknown_router_is_named():
  with pytest.raises(ValueError, match="config.model.router.name='dice'; use one of fixed, expert_choice, token_choice"):
    tiny.config(model=dict(router=dict(name="dice")))


def test_a_model_without_routing_has_no_capacity():
  assert make("fixed", capacity=(0.9, 0.5, 0.2)).widths(10) == (10, 10, 10)


def test_an_export_knows_the_routers_of_the_exported_file():
  """modeling_mor.py is read as text: importing it takes torch."""
  tree = ast.parse(hf_export.MODELING.read_text(encoding="utf-8"))
  tables = [tuple(key.value for key in node.keys) for node in ast.walk(tree)
            if isinstance(node, ast.Dict) and node.keys and all(isinstance(key, ast.Constant) for key in node.keys)]
  assert hf_export.ROUTERS in tables


def compares_a_router(node: ast.AST) -> bool:
  """Returns True for a comparison with a router's name, or of `balancing` with anything."""
  if not isinstance(node, (ast.Compare, ast.MatchValue, ast.Subscript)):
    return False
  if isinstance(node, ast.Subscript):
    return isinstance(node.value, ast.Dict) and any(
        isinstance(key, ast.Constant) and key.value in table.ROUTERS for key in node.value.keys)
  inside = list(ast.walk(node))
  return (any(isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value in table.ROUTERS for part in inside)
          or any(isinstance(part, ast.Attribute) and part.attr == "balancing" for part in inside))


def test_nobody_else_compares_a_routers_name():
  found = []
  for path in sorted((ROOT / "mor").rglob("*.py")):
    name = str(path.relative_to(ROOT))
    if "/routers/" in name or name in MAY_COMPARE:
      continue
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if compares_a_router(node)]
    found += [f"{name}:{line}" for line in lines]
  assert not found, f"{found}: declare it in model/routers/base.py instead"


@pytest.mark.parametrize("text", [
    'x = model.router.name == "fixed"', 'x = name in ("expert_choice", "other")', 'x = router.balancing != "none"',
    'x = {"fixed": 1, "token_choice": 2}[name]', 'match name:\n  case "fixed":\n    pass'])
def test_a_comparison_is_found(text):
  assert any(compares_a_router(node) for node in ast.walk(ast.parse(text)))
  assert not any(compares_a_router(node) for node in ast.walk(ast.parse('x = model.router.name == other\ny = dict(name="fixed")')))
