"""The exported model with tools of its ecosystem: compiled, exported, drafted for, checkpointed, adapted."""

import copy

import pytest
import torch
import transformers

from tests.helpers import exported
from tests.helpers import tiny

modeling_mor = exported.load_modeling()

TOKEN = tiny.TOKEN_CHOICE | dict(alpha=2.0)
CASES = {
    "small": dict(sharing="cycle", num_layers=2, num_recursions=2, kv_plan="hybrid", router=dict(sampling="aux_router")),
    "expert, hybrid": dict(kv_plan="hybrid", router=dict(gating="additive", sampling="aux_router", temperature=2.0)),
    "expert": dict(),
    "token, shared": dict(kv_plan="shared", router=TOKEN | dict(gating="every_step", activation="sigmoid")),
    "middle, lora": dict(sharing="middle_cycle", num_layers=6, num_recursions=2, router=tiny.FIXED,
                         lora=exported.RANKS),
}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
  """A folder, and a model loaded from it."""
  folder = tmp_path_factory.mktemp("exported") / "model"
  exported.make(folder, **CASES[request.param])
  return folder, modeling_mor.MorForCausalLM.from_pretrained(folder)


def cases(*quick: str):
  """All cases, of which only some are quick."""
  return pytest.mark.parametrize(
      "case", [name if name in quick else pytest.param(name, marks=slow) for name in CASES], indirect=True)


def draw_tokens(rows: int, width: int, seed: int = 0) -> torch.Tensor:
  return torch.randint(0, 61, (rows, width), generator=torch.Generator().manual_seed(seed))


def assert_same(got, expected):
  assert torch.equal(got.depths, expected.depths)
  torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5 * float(expected.logits.abs().max()))


@cases("small")
@torch.no_grad()
def test_it_compiles_without_a_graph_break(case):
  """Whole, with padding, and one cached token."""
  _, model = case
  torch.compiler.reset()
  compiled = torch.compile(model, fullgraph=True, backend="eager")
  tokens_BT, mask_BT = draw_tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
  mask_BT[1, :4] = 0
  expected, got = (run(tokens_BT, attention_mask=mask_BT, use_cache=True) for run in (model, compiled))
  assert_same(got, expected)
  mask_BT = torch.cat([mask_BT, mask_BT[:, :1] * 0 + 1], 1)
  assert_same(*(run(tokens_BT[:, :1], attention_mask=mask_BT, past_key_values=out.past_key_values)
                for run, out in ((compiled, got), (model, expected))))


@slow
@cases("expert")
def test_it_trains_compiled(case):
  """With the compiler's own backend: gradients of every parameter are those without."""
  _, model = case
  tokens_BT, gradients = draw_tokens(2, 9), []
  for run in (model, torch.compile(model, fullgraph=True)):
    model.zero_grad()
    run(tokens_BT, labels=tokens_BT).loss.backward()
    gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
  model.zero_grad()
  torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


@cases("small")
@torch.no_grad()
def test_torch_exports_it_for_any_length(case):
  _, model = case
  length = torch.export.Dim("length", min=2, max=exported.CONTEXT)
  program = torch.export.export(model, (), dict(input_ids=draw_tokens(2, 9)), dynamic_shapes=dict(input_ids={1: length}))
  for width in (2, 9, 31):
    tokens_BT = draw_tokens(2, width, seed=1)
    assert_same(program.module()(input_ids=tokens_BT), model(tokens_BT))
  with pytest.raises(ValueError, match="torch.export cannot return a MorCache; give use_cache=False"):
    torch.export.export(model, (tokens_BT,), dict(use_cache=True))


@cases("small", "token, shared")
@torch.no_grad()
def test_a_cropped_cache_is_what_it_was(case):
  """Whatever was written behind the cut."""
  _, model = case
  tokens_BT, other_BT = draw_tokens(2, 9), draw_tokens(2, 70, seed=1)
  for execution in ("gathered", "masked"):
    model.config.execution = execution
    cache = model(tokens_BT[:, :5], use_cache=True).past_key_values
    expected = model(tokens_BT[:, 5:], past_key_values=copy.deepcopy(cache))
    for cut in (-70, 5):  # as new and as old versions of transformers count
      model(other_BT, past_key_values=cache)
      cache.crop(cut)
      assert cache.get_seq_length() == 5
      got = model(tokens_BT[:, 5:], past_key_values=copy.deepcopy(cache))
      assert torch.equal(got.logits, expected.logits) and torch.equal(got.depths, expected.depths)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(tokens_BT[:, :5], past_key_values=cache).logits, model(tokens_BT[:, :5]).logits)
  model.config.execution = "gathered"


@cases("small", "token, shared")
@torch.no_grad()
def test_drafts_change_no_token(case):
  _, model = case
  options = dict(max_new_tokens=16, do_sample=False, eos_token_id=None)
  prompt_BT = draw_tokens(1, 7)
  plain = model.generate(prompt_BT, **options)
  assistant = copy.deepcopy(model)
  for parameter in assistant.model.stack.parameters():
    parameter.mul_(0.8)  # often right, not always
  assert plain.tolist() == model.generate(prompt_BT, assistant_model=assistant, **options).tolist()
  assert plain.tolist() == model.generate(prompt_BT, assistant_model=model, **options).tolist()
  repeated_BT = torch.cat([plain, plain[:, :9]], 1)
  assert (model.generate(repeated_BT, prompt_lookup_num_tokens=3, **options).tolist()
          == model.generate(repeated_BT, **options).tolist())


@cases("small", "token, shared")
def test_layers_run_again_give_the_same_gradients(case):
  _, model = case
  tokens_BT, gradients, losses = draw_tokens(2, 9), [], []
  model.train()
  for again in (False, True):
    if again:
      model.gradient_checkpointing_enable()
    for execution in ("gathered", "masked"):
      model.config.execution = execution
      model.zero_grad()
      out = model(tokens_BT, labels=tokens_BT)
      assert again == (out.past_key_values is None)
      out.loss.backward()
      losses.append(out.loss)
      gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
  with pytest.raises(ValueError, match="gradient checkpointing runs whole texts"):
    model(tokens_BT, past_key_values=modeling_mor.MorCache(model.config))
  model.gradient_checkpointing_disable()
  model.eval().zero_grad()
  model.config.execution = "gathered"
  for other in gradients[1:]:
    torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)
  assert len({round(loss.item(), 4) for loss in losses}) == 1


@cases("expert", "middle, lora")
@torch.no_grad()
def test_states_between_steps(case):
  """The first is the embedding, the last the normed state; a token that left keeps its state."""
  _, model = case
  tokens_BT = draw_tokens(2, 9)
  got = model(tokens_BT, output_hidden_states=True)
  states, edge = got.hidden_states, model.config.edge()
  assert len(states) == model.config.num_recursions + 1 + 2 * edge
  assert torch.equal(states[0], model.get_input_embeddings()(tokens_BT))
  assert torch.equal(model.lm_head(states[-1]), got.logits)
  for step in range(model.config.num_recursions - 1):
    left_BT = got.depths <= step
    assert torch.equal(states[step + edge + 1][left_BT], states[step + edge][left_BT])
  assert model(tokens_BT).hidden_states is None


@cases("expert", "middle, lora")
@torch.no_grad()
def test_auto_classes_load_it(case, tmp_path):
  """The model without its head as well, and again after `save_pretrained`."""
  folder, model = case
  tokens_BT = draw_tokens(2, 9)
  expected = model(tokens_BT, output_hidden_states=True)
  whole = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, execution="masked")
  assert whole.config.execution == "masked"
  assert_same(whole(tokens_BT), expected)
  whole.save_pretrained(tmp_path / "again")
  for place in (folder, tmp_path / "again"):
    bare, told = transformers.AutoModel.from_pretrained(place, trust_remote_code=True, output_loading_info=True)
    assert type(bare).__name__ == "MorModel" and not told["missing_keys"]
    torch.testing.assert_close(bare(tokens_BT).last_hidden_state, expected.hidden_states[-1], rtol=0, atol=1e-5)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
  assert_same(again(tokens_BT), expected)


@cases("middle, lora")
def test_only_projections_are_called_so(case):
  """PEFT adapts modules by the end of their name."""
  _, model = case
  named = {name: module for name, module in model.named_modules() if name.endswith("_proj")}
  assert len(named) == 7 * sum(type(module) is modeling_mor.MorLayer for module in model.modules())
  assert all(type(module) is torch.nn.Linear for module in named.values())


@cases("expert")
@torch.no_grad()
def test_return_dict(case):
  """None is the default of the config, as PEFT gives it."""
  _, model = case
  tokens_BT = draw_tokens(2, 9)
  expected = model(tokens_BT).logits
  assert torch.equal(model(tokens_BT, return_dict=None).logits, expected)
  assert torch.equal(model(tokens_BT, return_dict=False)[0], expected)


@cases("expert")
@torch.no_grad()
def test_half_precision(case):
  _, model = case
  tokens_BT = draw_tokens(2, 9)
  for dtype in (torch.float16, torch.bfloat16):
    half = copy.deepcopy(model).to(dtype)
    for execution in ("gathered", "masked"):
      half.config.execution = execution
      assert torch.isfinite(half(tokens_BT).logits).all()
      assert half.generate(tokens_BT, max_new_tokens=3, do_sample=False).shape == (2, 12)


@slow
@cases(*CASES)
def test_peft_trains_it(case):
  peft = pytest.importorskip("peft")
  _, model = case
  adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(
      r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
  optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
  tokens_BT, losses = draw_tokens(2, 12), []
  for _ in range(8):
    loss = adapted(input_ids=tokens_BT, labels=tokens_BT).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
  assert losses[-1] < losses[0] - 0.1, losses
