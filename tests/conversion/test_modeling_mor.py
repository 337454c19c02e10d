"""The exported PyTorch model computes what ours does, whole or cached, padded or not."""

import contextlib

import numpy as np
import pytest
import torch
import transformers

from mor.model import transformer
from tests.helpers import exported
from tests.helpers import tiny

modeling_mor = exported.load_modeling()

WIDTH, LENGTHS = 12, (12, 9, 5)
TOKEN = tiny.TOKEN_CHOICE | dict(alpha=2.0)
LOSS_FREE = dict(balancing="loss_free")
CASES = {
    "vanilla": tiny.VANILLA | dict(num_layers=2),
    "untied, theta, eps": tiny.VANILLA | dict(num_layers=2, tie_embeddings=False, rope_theta=100.0, norm_eps=0.1),
    "rope scaling": tiny.VANILLA | dict(num_layers=2, rope_scaling=dict(
        factor=4.0, low_freq_factor=0.5, high_freq_factor=1.5, original_context=9)),
    "cycle": dict(sharing="cycle", num_layers=4, num_recursions=2, router=tiny.FIXED),
    "sequence, shared": dict(sharing="sequence", num_layers=4, num_recursions=2, router=tiny.FIXED, kv_plan="shared"),
    "middle_sequence, hybrid": dict(sharing="middle_sequence", num_layers=6, num_recursions=2, router=tiny.FIXED,
                                    kv_plan="hybrid"),
    "cycle, shared": dict(sharing="cycle", num_layers=4, num_recursions=2, router=tiny.FIXED, kv_plan="shared"),
    "lora": dict(sharing="sequence", num_layers=4, num_recursions=2, router=tiny.FIXED, lora=exported.RANKS),
    "lora, routed": dict(num_layers=6, num_recursions=2, lora=dict(q=3, down=2)),
    "expert": dict(),
    "expert, sequence": dict(sharing="middle_sequence", num_layers=6, num_recursions=2, router=dict(arch="mlp")),
    "expert, shared": dict(kv_plan="shared", router=dict(gating="residual", activation="tanh", arch="wide_mlp")),
    "expert, hybrid": dict(kv_plan="hybrid", router=dict(gating="additive", sampling="aux_router", temperature=2.0)),
    "expert, capacity": dict(router=dict(activation="none", capacity=(1.0, 1.0, 0.5), sampling="none")),
    "token": dict(router=TOKEN),
    "token, sequence": dict(sharing="sequence", num_layers=6, router=TOKEN | dict(arch="mlp")),
    "token, shared": dict(kv_plan="shared", router=TOKEN | dict(gating="every_step", activation="sigmoid") | LOSS_FREE),
    "token, hybrid": dict(kv_plan="hybrid", router=TOKEN | dict(gating="residual", temperature=0.5)),
    "token, additive": dict(router=TOKEN | dict(gating="additive", arch="wide_mlp")),
}


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
  """A case, and its model in PyTorch."""
  case = exported.make(tmp_path_factory.mktemp("exported") / "model", **CASES[request.param])
  return case, modeling_mor.MorForCausalLM.from_pretrained(case.folder)


all_cases = pytest.mark.parametrize("case", CASES, indirect=True)
some_cases = pytest.mark.parametrize("case", ["lora, routed", "expert, hybrid", "token, shared"], indirect=True)


def draw_tokens() -> np.ndarray:
  return np.random.default_rng(0).integers(0, 61, (len(LENGTHS), WIDTH)).astype(np.int32)


def pad(tokens_BT: np.ndarray, side: str, pad_id: int = 0) -> dict[str, torch.Tensor]:
  """Each row cut to its length and padded."""
  ids_BT, mask_BT = np.full_like(tokens_BT, pad_id), np.zeros_like(tokens_BT)
  for row, length in enumerate(LENGTHS):
    place = slice(length) if side == "right" else slice(WIDTH - length, WIDTH)
    ids_BT[row, place], mask_BT[row, place] = tokens_BT[row, :length], 1
  return dict(input_ids=torch.tensor(ids_BT).long(), attention_mask=torch.tensor(mask_BT))


def unpad(x_BT, side: str) -> np.ndarray:
  """Tokens of all rows, flat."""
  rows = [row[:n] if side == "right" else row[WIDTH - n:] for row, n in zip(x_BT.detach().numpy(), LENGTHS)]
  return np.concatenate(rows)


def forward(case: exported.Case) -> tuple[np.ndarray, np.ndarray]:
  """Our logits and depths of right-padded rows, flat."""
  segment_BT = (np.arange(WIDTH)[None, :] < np.array(LENGTHS)[:, None]).astype(np.int32)
  out = transformer.Transformer(case.config).apply(case.variables, draw_tokens(), segment_BT, routing="decide")
  logits_BTV = transformer.unembed(case.variables["params"], out.hidden_BTD)
  depth_BT = np.asarray(out.keep_RBT).sum(0)
  return np.asarray(logits_BTV)[segment_BT > 0], depth_BT[segment_BT > 0]


@contextlib.contextmanager
def executed(model, execution: str):
  """Runs the model so for a while."""
  model.config.execution = execution
  try:
    yield
  finally:
    model.config.execution = "gathered"


def generate(model, inputs, **options) -> list[list[int]]:
  """New tokens of each row."""
  torch.manual_seed(0)
  options = dict(max_new_tokens=8, do_sample=False) | options
  return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1]:].tolist()


@all_cases
def test_forward_is_ours(case):
  case, model = case
  logits_MV, depth_M = forward(case)
  if case.config.router.name != "fixed":
    assert len(set(depth_M)) > 1, "the routers do not split the tokens; draw others"
  for side, execution in [("right", "gathered"), ("left", "gathered"), ("right", "masked"), ("left", "masked")]:
    with torch.no_grad(), executed(model, execution):
      got = model(**pad(draw_tokens(), side))
    np.testing.assert_array_equal(unpad(got.depths, side), depth_M)
    np.testing.assert_allclose(unpad(got.logits, side), logits_MV, rtol=0, atol=1e-5 * np.abs(logits_MV).max())


@all_cases
@pytest.mark.parametrize("executions", [("gathered",), ("masked",), ("masked", "gathered")], ids="-".join)
@torch.no_grad()
def test_cached_steps_are_the_forward(case, executions):
  _, model = case
  inputs = pad(draw_tokens(), "left")
  whole = model(**inputs)
  cache, at, logits, depths = None, 0, [], []
  for i, width in enumerate((5, 1, 1, 3, 1, 1)):  # row 2 is padding in the first chunk
    at += width
    with executed(model, executions[i % len(executions)]):
      got = model(inputs["input_ids"][:, at - width:at], attention_mask=inputs["attention_mask"][:, :at],
                  past_key_values=cache, use_cache=True)
    cache = got.past_key_values
    logits.append(got.logits)
    depths.append(got.depths)
  np.testing.assert_array_equal(torch.cat(depths, 1), whole.depths)
  logits_MV = unpad(whole.logits, "left")
  np.testing.assert_allclose(unpad(torch.cat(logits, 1), "left"), logits_MV, rtol=0,
                             atol=1e-5 * np.abs(logits_MV).max())


@some_cases
@torch.no_grad()
def test_cache_remembers_the_padding(case):
  _, model = case
  inputs = pad(draw_tokens(), "left")
  first = model(inputs["input_ids"][:, :9], attention_mask=inputs["attention_mask"][:, :9], use_cache=True)
  got = model(inputs["input_ids"][:, 9:], past_key_values=first.past_key_values)
  torch.testing.assert_close(got.logits, model(**inputs).logits[:, 9:], rtol=0, atol=1e-4)


@some_cases
@torch.no_grad()
def test_tokens_that_left_are_not_run(case):
  case, model = case
  ran = []
  count = lambda module, args: ran.append(len(args[0]))
  hooks = [layer.register_forward_pre_hook(count) for layer in model.model.stack]
  inputs = pad(draw_tokens(), "left")
  first = model(input_ids=inputs["input_ids"][:, :9], attention_mask=inputs["attention_mask"][:, :9], use_cache=True)
  depths, ran_in_prefill = first.depths, sum(ran)
  ran.clear()
  for at in range(9, WIDTH):
    got = model(inputs["input_ids"][:, at:at + 1], attention_mask=inputs["attention_mask"][:, :at + 1],
                past_key_values=first.past_key_values)
    depths = torch.cat([depths, got.depths], 1)
  for hook in hooks:
    hook.remove()
  # A step that shares its keys runs every token first.
  steps = torch.clamp(depths, min=int(case.config.kv_plan != "recursion_wise")) * inputs["attention_mask"]
  per_step = len(model.config.steps()[0])
  assert ran_in_prefill == per_step * steps[:, :9].sum()
  assert sum(ran) == per_step * steps[:, 9:].sum()


@some_cases
@torch.no_grad()
def test_padding_changes_nothing(case):
  _, model = case
  tokens_BT = draw_tokens()
  logits_MV = unpad(model(**pad(tokens_BT, "left")).logits, "left")
  np.testing.assert_array_equal(unpad(model(**pad(tokens_BT, "left", pad_id=7)).logits, "left"), logits_MV)
  inputs = pad(tokens_BT, "left")
  inputs = {name: torch.cat([x, torch.zeros_like(x[:1])]) for name, x in inputs.items()}  # a row of padding alone
  got = model(**inputs)
  assert torch.isfinite(got.logits).all() and not got.depths[-1].any()
  np.testing.assert_allclose(unpad(got.logits, "left"), logits_MV, rtol=0, atol=1e-5 * np.abs(logits_MV).max())
  spread = torch.arange(WIDTH) + 2 * (torch.arange(WIDTH) >= 4)  # a hole behind the fourth column
  holes = {name: torch.zeros_like(x[:1, :1]).repeat(1, WIDTH + 2).index_copy(1, spread, x[:1])
           for name, x in inputs.items()}
  torch.testing.assert_close(model(**holes).logits[:, spread], got.logits[:1], rtol=0, atol=1e-5)
  empty = model(inputs["input_ids"][-1:], attention_mask=inputs["attention_mask"][-1:])
  assert torch.isfinite(empty.logits).all()


@some_cases
def test_generate_uses_the_cache_as_it_would_not(case):
  _, model = case
  inputs = pad(draw_tokens(), "left")
  for options in (dict(), dict(do_sample=True), dict(num_beams=3), dict(do_sample=True, num_return_sequences=2)):
    assert generate(model, inputs, **options) == generate(model, inputs, use_cache=False, **options), options
  assert generate(model, inputs, prefill_chunk_size=4) == generate(model, inputs)


@some_cases
def test_loss_and_gradients(case):
  _, model = case
  inputs = pad(draw_tokens(), "right")
  labels_BT = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
  got = model(**inputs, labels=labels_BT)
  nll_BT = torch.nn.functional.cross_entropy(got.logits[:, :-1].transpose(1, 2), labels_BT[:, 1:], reduction="none")
  expected = nll_BT.sum() / (labels_BT[:, 1:] >= 0).sum()
  torch.testing.assert_close(got.loss, expected)
  got.loss.backward()
  gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
  assert all(torch.isfinite(g).all() for g in gradients.values())
  assert gradients["model.stack.0.self_attn.k_proj.weight"].abs().max() > 0
  model.zero_grad()


@some_cases
@torch.no_grad()
def test_bfloat16_routes_in_float32(case, tmp_path):
  case, model = case
  exported.write(tmp_path / "half", case.config, case.variables, dtype="bfloat16")
  half = modeling_mor.MorForCausalLM.from_pretrained(tmp_path / "half")
  types = {name: p.dtype for name, p in half.named_parameters()}
  assert all((kind == torch.float32) == ("router" in name) for name, kind in types.items()), types
  inputs = pad(draw_tokens(), "left")
  assert torch.isfinite(half(**inputs).logits).all()
  assert len(generate(half, inputs)[0]) == 8


@pytest.mark.parametrize("case", ["vanilla"], indirect=True)
@torch.no_grad()
def test_bfloat16_is_near_float32(case, tmp_path):
  case, model = case
  inputs = pad(draw_tokens(), "right")
  logits_MV = unpad(model(**inputs).logits, "right")
  exported.write(tmp_path / "half", case.config, case.variables, dtype="bfloat16")
  half_MV = unpad(modeling_mor.MorForCausalLM.from_pretrained(tmp_path / "half")(**inputs).logits, "right")
  error = np.sqrt(np.mean((half_MV - logits_MV)**2) / np.mean(logits_MV**2))
  assert 1e-4 < error < 2e-2, error


@pytest.mark.parametrize("case", ["lora, routed", "untied, theta, eps", "token, shared"], indirect=True)
@torch.no_grad()
def test_saved_again_it_is_the_same(case, tmp_path):
  _, model = case
  tied = model.lm_head.weight is model.model.embed_tokens.weight
  assert tied == model.config.tie_word_embeddings
  model.save_pretrained(tmp_path)
  again = modeling_mor.MorForCausalLM.from_pretrained(tmp_path)
  state, expected = again.state_dict(), model.state_dict()
  assert state.keys() == expected.keys()
  assert all(torch.equal(state[name], expected[name]) for name in state)
  inputs = pad(draw_tokens(), "left")
  assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("case", ["expert"], indirect=True)
def test_refusals(case):
  _, model = case
  inputs = pad(draw_tokens(), "left")
  with pytest.raises(ValueError, match="a DynamicCache; give a MorCache"):
    model(**inputs, past_key_values=transformers.DynamicCache())
  with pytest.raises(ValueError, match=r"shape \(3, 11\); give \[rows, past \+ new columns\], here \(3, 12\)"):
    model(inputs["input_ids"], attention_mask=inputs["attention_mask"][:, 1:])
  with pytest.raises(ValueError, match="output_attentions=True: attention weights are never formed"):
    model(**inputs, output_attentions=True)
  with pytest.raises(ValueError, match="cache_implementation='static'"):
    model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
  with pytest.raises(ValueError, match="give input_ids or inputs_embeds, one of them"):
    model(**inputs, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
  with executed(model, "fused"), pytest.raises(ValueError, match="execution='fused'; use one of gathered, masked"):
    model(**inputs)
  with pytest.raises(ValueError, match="holds keys of a MorModel only"):
    modeling_mor.MorCache(model.config).update(None, None, 0)
  with pytest.raises(ValueError, match="use_reentrant=True loses gradients"):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=True))
