"""What splits text before byte-level BPE, by the name that a GGUF file has for it.

`PARTS` has what a name means to llama.cpp, written with the parts of the `tokenizers` library.

Source: llama.cpp src/llama-vocab.cpp.
"""

BYTES = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
           r"\s+(?!\S)|\s+")
PARTS = {  # name -> what splits text before BPE
    "gpt-2": [BYTES | dict(use_regex=True)],
    "smollm": [dict(type="Digits", individual_digits=True), BYTES | dict(use_regex=True)],
    "llama-bpe": [dict(type="Split", pattern=dict(Regex=_LLAMA3), behavior="Isolated", invert=False),
                  BYTES | dict(use_regex=False)],
    "qwen2": [dict(type="Split", pattern=dict(Regex=_LLAMA3.replace("{1,3}", "")), behavior="Isolated", invert=False),
              BYTES | dict(use_regex=False)],
}
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is one, whatever the merges say; and bos is on by default
