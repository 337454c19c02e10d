"""The bytes of the tokens of a text are the bytes of the text."""

import numpy as np
import pytest
import tokenizers

from mor.data import tokenizer as tokenizer_lib
from tests.helpers import vocabularies

PARTS = [*"abth in \n\t", "  ", "    ", " " * 8, " " * 17, "é", "東京", "🚀", "the", "<s>", "\r\n", "\x00", "<0x41>"]


def texts(num=60):
  rng = np.random.default_rng(0)
  return ["".join(rng.choice(PARTS, rng.integers(1, 30))) for _ in range(num)]


def counted(made, text):
  """Of a whole document, so with the token that ends it."""
  return int(made.num_bytes_V[made.encode(text)].sum() + made.num_bytes_V[made.eos_id])


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_bytes_are_exact_for_sentencepiece(kind):
  made = tokenizer_lib.JsonTokenizer(vocabularies.sentencepiece(kind).to_str())
  for text in texts():
    if kind in ("first", "always") and text.startswith(" "):
      text = "a" + text  # Metaspace puts no second space there
    assert counted(made, text) == len(text.encode()), repr(text)


def test_runs_of_spaces_that_are_added_tokens():
  made = tokenizer_lib.JsonTokenizer(vocabularies.sentencepiece("gemma").to_str())
  assert made.num_bytes_V[made.encode(" " * 8)].sum() == 8 == len(made.decode(made.encode(" " * 8)))


@pytest.mark.parametrize("added", [[], ["    "], ["the", " \n"], ["é", "東京 "]])
def test_bytes_are_exact_for_byte_level_with_added_tokens(added):
  plain = vocabularies.llama3()
  plain.add_tokens(added)
  made = tokenizer_lib.JsonTokenizer(plain.to_str(), plain.token_to_id("<|end_of_text|>"))
  for text in texts():
    assert counted(made, text) == len(text.encode()), repr(text)


def test_a_count_that_is_an_estimate_is_said(caplog):
  words = {"[UNK]": 0, "the": 1, "</s>": 2}
  plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
  plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer_lib.JsonTokenizer(plain.to_str())
  assert "are an estimate" in caplog.text
  caplog.clear()
  tokenizer_lib.JsonTokenizer(vocabularies.sentencepiece("prepend").to_str())
  assert not caplog.text
