"""Text that comes token by token against the text of all tokens, for every kind of decoder, and what it costs."""

import random

import pytest
import tokenizers
from tokenizers import decoders
from tokenizers import models

from mor.data import detokenise
from mor.data import tokenizer as tokenizer_lib

WORDS = ["\u2581", "\u2581\u2581", "\u2581the", "\u2581we", "people", "s", ",", ".", "\u2581\u20ac", "\u2581n't", "\u2581'", "é"]
TEXTS = ["of the people", " two  spaces ", "née é\u20ac 日本語 \U0001f600\U0001f601!", "\n\t x", "\ufffd real \ufffd", "\ufeff mark"]


def level():
  """Byte-level BPE whose tokens end within characters."""
  names = {byte: name for name, byte in zip(map(chr, range(0x100, 0x200)), range(256))} | tokenizer_lib._byte_characters()
  vocab = {names[byte]: byte for byte in range(256)}
  for part in ("th", "é"[:1], " th", "日"):
    raw = part.encode()
    for end in range(2, len(raw) + 1):
      vocab.setdefault("".join(names[b] for b in raw[:end]), len(vocab))
  vocab["a" + names[0xE2]] = len(vocab)
  return made(models.BPE(vocab, []), decoders.ByteLevel())


def made(model, decoder):
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.decoder = decoder
  tokenizer.add_special_tokens(["<|endoftext|>"])
  return tokenizer


def pieces(decoder):
  """A SentencePiece vocabulary with bytes."""
  names = ["<unk>", *WORDS, *(f"<0x{byte:02X}>" for byte in range(256))]
  vocab = {name: i for i, name in enumerate(names)}
  return made(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"), decoder)


KINDS = {
    "level": level,
    "llama": lambda: pieces(decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])),
    "gemma": lambda: pieces(decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])),
    "metaspace": lambda: pieces(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])),
    "wordpiece": lambda: made(models.WordPiece({t: i for i, t in enumerate(["a", "##b", "do", "n't", "'", ".", "##é", "##"])},
                                               unk_token="a"), decoders.WordPiece(cleanup=True)),
    "suffix": lambda: made(models.BPE({t: i for i, t in enumerate(["a</w>", "b", "c</w>", ".</w>"])}, []),
                           decoders.BPEDecoder()),
    "bytes": tokenizer_lib.ByteTokenizer,
}


@pytest.fixture(name="kind", params=KINDS)
def fixture_kind(request):
  return request.param


def decoder_of(tokenizer):
  if isinstance(tokenizer, tokenizer_lib.ByteTokenizer):
    return tokenizer.decode, tokenizer.vocab_size
  return (lambda ids: tokenizer.decode(ids, skip_special_tokens=True)), tokenizer.get_vocab_size()


def stream(decode, ids, before=()):
  detokeniser = detokenise.Detokeniser(decode, before)
  return [*(detokeniser.add(token) for token in ids), detokeniser.held]


def draw(kind, size, rng):
  """Ids of a valid text, or any where bytes are decoded in their order; with specials and unknown ids between."""
  tokenizer = KINDS[kind]()
  decode, vocab_size = decoder_of(tokenizer)
  extra = vocab_size - 1, vocab_size + 7
  if kind in ("llama", "gemma", "metaspace"):
    ids = []
    while len(ids) < size:
      byte = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in rng.choice(TEXTS).encode()]
      ids += rng.choice([byte, [rng.randrange(1, 1 + len(WORDS))], [rng.choice(extra)]])
  else:
    ids = [rng.choice([rng.randrange(vocab_size), *extra][:1 + 2 * (rng.random() < 0.1)]) for _ in range(size)]
    if kind in ("level", "bytes"):
      ids += [b for text in TEXTS for b in text.encode()] + [0x80] * 40 + [0xE2, 0x82] * 9 + [0xAC] + [0xE2, 0x82, 0xAC] * 6
  return decode, ids


@pytest.mark.parametrize("seed", range(4))
def test_parts_join_to_the_text_of_all_tokens(kind, seed):
  """From the first token on, and from any place within a text: what was before says how it goes on."""
  rng = random.Random(seed)
  decode, ids = draw(kind, 150, rng)
  parts = stream(decode, ids)
  assert "".join(parts) == decode(ids)
  if kind not in ("level", "bytes"):
    assert all("\ufffd" not in part or "\ufffd" in decode(ids) for part in parts)
  for cut in rng.sample(range(1, len(ids)), 30):
    head = decode(ids[:cut])
    if not head.endswith("\ufffd"):
      assert head + "".join(stream(decode, ids[cut:], ids[:cut])) == decode(ids), cut


def test_a_character_comes_whole(kind):
  """No part shows a piece of a character that a later token completes, and none comes later than it must."""
  if kind in ("wordpiece", "suffix"):
    return
  tokenizer = KINDS[kind]()
  decode, _ = decoder_of(tokenizer)
  name = (lambda b: b) if kind in ("level", "bytes") else lambda b: tokenizer.token_to_id(f"<0x{b:02X}>")
  text = "a€日😀é"
  parts = stream(decode, [name(b) for b in text.encode()])
  assert [part for part in parts if part] == list(text) and parts[-1] == ""
  assert stream(decode, [name(b) for b in "a€".encode()[:-1]]) == ["a", "", "", decode([name(b) for b in "€".encode()[:-1]])]


def test_a_character_that_begins_in_the_prompt_is_completed():
  decode = tokenizer_lib.ByteTokenizer().decode
  assert stream(decode, [0x82, 0xAC, 65], [65, 0xE2]) == ["", "€", "A", ""]
  assert stream(decode, [65], [65, 0xE2]) == ["A", ""]


def test_byte_fallback_keeps_what_was_given_out():
  """The library decodes a run of bytes as a whole: one that is broken takes the valid ones with it."""
  tokenizer = KINDS["llama"]()
  decode, _ = decoder_of(tokenizer)
  ids = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in [*"€".encode(), 0x80]] + [1 + WORDS.index("people")]
  assert decode(ids) == "\ufffd" * 4 + "people"
  assert stream(decode, ids) == ["", "", "€", "", "\ufffdpeople", ""]


@pytest.mark.parametrize("run", ["valid", "broken", "special", "mixed"])
def test_the_cost_of_a_token_does_not_grow(kind, run):
  """Tokens that are decoded, counted: no more for each of the last than for each of the first."""
  rng = random.Random(1)
  tokenizer = KINDS[kind]()
  decode, vocab_size = decoder_of(tokenizer)
  counts = []

  def counted(ids):
    counts[-1] += len(ids)
    return decode(ids)

  broken = 0x80 if kind in ("level", "bytes") else tokenizer.token_to_id("<0x80>") if kind not in ("wordpiece", "suffix") else 1
  ids = {"valid": draw(kind, 600, rng)[1], "broken": [broken] * 600, "special": [vocab_size - 1] * 600,
         "mixed": [broken, 2, vocab_size + 5] * 200}[run]
  counts.append(0)
  detokeniser = detokenise.Detokeniser(counted)
  for token in ids:
    counts.append(0)
    detokeniser.add(token)
  assert max(counts) <= 400 and sum(counts[-200:]) <= 2 * sum(counts[200:400]) + 200
  assert sum(counts) <= 100 * len(ids)
