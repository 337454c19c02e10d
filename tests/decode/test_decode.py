"""Decoding equals the whole causal forward pass, at every position."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import cache as cache_lib
from mor.decode import weights as weights_lib
from mor.model.kv import plans as kv_plans
from mor.model.routers import table as router_table
from tests.helpers import decoding
from tests.helpers import tiny

NARROW = dict(capacity=(0.7, 0.5, 0.3))
STORAGES = ("dense", "paged")
# Router, plan and storage of accelerators: kernels are interpreted, which compiles for long.
QUICK = {("expert_choice", "hybrid", "packed_tpu"), ("expert_choice", "recursion_wise", "packed_gpu"), ("fixed", "shared", "gather")}
ACCELERATED = [
    pytest.param(*some, marks=() if some in QUICK else pytest.mark.slow) for some in itertools.product(
        router_table.ROUTERS, kv_plans.PLANS, (name for name in decoding.STORAGES if name not in STORAGES))]


def build(plan="recursion_wise", **model):
  """One layer a step, which compiles sooner, unless `sharing` or `num_layers` says more."""
  fewer = {} if "sharing" in model else dict(num_layers=5)
  return tiny.config(model=fewer | dict(kv_plan=plan, **model)).model


def check(config, storage):
  variables, tokens_BT, whole = decoding.expected(config)
  router = router_table.make(config)
  if router.routes:
    fewest = int(not router.looks_ahead or config.capacity[0] == 1)
    taken = set(np.unique(whole[1]))
    assert taken == set(range(fewest, config.num_recursions + 1)), "some depth was never taken"
  decoder = decoding.decoder(config, storage)
  decoding.assert_same(decoding.decode(decoder, variables, tokens_BT, decoding.CHUNKS[storage]), whole)


@pytest.mark.parametrize("router,plan,storage", tiny.crossed(router_table.ROUTERS, kv_plans.PLANS, STORAGES))
def test_decoding_equals_forward(router, plan, storage):
  """Rows of a ragged batch: prefilled at once, in chunks, late, or not at all."""
  check(build(plan, router=tiny.router(router), num_layers=8), storage)


@pytest.mark.parametrize("router, plan, storage", ACCELERATED)
def test_decoding_on_accelerators_equals_forward(router, plan, storage):
  check(build(plan, router=tiny.router(router), num_layers=5 if (router, plan, storage) in QUICK else 8), storage)


@pytest.mark.parametrize("plan", [
    pytest.param(plan, marks=pytest.mark.slow if plan == "recursion_wise" else ()) for plan in kv_plans.PLANS])
def test_first_step_that_drops_tokens(plan):
  """Where keys are shared, the first step runs even the tokens that it drops."""
  check(build(plan, router=NARROW), "paged")


@pytest.mark.parametrize("model", [
    pytest.param(dict(router=dict(gating="residual", alpha=1.5), tie_embeddings=False), id="expert"),
    pytest.param(dict(router=tiny.TOKEN_CHOICE | dict(gating="residual"), plan="hybrid"), id="token"),
    pytest.param(dict(router=tiny.FIXED, sharing="sequence", num_layers=6), id="sequence"),
])
def test_relaxed_models(model):
  """Each step has deltas of its own, of different ranks, and some projections have none."""
  check(build(**model, lora=dict(q=2, v=1, o=3, up=5, down=4)), "paged")


@pytest.mark.parametrize("router", [
    pytest.param(dict(arch="random", sampling="none"), id="random", marks=pytest.mark.slow),
    pytest.param(dict(arch="mlp", sampling="aux_router"), id="auxiliary"),
    pytest.param(dict(gating="additive", activation="tanh"), id="additive"),
    pytest.param(tiny.TOKEN_CHOICE | dict(balancing="loss_free", activation="sigmoid"), id="loss_free"),
    pytest.param(tiny.TOKEN_CHOICE | dict(balancing="none", arch="random", gating="every_step"), id="random_token",
                 marks=pytest.mark.slow),
])
def test_every_kind_of_router(router):
  num_layers = 8 if router.get("balancing") == "loss_free" else 5  # of 5 layers, no token goes to the last step
  check(build("hybrid", router=router, num_layers=num_layers), "paged")


def test_bias_moves_depths():
  """The case above would pass without the bias if it decided nothing."""
  config = build(router=tiny.TOKEN_CHOICE | dict(balancing="loss_free"))
  variables, tokens_BT = decoding.draw(config), decoding.tokens(config)
  none = variables | {"balance": {"bias_R": 0 * variables["balance"]["bias_R"]}}
  depths = [decoding.forward(config, v, tokens_BT)[1] for v in (variables, none)]
  assert (depths[0] != depths[1]).any()


@pytest.mark.parametrize("sharing, storage, plan", [
    pytest.param(*scheme, plan, marks=() if (scheme[1] == "paged") == (plan == "hybrid") else pytest.mark.slow)
    for scheme in (("sequence", "paged"), ("middle_sequence", "dense")) for plan in kv_plans.PLANS])
def test_steps_with_layers_of_their_own(sharing, storage, plan):
  layers = 8 if sharing.startswith("middle") else 6
  check(build(plan, sharing=sharing, num_layers=layers, router=tiny.FIXED), storage)


@pytest.mark.parametrize("model", [
    pytest.param(tiny.VANILLA, id="vanilla"),
    pytest.param(dict(sharing="cycle", num_layers=6), id="no_edges"),
    pytest.param(dict(num_heads=6, num_kv_heads=6, d_ff=20), id="many_key_heads"),
])
def test_other_shapes(model):
  check(build(**model), "paged")


def test_steps_with_layers_of_their_own_share_no_batch():
  config = build(sharing="sequence", num_layers=6, router=tiny.FIXED)
  decoder, step_B = decoding.decoder(config, "dense"), jnp.zeros(2, jnp.int32)
  weights = weights_lib.prepare(config, decoding.draw(config), "float32")
  h_BD, cache = decoder.embed(weights, step_B), decoding.make_cache(decoder, 2)
  with pytest.raises(ValueError, match="sharing='sequence' gives each step its own layers.*use a cyclic scheme"):
    decoder.run_pass(weights, cache, h_BD, cache_lib.one_each(step_B, step_B, step_B == 0))


@pytest.mark.parametrize("plan, storage", [
    pytest.param("recursion_wise", "dense", marks=pytest.mark.slow), ("hybrid", "paged")])
def test_bfloat16_follows_float32(plan, storage):
  """Random scores, so that rounding moves no token to another depth."""
  config = build(plan, router=dict(arch="random", sampling="none"))
  variables, tokens_BT, whole = decoding.expected(config)
  decoder = decoding.decoder(config, storage, kv_format="bfloat16")
  rounded = decoding.decode(decoder, variables, tokens_BT, decoding.CHUNKS[storage], weight_format="bfloat16")
  decoding.assert_same(rounded, whole, atol=2e-2 * np.abs(whole[0]).max())
  assert np.nanmax(np.abs(rounded[0] - whole[0])) > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("plan, storage", [
    pytest.param(plan, storage, marks=() if (plan, storage) == ("hybrid", "paged") else pytest.mark.slow)
    for plan in kv_plans.PLANS for storage in decoding.STORAGES if storage != "dense"])
def test_a_row_does_not_know_its_batch(plan, storage):
  config = build(plan, router=tiny.router("expert_choice"))
  variables, tokens_BT, whole = decoding.expected(config)
  decoder, row, chunks = decoding.decoder(config, storage), 0, decoding.CHUNKS[storage]
  other_BT = decoding.tokens(config, seed=3)
  other_BT[row] = tokens_BT[row]
  lengths = [(chunk[row], *chunk[:0:-1]) for chunk in chunks]  # the others' in another order
  alone_B = np.arange(len(tokens_BT)) == row
  for got in (decoding.decode(decoder, variables, other_BT, lengths),
              decoding.decode(decoder, variables, tokens_BT, chunks, live_B=alone_B)):
    decoding.assert_same(got, whole, rows=[row])
  if plan == "hybrid":  # a batch of one is another program
    alone = decoding.decode(decoder, variables, tokens_BT[:1], [chunk[:1] for chunk in chunks])
    decoding.assert_same(alone, whole, rows=[row])


def test_prefill_says_when_pages_run_out():
  config = build(router=tiny.FIXED)
  decoder = decoding.decoder(config, "paged")
  weights = weights_lib.prepare(config, decoding.draw(config), "float32")
  tokens_BT, zero_B = decoding.tokens(config)[:, :8], jnp.zeros(decoding.BATCH, jnp.int32)
  make = lambda less: decoding.make_cache(decoder, decoding.BATCH).replace(free=cache_lib.make_free(30 - less))
  run = lambda cache: decoding.prefill(decoder, weights, cache, tokens_BT, zero_B, zero_B + 8, False)[2]
  assert [bool(run(make(less))) for less in (0, 1)] == [True, False]


@pytest.mark.parametrize("width", [1, 2, 8])
def test_a_chunk_reads_its_own_keys_as_they_are_stored(width):
  """Entries in bfloat16, bit by bit, do not depend on how a prompt is cut into chunks."""
  config = build("recursion_wise", router=tiny.FIXED)
  decoder = decoding.decoder(config, "dense", kv_format="bfloat16")
  weights = weights_lib.prepare(config, decoding.draw(config), "float32")
  tokens_BT = decoding.tokens(config)[:, :8]

  def stored(width):
    cache, start_B = decoding.make_cache(decoder, decoding.BATCH), jnp.zeros(decoding.BATCH, jnp.int32)
    for start in range(0, 8, width):
      chunk_BT = np.pad(tokens_BT[:, start:start + width], ((0, 0), (0, 8 - width)))
      cache, _, ok = decoding.prefill(decoder, weights, cache, chunk_BT, start_B + start, start_B + width, True)
      assert ok
    return [np.asarray(x) for x in jax.tree.leaves((cache.edge, cache.stack))]

  whole, parts = stored(8), stored(width)
  differing = sum((a != b).sum() for a, b in zip(whole, parts))
  assert differing <= 1e-3 * sum((a != 0).sum() for a in whole), "more than sums in another order explain"
