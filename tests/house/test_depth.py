"""Depths are those of the causal pass, and show on the right characters."""

import jax
import numpy as np
import pytest
import tokenizers

from mor import depth as depth_lib
from mor import report
from mor import sharding
from mor.data import tokenizer as tokenizer_lib
from mor.model import transformer
from mor.train import step as step_lib
from tests.helpers import tiny

CONFIG = tiny.config(tiny.BYTES)


@pytest.fixture(scope="module")
def variables():
  state = step_lib.init_state(CONFIG, sharding.make_mesh(CONFIG.mesh))
  state.params["router"]["out"] *= 50  # so that depths differ
  return {"params": state.params, "balance": state.balance}


@jax.jit
def forward(variables, tokens_BT, segment_BT):
  out = transformer.Transformer(CONFIG.model).apply(variables, tokens_BT, segment_BT, routing="decide")
  return transformer.unembed(variables["params"], out.hidden_BTD), out.keep_RBT


def test_depth_is_the_number_of_steps_that_keep_a_token(variables):
  batch = tiny.batch(CONFIG)
  depth_BT = depth_lib.measure(CONFIG.model, variables, batch["tokens_BT"], batch["segment_BT"])
  keep_RBT = forward(variables, batch["tokens_BT"], batch["segment_BT"])[1]
  valid_BT = batch["segment_BT"] > 0
  np.testing.assert_array_equal(depth_BT, np.asarray(keep_RBT).sum(0) * valid_BT)
  assert set(np.unique(np.asarray(depth_BT)[valid_BT])) == {1, 2, 3}


def test_a_long_text_is_read_row_by_row(variables):
  ids = np.random.default_rng(0).integers(0, 256, 29).astype(np.int32)
  depths = depth_lib.measure_ids(CONFIG.model, variables, ids, seq_len=12)
  assert depths.shape == (29,) and depths.min() >= 1
  np.testing.assert_array_equal(depths[:12], depth_lib.measure_ids(CONFIG.model, variables, ids[:12], seq_len=12))
  np.testing.assert_array_equal(depths[24:], depth_lib.measure_ids(CONFIG.model, variables, ids[24:], seq_len=12))


@pytest.mark.parametrize("prompt", ["the state", "the state of the union"])  # within the window, and beyond
def test_greedy_sampling_takes_the_likeliest_token_of_the_window(variables, prompt):
  tokenizer = tokenizer_lib.ByteTokenizer()
  ids = report.generate_ids(CONFIG, variables, tokenizer, prompt, max_tokens=6, temperature=0, seed=0)
  start = 1 + len(prompt)
  assert ids[0] == tokenizer.eos_id and tokenizer.decode(ids[1:start]) == prompt and start < len(ids) <= start + 6
  for n in range(start, len(ids)):
    window = ids[max(0, n - 12):n]
    tokens_1T = np.zeros((1, 12), np.int32)
    tokens_1T[0, :len(window)] = window  # what follows changes nothing: the pass is causal
    logits_V = forward(variables, tokens_1T, np.ones_like(tokens_1T))[0][0, len(window) - 1, :tokenizer.vocab_size]
    assert ids[n] == int(np.argmax(logits_V))


def test_sampling_is_a_function_of_the_seed_and_stays_in_the_vocabulary(variables):
  draw = lambda seed: report.generate_ids(CONFIG, variables, tokenizer_lib.ByteTokenizer(), "a", 20, 5.0, seed).tolist()
  assert draw(1) == draw(1) != draw(2)

  class Small(tokenizer_lib.ByteTokenizer):
    vocab_size = 17  # of the model's 263

  ids = report.generate_ids(CONFIG, variables, Small(), "a", 20, 5.0, seed=3)
  assert len(ids) == 22 and ids[2:].max() < 17


@pytest.mark.parametrize("max_tokens, temperature", [(-1, 1.0), (3, -0.5)])
def test_sampling_refuses_negative_numbers(variables, max_tokens, temperature):
  with pytest.raises(ValueError, match="use values >= 0"):
    report.generate_ids(CONFIG, variables, tokenizer_lib.ByteTokenizer(), "a", max_tokens, temperature, 0)


def test_pieces_join_to_the_text_even_where_a_character_is_split():
  tokenizer = tokenizer_lib.ByteTokenizer()
  ids = [tokenizer.eos_id, *tokenizer.encode("né €!").tolist()]
  parts = depth_lib.split_by_token(tokenizer, ids)
  assert len(parts) == len(ids) and "".join(parts) == "né €!"
  assert parts == ["", "n", "", "é", " ", "", "", "€", "!"]


def _metaspace():
  words = ["</s>", "\u2581", "\u2581a", "b", "\u2581the", "<0xE2>", "<0x82>", "<0xAC>", "\n"]
  made = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
  made.decoder = tokenizers.decoders.Sequence([
      tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0)])
  made.add_special_tokens(["</s>"])
  return made


@pytest.mark.parametrize("tokenizer", [tokenizer_lib.ByteTokenizer(), _metaspace()], ids=["bytes", "metaspace"])
def test_pieces_are_those_of_the_whole_text_at_a_cost_that_is_linear(tokenizer):
  rng, handed = np.random.default_rng(0), []

  class Counted:
    def decode(self, ids):
      handed.append(len(ids))
      return tokenizer.decode(ids)

  for length in (1, 17, 400):
    if isinstance(tokenizer, tokenizer_lib.ByteTokenizer):
      ids = [b for c in rng.choice(["a", " ", "\u00e9", "\u20ac", "\U0001f680"], length) for b in c.encode()]
      ids[3:3] = [256, 0xE2, 0x82]  # a special token, and a character that never ends
    else:
      ids = rng.integers(0, 9, length).tolist()
    decoded = [tokenizer.decode(ids[:i + 1]) for i in range(len(ids))]
    wanted, shown = [], 0
    for text in decoded[:-1] + [decoded[-1] + "."]:
      wanted.append("" if text.endswith("\ufffd") else text[shown:])
      shown = shown if text.endswith("\ufffd") else max(shown, len(text))
    wanted[-1] = wanted[-1][:-1]
    handed.clear()
    assert depth_lib.split_by_token(Counted(), ids) == wanted
    assert sum(handed) <= 40 * len(ids)


def test_terminal_colours_each_token_once():
  text = depth_lib.format_terminal(["one ", "two\n", "three"], [1, 3, 2], 3, coloured=True)
  body, legend = text.split("\n\n")
  assert body.count("\x1b[38;5;16;48;5;") == 3 and body.count("\x1b[0m") == 3
  codes = [part.split("m")[0] for part in body.split("\x1b[38;5;16;48;5;")[1:]]
  assert codes[0] != codes[1] != codes[2]
  assert [f"48;5;{code}m {d} " in legend for code, d in zip(codes, (1, 3, 2))] == [True] * 3


def test_without_colour_digits_stand_beneath():
  text = depth_lib.format_terminal(["one ", "two\n", "three"], [1, 3, 2], 3, coloured=False, width=8)
  assert text.split("\n")[:4] == ["one two⏎", "11113333", "three", "22222"]
  assert "\x1b" not in text


def test_depths_spread_over_the_palette():
  assert [depth_lib.shade(d, 1) for d in (0, 1)] == [None, 0]
  for r in range(2, 9):
    shades = [depth_lib.shade(d, r) for d in range(1, r + 1)]
    assert shades == sorted(shades) and shades[0] == 0 and len(set(shades)) == min(r, 6 if r > 3 else 5)


def test_page_escapes_the_text():
  assert "&lt;b&gt;" in depth_lib.format_page(["<b>"], [1], 2) and "<b>" not in depth_lib.format_page(["<b>"], [1], 2)


def test_depth_of_a_vanilla_model_is_one():
  config = tiny.config(tiny.BYTES, model=tiny.VANILLA)
  params = step_lib.init_state(config, sharding.make_mesh(config.mesh)).params
  assert set(depth_lib.measure_ids(config.model, {"params": params}, np.arange(9, dtype=np.int32), 12).tolist()) == {1}
