"""The model agrees with the float64 oracle, over every entry of the tables."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor import config as config_lib
from mor.model import schedule
from mor.model import transformer
from mor.model.kv import plans as kv_plans
from mor.model.routers import base as router_base
from mor.model.routers import table as router_table
from tests.helpers import oracle
from tests.helpers import tiny
from tests.helpers import weights

TOLERANCE = 1e-4  # relative to the size of what is compared; whole models, float32
ROUTERS = {  # those of the paper, which the oracle knows
    "fixed": tiny.FIXED,
    # The first step drops tokens too, whose keys the sharing plans still show.
    "expert_choice": tiny.router("expert_choice", alpha=0.7, capacity=(0.7, 0.7, 0.4)),
    "token_choice": tiny.TOKEN_CHOICE,
}
RUNS = (("gathered", "select"), ("masked", "decide"))
NUM_LAYERS = {"vanilla": 2, "cycle": 6, "sequence": 6, "middle_cycle": 8, "middle_sequence": 8}

EXPERT_OPTIONS = {
    "tanh": dict(activation="tanh"),
    "none": dict(activation="none"),
    "additive": dict(gating="additive"),
    "temperature": dict(temperature=2.5, arch="mlp"),
    "wide_mlp": dict(arch="wide_mlp"),
    "no_sampling": dict(sampling="none"),
    "aux_router": dict(sampling="aux_router", temperature=2.5),
    "aux_mlp": dict(sampling="aux_router", arch="mlp"),
    "least_capacity": dict(capacity=(1.0, 0.7, 0.05)),
    "default_capacity": dict(capacity=()),
}
TOKEN_OPTIONS = {
    "sigmoid": dict(activation="sigmoid", alpha=0.6),
    "additive": dict(gating="additive"),
    "every_step": dict(gating="every_step"),
    "temperature": dict(temperature=2.5, arch="mlp"),
    "wide_mlp": dict(arch="wide_mlp"),
    "loss_free": dict(balancing="loss_free"),
    "no_balancing": dict(balancing="none"),
    "overflow": dict(capacity=(0.2, 0.1, 0.1)),
}
LAYOUT_OPTIONS = {
    "cross_documents": dict(cross_documents=True),
    "unrolled": dict(scan_layers=False),
    "remat": dict(remat="full"),
    "one_kv_head": dict(num_kv_heads=1),
    "theta_eps": dict(rope_theta=100.0, norm_eps=0.1),
}


def build(router_name: str, **model) -> config_lib.ModelConfig:
  """A tiny model with the fields of a router and of `model` over the defaults."""
  changes = {**model, "router": {**ROUTERS[router_name], **model.get("router", {})}}
  if changes.get("sharing") == "vanilla":
    changes["num_recursions"] = 1
    changes["router"]["capacity"] = (0.7,) if router_name == "expert_choice" else ()
  changes["num_layers"] = NUM_LAYERS[changes.get("sharing", "cycle")]
  return tiny.config(model={"sharing": "cycle", **changes}).model


def layouts():
  """Every router x KV plan x sharing scheme that the config allows."""
  return [case for case in itertools.product(ROUTERS, kv_plans.PLANS, schedule.SCHEMES)
          if case[0] == "fixed" or case[1] == "recursion_wise" or "sequence" not in case[2]]


def inputs(config: config_lib.ModelConfig, seed: int = 0):
  """Ragged rows of packed documents, and one row of padding only."""
  rng = np.random.default_rng(seed)
  tokens_BT = rng.integers(0, config.vocab_size, (4, 12), dtype=np.int32)
  segment_BT = np.ones_like(tokens_BT)
  segment_BT[1, 5:], segment_BT[1, 11:] = 2, 0
  segment_BT[2, 2:], segment_BT[2, 4:], segment_BT[2, 9:] = 2, 3, 0
  segment_BT[3] = 0
  return tokens_BT, segment_BT


def check(config: config_lib.ModelConfig, runs=RUNS, segmented: bool = True, jit: bool = False):
  """Compares executions and routings of `config` with the oracle.

  Args:
    config: the model.
    runs: pairs of execution and routing.
    segmented: packed and ragged rows, or one document a row.
    jit: compile the model; else its operations run one by one, which is faster
      here because they are compiled once for all configs.
  """
  tokens_BT, segment_BT = inputs(config)
  segment_BT = segment_BT if segmented else None
  valid_BT = segment_BT > 0 if segmented else np.ones_like(tokens_BT, bool)
  params, bias_R = weights.draw(config), None
  variables = {"params": params}
  if config.router.balancing == "loss_free":
    bias_R = np.linspace(-0.3, 0.3, config.num_recursions, dtype=np.float32)
    variables["balance"] = {"bias_R": bias_R}
  arrays = jax.tree.map(jnp.asarray, (variables, tokens_BT, segment_BT))
  for execution, routing in runs:
    model = transformer.Transformer(dataclasses.replace(config, execution=execution))
    run = functools.partial(model.apply, routing=routing)
    if jit:
      out = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})(*arrays)
    else:
      with jax.disable_jit():
        out = run(*arrays)
    expected = oracle.forward(config, params, tokens_BT, segment_BT, routing, bias_R)
    compare(config, out, expected, valid_BT, f"{execution} {routing}")
    logits_BTV = np.asarray(transformer.unembed(params, out.hidden_BTD))
    close(logits_BTV[valid_BT], expected.logits_BTV[valid_BT], "logits")


def compare(config, out, expected, valid_BT, run):
  hidden_BTD, score_RBT = np.asarray(out.hidden_BTD), np.asarray(out.score_RBT)
  assert np.isfinite(hidden_BTD).all(), run
  np.testing.assert_array_equal(out.keep_RBT, expected.keep_RBT, err_msg=f"{run}: tokens kept")
  close(hidden_BTD[valid_BT], expected.hidden_BTD[valid_BT], f"{run}: hidden")
  seen_RBT = expected.candidate_RBT
  close(score_RBT[seen_RBT], expected.score_RBT[seen_RBT], f"{run}: router logits")
  if run.endswith("select"):
    losses = router_table.make(config).losses(out.sums, router_base.norms(out.sums))
    for name in ("sampling", "balance", "z"):
      close(losses.get(name, 0.0), getattr(expected, name), f"{run}: {name} loss")


def close(actual, expected, what):
  scale = max(1.0, np.abs(expected).max(initial=0.0))
  np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * scale, err_msg=what)


@pytest.mark.parametrize("router,plan,sharing", layouts())
def test_layouts(router, plan, sharing):
  # Fixed has one path only, token-choice decides as it selects.
  runs = {"fixed": RUNS[:1], "token_choice": RUNS}.get(router, (*RUNS, ("masked", "select")))
  check(build(router, kv_plan=plan, sharing=sharing), runs)


@pytest.mark.parametrize("plan", kv_plans.PLANS)
@pytest.mark.parametrize("router", ROUTERS)
def test_compiled(router, plan):
  check(build(router, kv_plan=plan, sharing="middle_cycle"), RUNS[:1], jit=True)


@pytest.mark.parametrize("option", EXPERT_OPTIONS)
def test_expert_choice_options(option):
  check(build("expert_choice", router=EXPERT_OPTIONS[option]))


@pytest.mark.parametrize("option", TOKEN_OPTIONS)
def test_token_choice_options(option):
  check(build("token_choice", router=TOKEN_OPTIONS[option]))


@pytest.mark.parametrize("option", LAYOUT_OPTIONS)
def test_layout_options(option):
  check(build("expert_choice", kv_plan="hybrid", sharing="middle_cycle", **LAYOUT_OPTIONS[option]))


def test_without_segments():
  check(build("expert_choice", sharing="middle_cycle"), segmented=False)
