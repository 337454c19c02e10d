"""The README's examples work as printed, and what it names exists."""

import dataclasses
import pathlib
import re

from absl import flags
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mor
from mor import main
from mor.data import tokenizer as tokenizer_lib
from mor.decode import decoder as decoder_lib
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.model import transformer
from mor.model.routers import table
from mor.serve import generate as generate_lib
from mor.serve import model as model_lib
from mor.serve import request as request_lib
from tests.helpers import tiny
from tests.helpers import weights as test_weights

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(text):
  """The one Python example with that text."""
  found, = [source for source in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in source]
  return found


def test_generation_of_the_readme(monkeypatch, capsys):
  config = tiny.config(tiny.BYTES).model
  params = jax.tree.map(jnp.asarray, test_weights.draw(config))
  model = model_lib.Model(config, {"params": params}, tokenizer_lib.ByteTokenizer(), 24)
  monkeypatch.setattr(mor, "load", lambda workdir: model, raising=False)
  namespace = {}
  exec(block("mor.load"), namespace)
  first, second = namespace["answers"]
  wanted, = model.generate(["My fellow citizens"], temperature=0.8, top_p=0.95, seed=1)
  assert capsys.readouterr().out == f"{first.text} {first.depths} length\n{wanted.text}"
  assert len(first.tokens) == 6 and len(second.tokens) == 11  # up to the context


def test_options_of_a_request_are_in_the_readme():
  with pytest.raises(ValueError, match="the options are (.*)") as error:
    request_lib.make([1], dance=1)
  listed = README.partition("**Options** of a request:")[2].partition(". ")[0]
  assert sorted(re.findall(r"`(\w+)`", listed)) == str(error.value).partition("are ")[2].split(", ")


def test_flags_of_the_readme_exist():
  assert main.MODES
  section = README.partition("## Generate and serve")[2].partition("\n## ")[0]
  names = set(re.findall(r"(?<![\w-])--(\w+)=", section))
  assert len(names) >= 5 and not {name for name in names if name not in flags.FLAGS}


def test_router_of_the_readme(monkeypatch):
  source = block("class ")
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

  decoder = decoder_lib.Decoder(
      config.model, storage_lib.Dense(24, 2, 6, "float32"), router=namespace["Alternate"](config.model))
  done, = generate_lib.generate(decoder, weights_lib.prepare(config.model, variables, "float32"),
                                [request_lib.make([5, 6, 7, 8], max_tokens=6)], context=24)
  assert done.depths == [1, 3, 1, 2, 1, 3]  # of positions 3 to 8


def test_names_of_the_readme_exist():
  paths = re.findall(r"\b(?:mor|configs|launch|notebooks|tests|docs|benchmarks)/[\w./]*\w", README)
  assert len(paths) > 8
  missing = sorted({path for path in paths if not (ROOT / path).exists()})
  assert not missing, f"README.md names {missing}"


def test_options_of_the_readme_exist():
  fields = dataclasses.asdict(tiny.config())
  for group, field in re.findall(r"--config\.(\w+)\.(\w+)=", README):
    assert field in fields[group]
