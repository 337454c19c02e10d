"""FLOPs against numbers worked by hand and against XLA's cost analysis."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from mor import flops
from mor.model import transformer
from mor.model.kv import plans
from tests.helpers import tiny

# D=20 N=4 K=2 H=6 F=28 V=61, T=12, 1 + 3 * 2 + 1 layers: query and output
# matrices have 960 entries, key and value 480, feed-forward 1680; a causal
# attention costs 2 * 12 * 24 = 576. Steps process 12, 8 and 4 tokens, so that
# the layers' processed fractions add up to 4 + 2 * 2/3 + 2 * 1/3 = 6 and their
# squares to 4 + 2 * (4 + 1) / 9 = 46/9.
SEQ_LEN = 12
FFW, HEAD, ROUTERS = 2 * 6 * 1680, 2 * 61 * 20, 3 * 2 * 20

# Matrix products dominate at these sizes; XLA also counts what is element-wise.
WIDE = dict(d_model=256, num_heads=6, num_kv_heads=2, head_dim=64, d_ff=640, scan_layers=False)
WIDE_SEQ_LEN = 192


@pytest.mark.parametrize("kv_plan, projections, attention", [
    ("recursion_wise", 2 * (6 * 960 + 6 * 480), 576 * 46 / 9),
    ("shared", 2 * (6 * 960 + 4 * 480), 576 * 6),  # later steps project no keys, but see all
    ("hybrid", 2 * (6 * 960 + 6 * 480), 576 * 6),
])
def test_expert_choice_by_hand(kv_plan, projections, attention):
  model = tiny.config(model=dict(kv_plan=kv_plan)).model
  parts = flops.breakdown(model, SEQ_LEN)
  assert parts == pytest.approx(dict(
      attention_projections=projections, attention=attention, ffw=FFW, lora=0.0, router=ROUTERS, head=HEAD))
  total = projections + attention + FFW + ROUTERS
  assert flops.forward_flops_per_token(model, SEQ_LEN, head=False) == pytest.approx(total)
  assert flops.forward_flops_per_token(model, SEQ_LEN) == pytest.approx(total + HEAD)
  assert flops.train_flops_per_token(model, SEQ_LEN) == pytest.approx(3 * (total + HEAD))


@pytest.mark.parametrize("kv_plan", plans.PLANS)
def test_a_step_whose_keys_are_read_later_runs_all_tokens(kv_plan):
  make = lambda first: flops.breakdown(tiny.config(
      model=dict(kv_plan=kv_plan, router=dict(capacity=(first, 0.5, 0.25)))).model, SEQ_LEN)
  assert (make(0.5) == make(1.0)) == (kv_plan != "recursion_wise")


def test_deltas_cost_their_entries_where_their_projection_runs():
  make = lambda **ranks: flops.breakdown(tiny.config(model=dict(kv_plan="shared", lora=ranks)).model, SEQ_LEN)["lora"]
  later = (8 + 4) / 12  # of SEQ_LEN tokens, the fraction that steps 1 and 2 process
  assert make(down=3) == pytest.approx(2 * 2 * 3 * (28 + 20) * (1 + later))
  assert make(k=3) == pytest.approx(2 * 2 * 3 * (20 + 12))  # only the first step has keys


def test_vanilla_is_kaplans_formula():
  model = tiny.config(model=tiny.VANILLA).model
  per_layer = 2 * (960 + 480 + 1680) + 576
  assert flops.forward_flops_per_token(model, SEQ_LEN) == 8 * per_layer + HEAD


@pytest.mark.parametrize("sharing, layers", [
    ("cycle", 6), ("sequence", 6), ("middle_cycle", 8), ("middle_sequence", 8)])
def test_recursion_without_routing_costs_its_unrolled_layers(sharing, layers):
  model = dict(sharing=sharing, num_layers=layers, router=tiny.FIXED)
  shared = flops.forward_flops_per_token(tiny.config(model=model).model, SEQ_LEN)
  vanilla = dict(num_layers=layers)
  unrolled = tiny.config(dict(model=tiny.VANILLA), model=vanilla).model
  assert shared == flops.forward_flops_per_token(unrolled, SEQ_LEN)


@pytest.mark.parametrize("router, per_token", [
    (dict(), 3 * 20),
    (dict(arch="mlp"), 3 * (20 * 40 + 40)),
    (dict(arch="wide_mlp"), 3 * (20 * 80 + 80)),
    (dict(sampling="aux_router"), 2 * 3 * 20),
    (dict(arch="random", sampling="none"), 0),
    (tiny.TOKEN_CHOICE, 20 * 3),
    (tiny.TOKEN_CHOICE | dict(arch="mlp"), 20 * 40 + 40 * 3),
])
def test_routers(router, per_token):
  model = tiny.config(model=dict(router=router)).model
  assert flops.breakdown(model, SEQ_LEN)["router"] == 2 * per_token


def test_token_choice_counts_its_balanced_load_and_executes_its_buffer():
  router = tiny.TOKEN_CHOICE | dict(capacity=(1.0, 0.75, 0.5))
  model = tiny.config(model=dict(router=router)).model
  assert flops.breakdown(model, SEQ_LEN)["ffw"] == pytest.approx(FFW)
  # 12, 9 and 6 tokens: 4 + 2 * 3/4 + 2 * 1/2 = 6.5 layers
  assert flops.breakdown(model, SEQ_LEN, executed=True)["ffw"] == pytest.approx(2 * 6.5 * 1680)


CASES = {
    "vanilla": tiny.VANILLA,
    "fixed": dict(router=tiny.FIXED),
    "sequence": dict(sharing="middle_sequence", kv_plan="shared", router=tiny.FIXED),
    # Wider, since a GELU alone is 70 operations to XLA.
    "aux_router": dict(d_model=512, router=dict(sampling="aux_router", arch="mlp")),
    # Gathered token-choice is a conditional, of which XLA counts the masked branch.
    "token_choice": dict(execution="masked", router=tiny.TOKEN_CHOICE),
} | {f"{plan}-{execution}": dict(kv_plan=plan, execution=execution)
     for plan in plans.PLANS for execution in ("gathered", "masked")}


@pytest.mark.parametrize("case", CASES)
def test_executed_is_what_xla_counts(case):
  model = tiny.config(dict(model=WIDE), model=CASES[case]).model
  executed = flops.forward_flops_per_token(model, WIDE_SEQ_LEN, executed=True)
  assert _xla(model, _forward(model)) == pytest.approx(executed, rel=0.02)


def test_backward_costs_twice_the_forward():
  model = dataclasses.replace(tiny.config(model=WIDE).model, num_layers=5)
  forward = _forward(model)
  loss = lambda variables, tokens_BT: jnp.sum(forward(variables, tokens_BT)[0])
  executed = 3 * flops.forward_flops_per_token(model, WIDE_SEQ_LEN, executed=True)
  assert _xla(model, jax.value_and_grad(loss)) == pytest.approx(executed, rel=0.02)


def _forward(model):
  def forward(variables, tokens_BT):
    out = transformer.Transformer(model).apply(variables, tokens_BT)
    return transformer.unembed(variables["params"], out.hidden_BTD), out.sums
  return forward


def _xla(model, function):
  """FLOPs per token of the compiled function. XLA counts a scan's body once, so
  the layers must be unrolled."""
  tokens_BT = jax.ShapeDtypeStruct((2, WIDE_SEQ_LEN), jnp.int32)
  variables = jax.eval_shape(transformer.Transformer(model).init, jax.random.key(0), tokens_BT)
  compiled = jax.jit(function).lower(variables, tokens_BT).compile()
  return compiled.cost_analysis()["flops"] / (2 * WIDE_SEQ_LEN)
