"""Recursive models out of plain ones: which layers, what deltas, and what is lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor import config as config_lib
from mor.conversion import recursive_init
from mor.model import transformer
from tests.helpers import tiny
from tests.helpers import weights

LAYERS = 8
SOURCE = tiny.config(model=tiny.VANILLA | dict(num_layers=LAYERS)).model
PARAMS = weights.draw(SOURCE)
FULL = {name: min(ends) for name, ends in SOURCE.projections.items()}
SCHEMES = [("cycle", 2), ("cycle", 4), ("sequence", 4), ("middle_cycle", 3), ("middle_sequence", 2)]


def target(sharing, recursions, ranks=None, **model):
  fields = dict(num_layers=LAYERS, sharing=sharing, num_recursions=recursions, router=tiny.FIXED, lora=ranks or {})
  return tiny.config(model=fields | model).model


def convert(model, method, deltas="svd"):
  return recursive_init.convert(model, config_lib.InitConfig(method=method, lora=deltas), 0, SOURCE,
                                {"params": PARAMS})["params"]


def logits(model, params, tokens_BT):
  hidden_BTD = jax.jit(lambda p, t: transformer.Transformer(dataclasses.replace(model, scan_layers=False)).apply(
      {"params": p}, t, routing="decide").hidden_BTD)(params, tokens_BT)
  return np.asarray(transformer.unembed(jax.tree.map(jnp.asarray, params), hidden_BTD))


def layer(i):
  return PARAMS["stack"]["ffw"]["gate"][i]


@pytest.mark.parametrize("sharing, recursions", SCHEMES)
@pytest.mark.parametrize("method", ["stepwise", "average", "lower", "upper", "random"])
def test_full_rank_is_the_source(sharing, recursions, method):
  """Whatever is shared: the deltas of full rank give back every layer, its norms included."""
  model = target(sharing, recursions, FULL)
  params = convert(model, method)
  tokens_BT = tiny.batch(tiny.config())["tokens_BT"]
  np.testing.assert_allclose(logits(model, params, tokens_BT), logits(SOURCE, PARAMS, tokens_BT), atol=1e-4)


def test_rank_zero_is_the_plain_recursion():
  """A lower rank cuts the deltas; no rank leaves none, and the same stack."""
  plain, low, full = (convert(target("cycle", 2, ranks), "average") for ranks in (
      {}, {name: 2 for name in FULL}, FULL))
  assert "lora" not in plain
  jax.tree.map(np.testing.assert_array_equal, plain["stack"], low["stack"])
  jax.tree.map(np.testing.assert_array_equal, plain["stack"], full["stack"])
  a_RLIA, b_RLAO = (low["lora"]["ffw"]["up"][part] for part in "ab")
  assert a_RLIA.shape == (2, 4, 20, 2) and b_RLAO.shape == (2, 4, 2, 28)
  np.testing.assert_array_equal(a_RLIA, full["lora"]["ffw"]["up"]["a"][..., :2])
  np.testing.assert_array_equal(b_RLAO, full["lora"]["ffw"]["up"]["b"][:, :, :2])


@pytest.mark.parametrize("sharing, recursions, method, rows", [
    ("cycle", 2, "stepwise", [0, 2, 5, 7][:4]),
    ("cycle", 4, "stepwise", [0, 7]),
    ("cycle", 2, "lower", [0, 1, 2, 3]),
    ("cycle", 2, "upper", [4, 5, 6, 7]),
    ("middle_cycle", 2, "stepwise", [1, 3, 6]),
    ("middle_cycle", 3, "upper", [5, 6]),
    ("sequence", 4, "lower", [0, 1]),
    ("cycle", 8, "stepwise", [0]),
])
def test_chosen_layers(sharing, recursions, method, rows):
  params = convert(target(sharing, recursions), method)
  np.testing.assert_array_equal(params["stack"]["ffw"]["gate"], np.stack([layer(i) for i in rows]))
  if sharing.startswith("middle"):
    np.testing.assert_array_equal(params["prelude"]["ffw"]["gate"][0], layer(0))
    np.testing.assert_array_equal(params["coda"]["ffw"]["gate"][0], layer(LAYERS - 1))


def test_the_papers_figure():
  """Three of six layers are 1, 3 and 6."""
  assert recursive_init.spread(3, 6) == [0, 2, 5]


@pytest.mark.parametrize("sharing, groups", [
    ("cycle", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("sequence", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("middle_cycle", [[1, 4], [2, 5], [3, 6]]),
    ("middle_sequence", [[1, 2], [3, 4], [5, 6]]),
])
def test_the_mean_of_the_tied_layers(sharing, groups):
  params = convert(target(sharing, 2), "average")
  want = np.stack([np.mean([layer(i) for i in group], axis=0) for group in groups])
  np.testing.assert_allclose(params["stack"]["ffw"]["gate"], want, atol=1e-7)
  want = np.stack([np.mean([PARAMS["stack"]["ffw_norm"][i] for i in group], axis=0) for group in groups])
  np.testing.assert_allclose(params["stack"]["ffw_norm"], want, atol=1e-7)


def test_a_step_that_loses_nothing_starts_with_random_a_and_zero_b():
  deltas = convert(target("cycle", 2, dict(q=3)), "lower")["lora"]["attention"]["q"]
  assert not deltas["b"][0].any() and deltas["a"][0].any()
  assert deltas["b"][1].any()
  zero = convert(target("cycle", 2, dict(q=3)), "lower", "zero")["lora"]["attention"]["q"]
  assert not zero["b"].any() and zero["a"].any()


def test_fewer_layers_take_the_nearest_at_regular_intervals():
  params = convert(target("cycle", 2, num_layers=6), "lower")
  np.testing.assert_array_equal(params["stack"]["ffw"]["gate"], np.stack([layer(i) for i in (0, 1, 3)]))


@pytest.mark.parametrize("router", [
    pytest.param(dict(name="expert_choice", gating="residual", alpha=2.0, capacity=(1.0, 0.5)), id="expert"),
    pytest.param(tiny.TOKEN_CHOICE | dict(gating="residual", alpha=2.0), id="token"),
])
def test_an_added_router_changes_nothing_at_first(router):
  """Expert-choice keeps every token; token-choice sends all to depth 1, through a gate of one."""
  model = target("cycle", 2, router=router)
  tokens_BT = tiny.batch(tiny.config())["tokens_BT"]
  plain = target("cycle", 2)
  routed, params = convert(model, "average"), convert(plain, "average")
  if router["name"] == "token_choice":
    once = dataclasses.replace(plain, sharing="vanilla", num_recursions=1, num_layers=4)
    want = logits(once, params, tokens_BT)
  else:
    want = logits(plain, params, tokens_BT)
  np.testing.assert_allclose(logits(model, routed, tokens_BT), want, atol=1e-4)


@pytest.mark.parametrize("fields, words", [
    (dict(d_model=24, vocab_size=63), ["d_model=24 (there 20)", "vocab_size=63"]),
    (dict(num_layers=10), ["num_layers=10", "at most 8"]),
    (dict(tie_embeddings=False), ["tie_embeddings"]),
])
def test_models_that_do_not_fit(fields, words):
  with pytest.raises(ValueError) as error:
    convert(target("cycle", 2, **fields), "average")
  assert all(word in str(error.value) for word in words)


def test_a_recursive_source_gives_only_itself():
  model = target("cycle", 2)
  params = weights.draw(model)
  same = recursive_init.convert(model, config_lib.InitConfig(method="average", lora="svd"), 0, model, {"params": params})
  assert same == {"params": params}
  with pytest.raises(ValueError, match="itself recursive"):
    recursive_init.convert(target("cycle", 4), config_lib.InitConfig(method="average", lora="svd"), 0, model,
                           {"params": params})
