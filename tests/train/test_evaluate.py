"""Held-out figures follow their definition and depend on nothing else."""

import functools
import gzip
import lzma
import math

import jax
import numpy as np
import pytest

from mor import sharding
from mor.model import transformer
from mor.model.routers import table as router_table
from mor.train import evaluate
from mor.train import step as step_lib
from tests.helpers import tiny

NUM_BYTES_V = np.arange(61, dtype=np.int32) % 5


@pytest.fixture(scope="module")
def held_out():
  """Config, state, the sums' owner and its metrics on two batches, one padded."""
  config = tiny.config()
  mesh = sharding.make_mesh(config.mesh)
  state = step_lib.init_state(config, mesh)
  # Spread the router's logits about 0, so that the causal rule drops tokens.
  state.params["router"]["out"] *= 50
  run = evaluate.make(config, mesh, NUM_BYTES_V)
  given = [tiny.batch(config, 1), tiny.batch(config, 2)]
  given[1] = {k: np.where(np.arange(4)[:, None] < 3, v, np.zeros_like(v)) for k, v in given[1].items()}
  return config, state, run, given, run(state.params, state.balance, given)


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(model, params, batch, routing):
  out = transformer.Transformer(model).apply(
      {"params": params}, batch["tokens_BT"], batch["segment_BT"], routing=routing)
  return jax.nn.log_softmax(transformer.unembed(params, out.hidden_BTD)), out.keep_RBT


def by_hand(config, state, given, routing):
  """nll per token and bits per byte, from whole logits."""
  nll = num_targets = num_bytes = kept = valid = 0
  for batch in given:
    logp_BTV, keep_RBT = forward(config.model, state.params, batch, routing)
    mask_BT, target_BT = batch["loss_mask_BT"], batch["target_BT"]
    nll -= np.take_along_axis(np.asarray(logp_BTV), target_BT[:, :, None], 2)[mask_BT].sum()
    num_targets += mask_BT.sum()
    num_bytes += NUM_BYTES_V[target_BT[mask_BT]].sum()
    kept = kept + np.asarray(keep_RBT).sum((1, 2))
    valid += (batch["segment_BT"] > 0).sum()
  return nll / num_targets, nll / math.log(2) / num_bytes, kept / valid


@pytest.mark.parametrize("name, routing", [("causal", "decide"), ("oracle", "select")])
def test_figures_follow_their_definition(held_out, name, routing):
  config, state, _, given, metrics = held_out
  nll, bpb, load_R = by_hand(config, state, given, routing)
  assert metrics[f"nll_{name}"] == pytest.approx(nll, rel=1e-5)
  assert metrics[f"bpb_{name}"] == pytest.approx(bpb, rel=1e-5)
  assert [metrics[f"load_{name}_{r}"] for r in (1, 2, 3)] == pytest.approx(load_R.tolist(), rel=1e-6)


def test_agreement_counts_tokens_both_treat_alike(held_out):
  config, state, _, given, metrics = held_out
  same = valid = 0
  for batch in given:
    keep = [np.asarray(forward(config.model, state.params, batch, routing)[1]) for routing in ("select", "decide")]
    live_BT = batch["segment_BT"] > 0
    same += ((keep[0] == keep[1])[1:] & live_BT[None]).sum()  # step 1 takes every token
    valid += 2 * live_BT.sum()
  assert 0 < same < valid
  assert metrics["agreement"] == pytest.approx(same / valid)


def test_what_the_mask_hides_does_not_count(held_out):
  _, state, run, given, metrics = held_out
  hidden = [{**b, "target_BT": np.where(b["loss_mask_BT"], b["target_BT"], 60)} for b in given]
  assert run(state.params, state.balance, hidden) == metrics


def test_rows_of_padding_add_nothing(held_out):
  _, state, run, given, metrics = held_out
  empty = {k: np.zeros_like(v) for k, v in given[0].items()}
  assert run(state.params, state.balance, [*given, empty]) == metrics


def test_devices_do_not_matter(held_out):
  config, state, _, given, metrics = held_out
  mesh = sharding.make_mesh(tiny.config(mesh=dict(data=4)).mesh)
  spread = evaluate.make(config, mesh, NUM_BYTES_V)
  params = jax.device_put(state.params, sharding.tree_shardings(mesh, state.params, router_table.make(config.model).parameters))
  assert spread(params, state.balance, given) == pytest.approx(metrics, rel=1e-5)


def test_token_choice_is_causal_already():
  config = tiny.config(model=dict(execution="masked", router=tiny.TOKEN_CHOICE))
  mesh = sharding.make_mesh(config.mesh)
  state = step_lib.init_state(config, mesh)
  metrics = evaluate.make(config, mesh, NUM_BYTES_V)(state.params, state.balance, [tiny.batch(config)])
  assert metrics["agreement"] == 1
  assert metrics["nll_causal"] == pytest.approx(metrics["nll_oracle"], rel=1e-5)


def test_a_model_without_a_router_has_one_figure():
  assert list(evaluate.routings(tiny.config(model=tiny.VANILLA).model)) == ["causal"]
  assert list(evaluate.routings(tiny.config().model)) == ["causal", "oracle"]


def test_nothing_held_out_is_an_error(held_out):
  _, state, run, given, _ = held_out
  empty = {k: np.zeros_like(v) for k, v in given[0].items()}
  with pytest.raises(ValueError, match="no held-out tokens .* data.validation_fraction"):
    run(state.params, state.balance, [empty])


def test_compressors_are_those_of_the_command_line():
  text = "four score and seven years ago – " * 200
  data = text.encode()
  bits = evaluate.compressed_bits_per_byte(text)
  assert bits["bpb_xz"] == 8 * len(lzma.compress(data, preset=9)) / len(data)
  # gzip adds a header of 10 bytes and 2 more of trailer to the same stream.
  assert bits["bpb_gzip"] == pytest.approx(8 * (len(gzip.compress(data, 9)) - 12) / len(data))


def test_each_process_gives_the_rows_its_devices_hold():
  mesh = sharding.make_mesh(tiny.config(mesh=dict(data=4, tensor=2)).mesh)
  assert sharding.local_rows(mesh, 8) == slice(0, 8)
  array = sharding.put_whole(mesh, tiny.batch(tiny.config(data=dict(batch_size=8))))["tokens_BT"]
  assert array.shape == (8, 12) and array.addressable_shards[0].data.shape == (2, 12)
