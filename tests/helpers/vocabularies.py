"""Small tokenizers of the kinds that pretrained models come with."""

import tokenizers
from tokenizers import decoders
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

SPACE = "\u2581"
LETTERS = sorted({*"abcdefghinorstuw", *"éß東."})


def llama3(opens: bool = True) -> tokenizers.Tokenizer:
  """Byte-level BPE whose special tokens have no usual name; the post-processor opens a text."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
  if opens:
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B:1",
        special_tokens=[("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
  return made


def sentencepiece(kind: str) -> tokenizers.Tokenizer:
  """BPE of characters with U+2581 for a space and bytes for what it lacks.

  Args:
    kind: "prepend" (Llama 2), "first", "always", "never" (Metaspace), "gemma" (added runs of spaces).
  """
  words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *LETTERS,
           SPACE + "t", SPACE + "th", "in", SPACE * 2, SPACE * 4, SPACE * 8]
  merges = [(SPACE, "t"), (SPACE + "t", "h"), ("i", "n"), (SPACE, SPACE), (SPACE * 2, SPACE * 2),
            (SPACE * 4, SPACE * 4)]
  made = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, merges,
                                                    unk_token="<unk>", fuse_unk=True, byte_fallback=True))
  if kind in ("prepend", "gemma"):
    made.normalizer = normalizers.Sequence(
        ([normalizers.Prepend(SPACE)] if kind == "prepend" else []) + [normalizers.Replace(" ", SPACE)])
  else:
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=kind, split=False)
  parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  made.decoder = decoders.Sequence(parts + ([] if kind in ("never", "gemma") else [decoders.Strip(" ", 1, 0)]))
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  if kind == "gemma":
    made.add_tokens([tokenizers.AddedToken(SPACE * n, normalized=False) for n in (2, 4, 8, 16)])
  made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)])
  return made


KINDS = ("prepend", "first", "always", "never", "gemma")
