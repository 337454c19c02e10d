"""Early exit of transformers: our tokens, and the passes that its drafts must take."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import hf_early_exit
from mor.conversion import hf_export
from mor.serve import model as model_lib
from tests.helpers import tiny
from tests.helpers import weights

MODEL = tiny.config(model=tiny.VANILLA | dict(
    num_layers=4, rope_theta=300.0, norm_eps=1e-3, compute_dtype="float32", tie_embeddings=False)).model
PROMPTS = [[5, 17, 3, 44], [60], [9, 9, 2, 31, 7, 7]]
CONTEXT, NUM_TOKENS = 40, 16
DRAFTS = [hf_early_exit.Draft(layer, num) for layer in (1, 2, 3) for num in (1, 2, 5)]


def params(num_layers=MODEL.num_layers):
  """Of the model that ends after some layers, each of which adds less than the one before: exits agree now and then."""
  drawn = weights.draw(MODEL)
  scale_L = 0.5 ** np.arange(MODEL.num_layers, dtype=np.float32)
  drawn["stack"]["attention"]["o"] *= scale_L[:, None, None, None]
  drawn["stack"]["ffw"]["down"] *= scale_L[:, None, None]
  return drawn | dict(stack=jax.tree.map(lambda a: a[:num_layers], drawn["stack"]))


def load(folder, num_layers=MODEL.num_layers):
  for package in ("torch", "transformers"):
    pytest.importorskip(package)
  model = dataclasses.replace(MODEL, num_layers=num_layers)
  hf_export.write_llama(folder, model, {"params": params(num_layers)}, tokenizer=None, chat_template=None,
                        context=CONTEXT, dtype="float32", special_ids=dict(eos=(3,)))
  return hf_early_exit.EarlyExit(folder, threads=1)


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
  return load(tmp_path_factory.mktemp("exit") / "llama")


@pytest.fixture(scope="module")
def full(peer):
  return [peer.generate(prompt, NUM_TOKENS) for prompt in PROMPTS]


def test_tokens_are_ours(full):
  ours = model_lib.Model(MODEL, {"params": params()}, None, CONTEXT).generate(
      PROMPTS, max_tokens=NUM_TOKENS, temperature=0.0)
  assert len({token for outcome in full for token in outcome.tokens}) > NUM_TOKENS, "too few to tell engines apart"
  for mine, outcome in zip(ours, full):
    assert outcome.tokens == mine.tokens
    assert (outcome.deep_passes, outcome.draft_passes, outcome.tokens_per_deep_pass) == (NUM_TOKENS, 0, 1)
    assert outcome.seconds > 0


def passes(tokens, prompt, shallow, num_tokens):
  """Deep and draft passes of a text whose drafts are those of a model without the deep layers; drafts confirmed."""
  deep, drafted, confirmed, done = 0, 0, 0, 0
  while done < len(tokens):
    num = min(num_tokens, len(tokens) - done - 1)  # the deep pass adds one
    draft = shallow.generate(prompt + tokens[:done], num).tokens if num else []
    same = int(np.cumprod(np.equal(draft, tokens[done:done + num])).sum())
    deep, drafted, confirmed, done = deep + 1, drafted + num, confirmed + same, done + same + 1
  return deep, drafted, confirmed


@pytest.mark.parametrize("layer", (1, 2, 3))
def test_drafts_are_those_of_the_first_layers(peer, full, layer, tmp_path):
  """With the final norm and head after them; and `num_tokens` holds."""
  shallow, all_drafted, all_confirmed = load(tmp_path / "llama", layer), 0, 0
  for draft in (d for d in DRAFTS if d.layer == layer):
    for prompt, expected in zip(PROMPTS, full):
      got = peer.generate(prompt, NUM_TOKENS, draft=draft)
      assert got.tokens == expected.tokens
      deep, drafted, confirmed = passes(expected.tokens, prompt, shallow, draft.num_tokens)
      assert (got.deep_passes, got.draft_passes) == (deep, drafted)
      assert got.tokens_per_deep_pass == NUM_TOKENS / deep
      all_drafted, all_confirmed = all_drafted + drafted, all_confirmed + confirmed
  assert 0 < all_confirmed < all_drafted, "drafts must be right now and then"


def test_confidence_ends_drafts(peer, full):
  """No token is certain; so 1 drafts one at a time, and less drafts longer."""
  for prompt, expected in zip(PROMPTS, full):
    by_confidence = [peer.generate(prompt, NUM_TOKENS, draft=hf_early_exit.Draft(3, 4, c)) for c in (0.0, 0.6, 1.0)]
    assert all(outcome.tokens == expected.tokens for outcome in by_confidence)
    one = peer.generate(prompt, NUM_TOKENS, draft=hf_early_exit.Draft(3, 1))
    assert dataclasses.replace(by_confidence[2], seconds=0) == dataclasses.replace(one, seconds=0)
    assert by_confidence[0].deep_passes <= by_confidence[1].deep_passes <= by_confidence[2].deep_passes
  drafted = [peer.generate(PROMPTS[0], NUM_TOKENS, draft=hf_early_exit.Draft(3, 4, c)).draft_passes
             for c in (0.0, 0.6, 1.0)]
  assert len(set(drafted)) == 3


@pytest.mark.parametrize("draft", [None, *DRAFTS[::3]], ids=str)
def test_stop_tokens_end_the_text(peer, full, draft):
  """And nothing else does: not the folder's token that ends a text."""
  for prompt, expected in zip(PROMPTS, full):
    stop = expected.tokens[5]
    length = expected.tokens.index(stop) + 1
    got = peer.generate(prompt, NUM_TOKENS, draft=draft, stop_tokens=(stop, 3))
    length = min([length, *(i + 1 for i, token in enumerate(expected.tokens) if token == 3)])
    assert got.tokens == expected.tokens[:length]
  prompt, eos = PROMPTS[0], full[0].tokens[2]
  peer._model.generation_config.eos_token_id = eos  # as a folder may say
  assert peer.generate(prompt, NUM_TOKENS, draft=draft).tokens == full[0].tokens


def test_a_failed_draft_leaves_the_depth(peer, full, monkeypatch):
  def fail(*args, **kwargs):
    raise RuntimeError("out of memory")
  with monkeypatch.context() as patch:
    patch.setattr(peer._model.lm_head, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
      peer.generate(PROMPTS[0], 4, draft=hf_early_exit.Draft(2))
  again = peer.generate(PROMPTS[0], NUM_TOKENS)
  assert dataclasses.replace(again, seconds=0) == dataclasses.replace(full[0], seconds=0)
  assert not any(layer._forward_hooks for layer in peer._model.model.layers), "counters stay behind"


def test_bad_requests_are_refused(peer):
  draft = hf_early_exit.Draft
  for options, message in [
      (dict(prompt=[]), "the prompt is empty"), (dict(num_tokens=0), "num_tokens=0"),
      (dict(draft=draft(0)), "draft.layer=0 of a model of 4 layers; use 1 to 3"),
      (dict(draft=draft(4)), "draft.layer=4"), (dict(draft=draft(2, 0)), "draft.num_tokens=0"),
      (dict(draft=draft(2, 1, 1.5)), "draft.confidence=1.5")]:
    with pytest.raises(ValueError, match=message):
      peer.generate(**dict(prompt=[1], num_tokens=2) | options)


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
  monkeypatch.setattr(hf_early_exit.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs torch, transformers; pip install 'mor\[torch\]'"):
    hf_early_exit.EarlyExit(tmp_path)


def test_only_plain_llamas_are_loaded(tmp_path):
  transformers = pytest.importorskip("transformers")
  transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="model_type 'gpt2'; export a plain Llama"):
    hf_early_exit.EarlyExit(tmp_path)
