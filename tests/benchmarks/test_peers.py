"""Other engines decode our weights to our tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from mor.model import transformer
from tests.helpers import tiny
from tests.helpers import weights

MODEL = tiny.config(model=tiny.VANILLA | dict(
    num_layers=3, rope_theta=300.0, norm_eps=1e-3, compute_dtype="float32")).model
PROMPTS = np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, 7)).tolist()
NUM_TOKENS = 6


def make(name, directory, model=MODEL):
  for package in peers.PEERS[name][2]:
    pytest.importorskip(package)
  return peers.make(name, model, draw(model), 1, directory)


def draw(model):
  """Parameters with a small embedding, so that the layers and not the last token decide."""
  params = weights.draw(model)
  return params | dict(embedding=params["embedding"] / 10)


def ours(prompts, num_tokens):
  """The most likely next tokens by whole forward passes."""
  params = jax.tree.map(jnp.asarray, draw(MODEL))
  model = transformer.Transformer(MODEL)
  tokens_BT = np.asarray(prompts)

  @jax.jit
  def logits(tokens_BT):
    return transformer.unembed(params, model.apply({"params": params}, tokens_BT, routing="decide").hidden_BTD)
  pad = np.zeros((len(prompts), num_tokens), int)
  tokens_BT, start = np.concatenate([tokens_BT, pad], 1), tokens_BT.shape[1]
  for position in range(start, start + num_tokens):
    tokens_BT[:, position] = np.argmax(logits(tokens_BT)[:, position - 1], -1)
  return tokens_BT[:, start:]


@pytest.mark.parametrize("name", [name for name in peers.PEERS if "float32" in name])
def test_tokens_are_ours(name, tmp_path):
  peer = make(name, tmp_path)
  assert peer.name == name
  ids_BT = ours(PROMPTS, NUM_TOKENS)
  assert len(np.unique(ids_BT)) > NUM_TOKENS, "too few different tokens to tell engines apart"
  for _ in range(2):  # nothing is left over from the call before
    np.testing.assert_array_equal(peer.generate(PROMPTS, NUM_TOKENS), ids_BT)
  np.testing.assert_array_equal(peer.generate(PROMPTS[1:2], NUM_TOKENS), ids_BT[1:2])
  longer = [prompt[-1:] * 270 for prompt in PROMPTS[1:2]]
  np.testing.assert_array_equal(peer.generate(longer, 2), ours(longer, 2))


@pytest.mark.parametrize("name", [name for name in peers.PEERS if "bfloat16" in name])
def test_tokens_are_nearly_ours_in_bfloat16(name, tmp_path):
  """Ties within rounding fall either way; chance agrees on 1 of 61."""
  peer = make(name, tmp_path)
  prompts = np.random.default_rng(1).integers(0, MODEL.vocab_size, (24, 7)).tolist()
  assert np.mean(peer.generate(prompts, 1) == ours(prompts, 1)) > 0.75


@pytest.mark.parametrize("name", peers.PEERS)
def test_bad_prompts_are_refused(name, tmp_path):
  peer = make(name, tmp_path)
  for prompts in ([], [[]], [[1, 2], [3]]):
    with pytest.raises(ValueError, match="all of one length"):
      peer.generate(prompts, 2)
  with pytest.raises(ValueError, match="num_tokens=0"):
    peer.generate([[1]], 0)


def test_bad_peers_are_refused(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="use one of hf-float32"):
    peers.make("hf", MODEL, {}, 1, tmp_path)
  with pytest.raises(ValueError, match="run sharing 'vanilla'"):
    peers.make("hf-float32", tiny.config().model, {}, 1, tmp_path)
  monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs torch, transformers; pip install 'mor\[peers\]'"):
    peers.make("hf-float32", MODEL, {}, 1, tmp_path)
