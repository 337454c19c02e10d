"""The README's router works as printed, and what it names exists."""

import dataclasses
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mor.model import transformer
from mor.model.routers import table
from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_router_of_the_readme(monkeypatch):
  source, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  namespace = {}
  exec(source, namespace)
  monkeypatch.setitem(table.ROUTERS, "fixed", namespace["Alternate"])
  config = tiny.config(model=dict(router=tiny.FIXED))
  batch = jax.tree.map(jnp.asarray, tiny.batch(config))

  variables = jax.jit(transformer.Transformer(config.model).init)(
      jax.random.key(0), batch["tokens_BT"])
  hidden = {}
  for execution in ("gathered", "masked"):
    model = transformer.Transformer(dataclasses.replace(config.model, execution=execution))
    out = jax.jit(model.apply)(variables, batch["tokens_BT"], batch["segment_BT"])
    hidden[execution] = out.hidden_BTD
    for r, keep_BT in enumerate(np.asarray(out.keep_RBT)):
      wanted_BT = np.array(batch["segment_BT"] > 0)
      wanted_BT[:, np.arange(config.data.seq_len) % 2**r != 0] = False
      np.testing.assert_array_equal(keep_BT, wanted_BT)
  chex.assert_trees_all_close(hidden["gathered"], hidden["masked"], atol=1e-5)


def test_names_of_the_readme_exist():
  paths = re.findall(r"\b(?:mor|configs|launch|notebooks|tests|docs|benchmarks)/[\w./]*\w", README)
  assert len(paths) > 8
  missing = sorted({path for path in paths if not (ROOT / path).exists()})
  assert not missing, f"README.md names {missing}"


def test_options_of_the_readme_exist():
  fields = dataclasses.asdict(tiny.config())
  for group, field in re.findall(r"--config\.(\w+)\.(\w+)=", README):
    assert field in fields[group]
