"""Parameters, key/value bytes and FLOPs: by hand, of the model, by XLA and in the paper."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from configs import paper
from mor import config
from mor import costs
from mor.model import transformer
from mor.model.kv import plans
from tests.helpers import tiny

SEQ_LEN, BYTES = 12, 4
PAIR = 2 * 2 * 6 * BYTES  # keys and values of one layer and token: K=2, H=6

ROUTERS = {
    "fixed": tiny.FIXED,
    "expert": dict(),
    "expert_mlp_aux": dict(arch="mlp", sampling="aux_router"),
    "expert_wide": dict(arch="wide_mlp"),
    "expert_random": dict(arch="random", sampling="none"),
    "token": tiny.TOKEN_CHOICE,
    "token_wide_free": tiny.TOKEN_CHOICE | dict(arch="wide_mlp", balancing="loss_free"),
}
SHARING = {
    "vanilla": dict(sharing="vanilla", num_recursions=1),
    "cycle": dict(sharing="cycle", num_layers=6),
    "sequence": dict(sharing="sequence", num_layers=6),
    "middle_cycle": dict(sharing="middle_cycle"),
    "middle_sequence": dict(sharing="middle_sequence"),
}


@pytest.mark.parametrize("model", [
    pytest.param(sharing | dict(router=router), id=f"{s}-{r}")
    for s, sharing in SHARING.items() for r, router in ROUTERS.items()
    if s == "middle_cycle" or r == "fixed" or r == "expert"
])
def test_parameters_are_the_models(model):
  model = tiny.config(model=model).model
  tokens_BT = jnp.zeros((1, SEQ_LEN), jnp.int32)
  variables = jax.eval_shape(transformer.Transformer(model).init, jax.random.key(0), tokens_BT)
  params = variables["params"]
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  embedding = params["embedding"].size
  assert costs.parameter_count(model) == (embedding, total - embedding)


def _kv(seq_len=SEQ_LEN, **model):
  return costs.kv_bytes_per_token(tiny.config(model=model).model, seq_len, BYTES)


@pytest.mark.parametrize("kv_plan, slots", [
    ("recursion_wise", 2 + 2 * (1 + 2 / 3 + 1 / 3)),
    ("shared", 2 + 2),
    ("hybrid", 2 + 2 * (1 + 2 / 3 + 1 / 3)),
])
def test_bytes_of_two_edge_layers_and_three_steps_of_two(kv_plan, slots):
  assert _kv(kv_plan=kv_plan) == pytest.approx(PAIR * slots)
  assert _kv(kv_plan=kv_plan, router=tiny.TOKEN_CHOICE) == pytest.approx(PAIR * slots)


@pytest.mark.parametrize("r", [2, 3, 4])
def test_balanced_routing_against_plain_recursion(r):
  """Paper Table 2: (R+1)/2R of the recursion part, and 1/R when shared."""
  part = lambda **model: _kv(sharing="cycle", num_layers=12, num_recursions=r, **model)
  plain = part(router=tiny.FIXED)
  assert plain == PAIR * 12
  assert part() == pytest.approx(plain * (r + 1) / (2 * r))
  assert part(kv_plan="shared") == pytest.approx(plain / r)
  assert part(kv_plan="shared", router=tiny.FIXED) == pytest.approx(plain / r)


def test_capacity_counts_whole_tokens():
  assert costs.step_fractions(tiny.config().model, 10) == (1.0, 0.6, 0.3)
  low = tiny.config(model=dict(router=dict(capacity=(1.0, 0.01, 0.01)))).model
  assert costs.step_fractions(low, 10) == (1.0, 0.1, 0.1)


@pytest.mark.parametrize("kv_plan", plans.PLANS)
def test_keys_that_later_steps_read_are_kept_of_all_tokens(kv_plan):
  make = lambda first: _kv(kv_plan=kv_plan, router=dict(capacity=(first, 0.5, 0.25)))
  assert (make(0.5) == make(1.0)) == (kv_plan != "recursion_wise")


# D=20 N=4 K=2 H=6 F=28 V=61, T=12, 1 + 3 * 2 + 1 layers: query and output
# matrices have 960 entries, key and value 480, feed-forward 1680; a causal
# attention costs 2 * 12 * 24 = 576. Steps process 12, 8 and 4 tokens, so that
# the layers' processed fractions add up to 4 + 2 * 2/3 + 2 * 1/3 = 6 and their
# squares to 4 + 2 * (4 + 1) / 9 = 46/9.
FFW, HEAD, ROUTER_FLOPS = 2 * 6 * 1680, 2 * 61 * 20, 3 * 2 * 20

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
  parts = costs.breakdown(model, SEQ_LEN)
  assert parts == pytest.approx(dict(
      attention_projections=projections, attention=attention, ffw=FFW, lora=0.0, router=ROUTER_FLOPS, head=HEAD))
  total = projections + attention + FFW + ROUTER_FLOPS
  assert costs.forward_flops_per_token(model, SEQ_LEN, head=False) == pytest.approx(total)
  assert costs.forward_flops_per_token(model, SEQ_LEN) == pytest.approx(total + HEAD)
  assert costs.train_flops_per_token(model, SEQ_LEN) == pytest.approx(3 * (total + HEAD))


@pytest.mark.parametrize("kv_plan", plans.PLANS)
def test_a_step_whose_keys_are_read_later_runs_all_tokens(kv_plan):
  make = lambda first: costs.breakdown(tiny.config(
      model=dict(kv_plan=kv_plan, router=dict(capacity=(first, 0.5, 0.25)))).model, SEQ_LEN)
  assert (make(0.5) == make(1.0)) == (kv_plan != "recursion_wise")


def test_deltas_cost_their_entries_where_their_projection_runs():
  make = lambda **ranks: costs.breakdown(tiny.config(model=dict(kv_plan="shared", lora=ranks)).model, SEQ_LEN)["lora"]
  later = (8 + 4) / 12  # of SEQ_LEN tokens, the fraction that steps 1 and 2 process
  assert make(down=3) == pytest.approx(2 * 2 * 3 * (28 + 20) * (1 + later))
  assert make(k=3) == pytest.approx(2 * 2 * 3 * (20 + 12))  # only the first step has keys


def test_vanilla_is_kaplans_formula():
  model = tiny.config(model=tiny.VANILLA).model
  per_layer = 2 * (960 + 480 + 1680) + 576
  assert costs.forward_flops_per_token(model, SEQ_LEN) == 8 * per_layer + HEAD


@pytest.mark.parametrize("sharing, layers", [
    ("cycle", 6), ("sequence", 6), ("middle_cycle", 8), ("middle_sequence", 8)])
def test_recursion_without_routing_costs_its_unrolled_layers(sharing, layers):
  model = dict(sharing=sharing, num_layers=layers, router=tiny.FIXED)
  shared = costs.forward_flops_per_token(tiny.config(model=model).model, SEQ_LEN)
  vanilla = dict(num_layers=layers)
  unrolled = tiny.config(dict(model=tiny.VANILLA), model=vanilla).model
  assert shared == costs.forward_flops_per_token(unrolled, SEQ_LEN)


@pytest.mark.parametrize("router, per_token", [
    (dict(), 3 * 20),
    (dict(arch="mlp"), 3 * (20 * 40 + 40)),
    (dict(arch="wide_mlp"), 3 * (20 * 80 + 80)),
    (dict(sampling="aux_router"), 2 * 3 * 20),
    (dict(arch="random", sampling="none"), 0),
    (tiny.TOKEN_CHOICE, 20 * 3),
    (tiny.router("halting"), 20 + 1),
    (tiny.TOKEN_CHOICE | dict(arch="mlp"), 20 * 40 + 40 * 3),
])
def test_routers(router, per_token):
  model = tiny.config(model=dict(router=router)).model
  assert costs.breakdown(model, SEQ_LEN)["router"] == 2 * per_token


def test_token_choice_counts_its_balanced_load_and_executes_its_buffer():
  router = tiny.TOKEN_CHOICE | dict(capacity=(1.0, 0.75, 0.5))
  model = tiny.config(model=dict(router=router)).model
  assert costs.breakdown(model, SEQ_LEN)["ffw"] == pytest.approx(FFW)
  # 12, 9 and 6 tokens: 4 + 2 * 3/4 + 2 * 1/2 = 6.5 layers
  assert costs.breakdown(model, SEQ_LEN, executed=True)["ffw"] == pytest.approx(2 * 6.5 * 1680)


CASES = {
    "vanilla": tiny.VANILLA,
    "fixed": dict(router=tiny.FIXED),
    "sequence": dict(sharing="middle_sequence", kv_plan="shared", router=tiny.FIXED),
    # Wider, since a GELU alone is 70 operations to XLA.
    "aux_router": dict(d_model=512, router=dict(sampling="aux_router", arch="mlp")),
    # Gathered token-choice is a conditional, of which XLA counts the masked branch.
    "token_choice": dict(execution="masked", router=tiny.TOKEN_CHOICE),
    "halting": dict(router=tiny.router("halting")),
} | {f"{plan}-{execution}": dict(kv_plan=plan, execution=execution)
     for plan in plans.PLANS for execution in ("gathered", "masked")}


@pytest.mark.parametrize("case", CASES)
def test_executed_is_what_xla_counts(case):
  model = tiny.config(dict(model=WIDE), model=CASES[case]).model
  executed = costs.forward_flops_per_token(model, WIDE_SEQ_LEN, executed=True)
  assert _xla(model, _forward(model)) == pytest.approx(executed, rel=0.02)


def test_backward_costs_twice_the_forward():
  model = dataclasses.replace(tiny.config(model=WIDE).model, num_layers=5)
  forward = _forward(model)
  loss = lambda variables, tokens_BT: jnp.sum(forward(variables, tokens_BT)[0])
  executed = 3 * costs.forward_flops_per_token(model, WIDE_SEQ_LEN, executed=True)
  assert _xla(model, jax.value_and_grad(loss)) == pytest.approx(executed, rel=0.02)


@pytest.mark.parametrize("kv_plan", ["recursion_wise", "shared"])
def test_a_gradient_of_the_last_steps_costs_their_layers(kv_plan):
  fields = dict(WIDE, router=tiny.FIXED, kv_plan=kv_plan, num_layers=6, num_recursions=4)
  model = tiny.config(model=fields | dict(recursions_train=dict(backprop=1))).model
  forward = _forward(model)
  loss = lambda variables, tokens_BT: jnp.sum(forward(variables, tokens_BT)[0])
  executed = costs.forward_flops_per_token(model, WIDE_SEQ_LEN, executed=True) + 2 * sum(
      costs.breakdown(model, WIDE_SEQ_LEN, executed=True, differentiated=True).values())
  assert _xla(model, jax.value_and_grad(loss)) == pytest.approx(executed, rel=0.02)
  whole = tiny.config(model=fields).model
  assert costs.train_flops_per_token(whole, SEQ_LEN) == 3 * costs.forward_flops_per_token(whole, SEQ_LEN)
  assert costs.train_flops_per_token(model, SEQ_LEN) < costs.train_flops_per_token(whole, SEQ_LEN)


def test_a_soft_router_trains_every_step_and_decodes_its_load():
  make = lambda router: tiny.config(model=dict(router=router)).model
  halting, fixed = make(tiny.router("halting")), make(tiny.FIXED)
  ffw = lambda model, **how: costs.breakdown(model, SEQ_LEN, **how)["ffw"]
  assert ffw(halting, training=True) == ffw(fixed, training=True) == ffw(fixed) == 2 * 8 * 1680
  assert ffw(halting) == pytest.approx(FFW)
  assert costs.mean_forward_flops_per_token(halting, SEQ_LEN) > costs.forward_flops_per_token(halting, SEQ_LEN)


def test_a_drawn_number_of_steps_costs_its_mean():
  make = lambda steps, **train: tiny.config(model=dict(
      router=tiny.FIXED, num_layers=2 + steps, num_recursions=steps, recursions_train=train)).model
  model = make(3, distribution="uniform", values=(1, 2, 6))
  assert costs.mean_forward_flops_per_token(model, SEQ_LEN) == pytest.approx(costs.forward_flops_per_token(make(3), SEQ_LEN))
  assert costs.mean_forward_flops_per_token(make(3), SEQ_LEN) == costs.forward_flops_per_token(make(3), SEQ_LEN)


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


BUDGET = 16.5e18


def _report(name, budget=None):
  return costs.report(config.from_config_dict(paper.get_config(name)), budget)


@pytest.mark.parametrize("name, millions", [
    ("vanilla-135m", 106), ("vanilla-360m", 315), ("vanilla-730m", 654), ("vanilla-1.7b", 1611),
    ("recursive-360m-r2", 167), ("recursive-360m-r3", 118), ("recursive-360m-r4", 98),
    ("mor-360m-r2", 167), ("mor-360m-r3", 118), ("mor-360m-r4", 98),
])
def test_non_embedding_parameters(name, millions):
  assert round(_report(name)["params_non_embedding"] / 1e6) == millions


@pytest.mark.parametrize("size, millions", [
    ("135m", 28), ("360m", 47), ("730m", 75), ("1.7b", 101)])
def test_embedding_parameters(size, millions):
  assert _report(f"vanilla-{size}")["params_embedding"] / 1e6 == pytest.approx(millions, abs=0.55)


@pytest.mark.parametrize("name, steps", [
    ("mor-360m-r2", 12619), ("mor-360m-r3", 14161), ("mor-360m-r4", 14216),
    ("mor_token-360m-r3", 14161), ("mor-135m-r3", 36326),
])
def test_steps_of_the_budget(name, steps):
  assert _report(name, BUDGET)["steps"] == pytest.approx(steps, rel=0.005)


@pytest.mark.parametrize("name, steps", [
    ("vanilla-360m", 9438), ("recursive-360m-r2", 9438), ("recursive-360m-r3", 9438),
    ("recursive-360m-r4", 8883),
])
def test_steps_without_routing_are_exact(name, steps):
  assert _report(name, BUDGET)["steps"] == steps


@pytest.mark.parametrize("name, billions", [
    ("vanilla-135m", 53.3), ("recursive-135m-r3", 50.0),
    ("vanilla-730m", 10.1), ("recursive-730m-r3", 10.1), ("mor-730m-r3", 14.9),
])
def test_tokens_of_the_budget(name, billions):
  """Paper Table 9, read to 1 %; its 1.7B tokens are 10 % more than ours."""
  tokens = _report(name, BUDGET)["steps"] * 1024 * 2048
  assert tokens / 1e9 == pytest.approx(billions, rel=0.011)


def test_budget_scales_the_steps_and_seq_len_does_not():
  fields = paper.get_config("vanilla-360m")
  fields.data.seq_len = 512
  assert costs.report(config.from_config_dict(fields), 2 * BUDGET)["steps"] == 2 * 9438


def test_report_is_json_with_the_promised_keys():
  report = json.loads(json.dumps(_report("mor-360m-r3")))
  assert set(report) == {"params_embedding", "params_non_embedding", "flops_per_token_forward",
                         "flops_per_token_forward_no_head", "kv_bytes_per_token"}
  head = report["flops_per_token_forward"] - report["flops_per_token_forward_no_head"]
  assert head == 2 * 49152 * 960


def test_kv_bytes_follow_the_compute_dtype():
  make = lambda dtype: costs.report(tiny.config(model=dict(compute_dtype=dtype)))["kv_bytes_per_token"]
  assert make("bfloat16") == make("float32") / 2


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_bad_budget_is_named(budget):
  with pytest.raises(ValueError, match=f"budget={budget:g} FLOPs; use a positive"):
    costs.report(tiny.config(), budget)


def test_a_relaxed_model_has_a_budget_too():
  """Its deltas cost FLOPs, so the same budget pays for fewer steps."""
  plain = dict(sharing="cycle", num_layers=6, num_recursions=2, router=tiny.FIXED)
  steps = lambda **ranks: costs.report(tiny.config(model=plain | dict(lora=ranks)), BUDGET)["steps"]
  assert steps(q=4, down=4) < steps()
