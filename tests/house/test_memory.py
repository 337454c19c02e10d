"""Parameters against the model's own tree, key/value bytes against Table 2."""

import jax
import jax.numpy as jnp
import pytest

from mor import memory
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
  assert memory.parameter_count(model) == (embedding, total - embedding)


def _kv(seq_len=SEQ_LEN, **model):
  return memory.kv_bytes_per_token(tiny.config(model=model).model, seq_len, BYTES)


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
  assert memory.step_fractions(tiny.config().model, 10) == (1.0, 0.6, 0.3)
  low = tiny.config(model=dict(router=dict(capacity=(1.0, 0.01, 0.01)))).model
  assert memory.step_fractions(low, 10) == (1.0, 0.1, 0.1)


@pytest.mark.parametrize("kv_plan", plans.PLANS)
def test_keys_that_later_steps_read_are_kept_of_all_tokens(kv_plan):
  make = lambda first: _kv(kv_plan=kv_plan, router=dict(capacity=(first, 0.5, 0.25)))
  assert (make(0.5) == make(1.0)) == (kv_plan != "recursion_wise")
