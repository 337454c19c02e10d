"""The depth of each token, and text coloured by depth, for terminals and pages.

The depth of a token is the number of recursion steps that process it. It belongs to the
input token, not to the token predicted from it. It is decided causally, as in generation.
"""

from collections.abc import Mapping, Sequence
import functools
import html
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor import types
from mor.model import kernels
from mor.model import transformer

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # of bytes that are no whole character
_CONTEXT = 8  # tokens whose text may depend on each other
# From shallow to deep: 256-colour terminal code and the same colour on a page.
_PALETTE = ((230, "#ffffd7"), (222, "#ffd787"), (215, "#ffaf5f"), (208, "#ff8700"), (202, "#ff5f00"), (160, "#d70000"))


@functools.partial(jax.jit, static_argnums=0)
@kernels.full_precision
def measure(model: config_lib.ModelConfig, variables: Mapping[str, Any], tokens_BT: types.Tokens,
          segment_BT: types.Segments) -> jax.Array:
  """Returns the depth `[B, T]` of each token; 0 for padding."""
  out = transformer.Transformer(model).apply(
      variables, tokens_BT, segment_BT, routing="decide", key=jax.random.key(0))
  return jnp.sum(out.keep_RBT, axis=0, dtype=jnp.int32) * (segment_BT != 0)


def measure_ids(model: config_lib.ModelConfig, variables: Mapping[str, Any], ids: np.ndarray,
                seq_len: int) -> np.ndarray:
  """Returns the depths of a text of any length, read in independent rows of `seq_len` tokens."""
  num_rows = max(1, -(-len(ids) // seq_len))
  padded = np.zeros(num_rows * seq_len, np.int32)
  padded[:len(ids)] = ids
  valid = np.arange(len(padded)) < len(ids)
  depths = [measure(model, variables, jnp.asarray(row_1T), jnp.asarray(valid_1T, jnp.int32))
            for row_1T, valid_1T in zip(padded.reshape(-1, 1, seq_len), valid.reshape(-1, 1, seq_len))]
  return np.concatenate([np.asarray(d)[0] for d in depths])[:len(ids)]


def wants_colour() -> bool:
  """Returns True on a terminal or if FORCE_COLOR is set, but never if NO_COLOR is set."""
  if os.environ.get("NO_COLOR"):
    return False
  return sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))


def shade(depth: int, num_recursions: int) -> int | None:
  """Returns the index of the colour of a depth in the palette; None for depth 0."""
  if depth <= 0:
    return None
  top = len(_PALETTE) - 2 if num_recursions < 4 else len(_PALETTE) - 1
  return round((depth - 1) / max(num_recursions - 1, 1) * top)


def page_colour(depth: int, num_recursions: int) -> str:
  """Returns the hexadecimal colour of a depth; white for 0."""
  index = shade(depth, num_recursions)
  return "#ffffff" if index is None else _PALETTE[index][1]


def split_by_token(tokenizer: Any, ids: Sequence[int]) -> list[str]:
  """Returns the text that each id adds; the parts join to the decoded text.

  If the bytes of a character are split over several tokens, the last token shows it.
  """
  out, start, shown = [], 0, 0
  for i in range(len(ids)):
    text = tokenizer.decode(ids[start:i + 1])
    if text.endswith(_BROKEN) and i + 1 < len(ids):
      out.append("")
      continue
    out.append(text[shown:])
    shown = max(shown, len(text))
    later = i + 1 - _CONTEXT
    if later - start >= _CONTEXT and shown == len(text) and _is_whole(tokenizer.decode(ids[later:later + 1])):
      start, shown = later, len(tokenizer.decode(ids[later:i + 1]))  # else the whole text would be decoded at every token
  return out


def _is_whole(text: str) -> bool:
  return bool(text) and _BROKEN not in text


def format_terminal(parts: Sequence[str], depths: Sequence[int], num_recursions: int, coloured: bool,
                    width: int = 80) -> str:
  """Formats a text with its legend, coloured, or with the depths as digits beneath."""
  if coloured:
    legend = " ".join(_ansi(f" {d} ", d, num_recursions) for d in range(1, num_recursions + 1))
    body = "".join(_ansi(part, d, num_recursions) for part, d in zip(parts, depths))
    return f"{body}\n\nrecursion steps: {legend}"
  text = "".join(parts).replace("\n", "⏎").replace("\t", " ")
  digits = "".join((_digit(d) * len(part)) for part, d in zip(parts, depths))
  rows = [f"{text[i:i + width]}\n{digits[i:i + width]}" for i in range(0, len(text), width)]
  return "\n".join([*rows, "", f"(beneath each token: the recursion steps it took, 1 to {num_recursions})"])


def format_page(parts: Sequence[str], depths: Sequence[int], num_recursions: int) -> str:
  """Formats a text as HTML, with one span per token."""
  spans = [f'<span style="background:{page_colour(d, num_recursions)}" title="depth {d}">{html.escape(part)}</span>'
           for part, d in zip(parts, depths) if part]
  legend = " ".join(f'<span style="background:{page_colour(d, num_recursions)}">&nbsp;{d}&nbsp;</span>'
                    for d in range(1, num_recursions + 1))
  return f'<p class="tokens">{"".join(spans)}</p>\n<p>recursion steps: {legend}</p>'


def _digit(depth: int) -> str:
  return str(depth) if depth < 10 else "+"


def _ansi(text: str, depth: int, num_recursions: int) -> str:
  """Colours each line separately, so that the colour does not fill the rest of the line."""
  index = shade(depth, num_recursions)
  if index is None or not text:
    return text
  start = f"\x1b[38;5;16;48;5;{_PALETTE[index][0]}m"
  return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))
