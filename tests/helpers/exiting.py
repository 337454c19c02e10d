"""Models whose exits agree with the full depth now and then, and what their exits say."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import storage as storage_lib
from mor.exits import policy as exits_lib
from mor.model import transformer
from mor.serve import model as model_lib
from tests.helpers import decoding
from tests.helpers import serving
from tests.helpers import tiny

GREEDY = dict(temperature=0.0)

# Fields of a model, and the layers of its exits.
KINDS = {
    "plain": (dict(tiny.VANILLA, num_layers=6), (2, 4)),
    "cycle": (dict(sharing="cycle", num_layers=6, router=tiny.FIXED), (2, 4)),
    "middle": (dict(router=tiny.FIXED), (2, 3)),
    "expert_choice": (dict(), (2, 3)),
    "token_choice": (dict(router=tiny.TOKEN_CHOICE), (2, 3)),
    "halting": (dict(router=tiny.router("halting")), (2, 3)),
    "shared": (dict(kv_plan="shared"), (2, 3)),
    "hybrid": (dict(kv_plan="hybrid"), (2, 3)),
}


class Turns:
  """Drafts in three dispatches of four, whatever they cost."""

  def __init__(self):
    self._turn = 0

  def next(self) -> bool:
    self._turn += 1
    return self._turn % 4 > 0

  def saw(self, drafted: bool, tokens: int, seconds: float, alone: bool) -> None:
    pass


def quick(*chosen: tuple, slow: tuple[tuple, ...]) -> list:
  """The chosen (kind, ...), and as slow ones all others of all kinds with `slow` values: each compiles for long."""
  rest = [(kind, *values) for kind in KINDS for values in slow if (kind, *values) not in chosen]
  return [*(pytest.param(*some) for some in chosen), *(pytest.param(*some, marks=pytest.mark.slow) for some in rest)]


def engine(model: model_lib.Model, kind: str, fields: dict[str, Any] | None = None, **options: Any) -> Any:
  """One whose drafts do not depend on the clock; `fields` are of its exits."""
  made = serving.engine(model, exits=exits(kind, **fields or {}), **options)
  made.runner.pace = Turns()
  return made


def model(kind: str, seed: int = 1, **fields: Any) -> model_lib.Model:
  """Its output matrix is not its embedding, which an exit would copy its input from."""
  config = tiny.config(model=dict(num_layers=5, tie_embeddings=False) | KINDS[kind][0] | fields).model
  return model_lib.Model(config, decoding.draw(config, seed), None, serving.CONTEXT)


def exits(kind: str, **fields: Any) -> exits_lib.Exits:
  return exits_lib.Exits(**dict(after=KINDS[kind][1], pending=3, worth=0.0) | fields)


def answers(engine, requests, order=0):
  done, _ = serving.serve(engine, requests, order)
  serving.assert_all_free(engine)
  return [done[i] for i in range(len(requests))]


def told(completion):
  return completion.tokens, completion.finish


def without_exits(requests):
  return [(p, {k: v for k, v in o.items() if k not in ("exit", "threshold")}) for p, o in requests]


def states(model: model_lib.Model, tokens_T: list[int], after: int) -> np.ndarray:
  """States `[T, D]` after some layers, of unit mean square: of the model that ends there (no edges, no router)."""
  config, params = model.config, dict(model.variables["params"])
  layers = params["stack"]["attention_norm"].shape[0]
  recursions = after // layers if after >= layers else 1
  params["stack"] = jax.tree.map(lambda a: a[:after], params["stack"])
  params["final_norm"] = jnp.ones_like(params["final_norm"])
  cut = transformer.Transformer(dataclasses.replace(config, num_layers=after, num_recursions=recursions))
  padded_1T = np.zeros((1, serving.CONTEXT), np.int32)
  padded_1T[0, :len(tokens_T)] = tokens_T
  return np.asarray(cut.apply({"params": params}, padded_1T, routing="decide").hidden_BTD[0, :len(tokens_T)])


def logits(model: model_lib.Model, states_TD: np.ndarray) -> np.ndarray:
  """What head and final norm make of `states`."""
  params = model.variables["params"]
  return states_TD * np.asarray(params["final_norm"])[None, :] @ np.asarray(transformer.head(params)).T


def entries(decoder: Any, cache: Any, slot: int) -> dict[tuple, np.ndarray]:
  """A sequence's keys and values, by (edge layer) or (row, layer of a step)."""
  storage, found = decoder.tables.storage, {}
  def read(buffer, page_P, length):
    rows = storage_lib.SeenEntries(page_P[None], length[None])
    k_SKH, v_SKH = (np.asarray(x[0, :int(length)]) for x in storage.read(buffer, rows)[:2])
    return np.stack([k_SKH, v_SKH])
  for i, buffer in enumerate(cache.edge):
    found[i,] = read(buffer, cache.edge_page_BP[slot], cache.edge_length_B[slot])
  for i, rule in enumerate(decoder.tables.rules):
    for row in set(rule.own_R) - {-1}:
      found[row, i] = read(cache.stack[i], cache.page_BRP[slot, row], cache.length_BR[slot, row])
  return found


def prefilled(engine: Any, tokens_T: list[int]) -> dict[tuple, np.ndarray]:
  """The entries that the full forward of the tokens leaves."""
  decoder, size = engine.runner.decoder, engine.runner.decoder.tables.storage.page_size
  pages = -(-serving.CONTEXT // size)
  cache = decoder.tables.make_cache(1, decoder.tables.num_rows * pages, pages, pages)
  padded_1T = np.zeros((1, serving.CONTEXT), np.int32)
  padded_1T[0, :len(tokens_T)] = tokens_T
  cache, _, ok = decoding.prefill(decoder, engine.runner.weights, cache, padded_1T, jnp.zeros(1, jnp.int32),
                                  jnp.array([len(tokens_T)]), False)
  assert ok
  return entries(decoder, cache, 0)
