"""A pretrained model after import, and as a recursive model before any training.

  python -m benchmarks.pretrained --source=gguf:SmolLM2-135M-Instruct.Q4_1.gguf \\
    --books=val.jsonl.xz --wikitext=test.txt

`imported` is the model itself: its greedy answer through our engine, its loss on a
paragraph, on the first 32 x 1024 tokens of a text, and its logits beside those of
transformers on the same weights (where that is installed). `initialised` is the loss
of every `init.method`, number of recursions and rank on excerpts of books: what
sharing costs before uptraining. Losses are in nats per token.
"""

import dataclasses
import functools
import importlib.util
import json
import lzma
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from mor import config as config_lib
from mor.conversion import hf_export
from mor.conversion import pretrained
from mor.conversion import recursive_init
from mor.conversion import command
from mor.data import tokenizer as tokenizer_lib
from mor.model import transformer
from mor.serve import engine as engine_lib
from mor.serve import model as model_lib
from mor.train import loss as loss_lib

PARAGRAPH = (
    "The Industrial Revolution, which began in Britain in the late eighteenth century, transformed the way people "
    "lived and worked. Before that time most families lived in the countryside and made by hand the things they "
    "needed. New machines, driven first by water and later by steam, allowed goods to be made quickly and cheaply in "
    "large factories, and thousands of people moved to the towns in search of work.")
PROMPT = "The capital of France is"
METHODS = ("stepwise", "average", "lower", "upper")
_STARTS, _CHARACTERS = (50000, 120000), 4500  # excerpts of a book


def nll(model: config_lib.ModelConfig, params: dict, windows: list[np.ndarray]) -> float:
  """Returns the mean loss of the tokens after the first of every window, routed causally."""
  params = jax.tree.map(jnp.asarray, params)
  width = max(map(len, windows)) - 1
  total = 0.0
  for window in windows:  # of one shape, the end padded, so that one program runs all
    padded_T = np.pad(window, (0, width + 1 - len(window)))[None].astype(np.int32)
    total += float(_nll(model, params, padded_T[:, :-1], padded_T[:, 1:], len(window) - 1))
  return total / sum(len(window) - 1 for window in windows)


@functools.partial(jax.jit, static_argnums=0)
def _nll(model, params, tokens_BT, target_BT, length):
  hidden_BTD = transformer.Transformer(model).apply({"params": params}, tokens_BT, routing="decide").hidden_BTD
  nll_BT = loss_lib.token_nll(transformer.head(params), hidden_BTD, target_BT, 256)
  return jnp.sum(jnp.where(jnp.arange(nll_BT.shape[1])[None, :] < length, nll_BT, 0.0))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens_BT):
  hidden_BTD = transformer.Transformer(model).apply({"params": params}, tokens_BT, routing="decide").hidden_BTD
  return transformer.unembed(params, hidden_BTD)


def excerpts(path: str, encode: Any, tokens: int, starts: tuple[int, ...]) -> list[np.ndarray]:
  """Returns, from each book of a .jsonl.xz, 4500 characters from each start, at most `tokens` tokens."""
  with lzma.open(path, "rt", encoding="utf-8") as file:
    books = [json.loads(line)["text"] for line in file]
  return [encode(book[start:start + _CHARACTERS])[:tokens] for book in books for start in starts]


def imported(source: pretrained.Source, tokenizer: tokenizer_lib.Tokenizer, wikitext: str,
             books: str) -> dict[str, Any]:
  """Returns figures of the model itself."""
  model, params = source.model, source.variables["params"]
  paragraph = tokenizer.encode(PARAGRAPH)
  figures = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
             "paragraph_tokens": len(paragraph), "paragraph_nll": nll(model, params, [paragraph])}
  figures |= _beside_transformers(source, paragraph)
  if wikitext:
    ids = tokenizer.encode(pathlib.Path(wikitext).read_text(encoding="utf-8"))
    figures["wikitext_nll"] = nll(model, params, [ids[s:s + 1025] for s in range(0, 32 * 1024, 1024)])
  if books:
    figures["books_nll"] = nll(model, params, excerpts(books, tokenizer.encode, 1024, _STARTS))
  asked = model_lib.Model(model, source.variables, tokenizer, 64, opening=(), stops=())
  engine = engine_lib.Engine(asked, num_slots=1)
  figures["prompt"], figures["answer"] = PROMPT, engine.generate([PROMPT], temperature=0.0, max_tokens=8)[0].text
  return figures


def _beside_transformers(source: pretrained.Source, ids: np.ndarray) -> dict[str, float]:
  """Returns the largest difference of logits, and the size of the logits; {} without transformers."""
  if importlib.util.find_spec("transformers") is None:
    return {}
  import transformers
  with tempfile.TemporaryDirectory() as directory:
    hf_export.write_llama(f"{directory}/llama", source.model, source.variables, tokenizer=None, chat_template=None,
                          context=source.context, dtype="float32", special_ids={})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/llama")
    theirs_TV = theirs(input_ids=theirs.dummy_inputs["input_ids"].new_tensor(ids[None])).logits.detach().numpy()[0]
  ours_TV = np.asarray(_logits(source.model, source.variables["params"], ids[None]))[0]
  return {"logits_difference": float(np.abs(ours_TV - theirs_TV).max()),
          "logits_largest": float(np.abs(theirs_TV).max())}


def initialised(source: pretrained.Source, ranks: list[int], recursions: list[int], windows: list[np.ndarray],
                paragraph: np.ndarray) -> list[dict[str, Any]]:
  """Returns a row for every method and number of recursions; deltas of lower rank are cut from those of full rank."""
  rows = []
  true_TV = np.asarray(_logits(source.model, source.variables["params"], paragraph[None]))
  for num in recursions:
    for method in METHODS:
      full = _recursive(source.model, num, None)
      how = config_lib.InitConfig(method=method, lora="svd")
      params = recursive_init.convert(full, how, 0, source.model, source.variables)["params"]
      row = {"method": method, "num_recursions": num, "nll": {}}
      for rank in [*ranks, None]:
        model = _recursive(source.model, num, rank)
        cut = {part: {name: {"a": ab["a"][..., :model.lora.ranks[name]], "b": ab["b"][:, :, :model.lora.ranks[name]]}
                      for name, ab in group.items() if name in model.lora.ranks}
               for part, group in params["lora"].items()}
        params_of_rank = params | {"lora": cut} if rank != 0 else {k: v for k, v in params.items() if k != "lora"}
        row["nll"]["full" if rank is None else str(rank)] = nll(model, params_of_rank, windows)
      logits_TV = np.asarray(_logits(full, params, paragraph[None]))
      row["full_rank_logits_difference"] = float(np.abs(logits_TV - true_TV).max())
      rows.append(row)
      print(json.dumps(row), file=sys.stderr, flush=True)
  return rows


def _recursive(source: config_lib.ModelConfig, num_recursions: int, rank: int | None) -> config_lib.ModelConfig:
  """Returns the source's sizes in a cycle, with deltas of a rank; None is full."""
  full = {name: min(ends) for name, ends in source.projections.items()}
  ranks = full if rank is None else {name: min(rank, most) for name, most in full.items()}
  return dataclasses.replace(source, sharing="cycle", num_recursions=num_recursions,
                             lora=config_lib.LoraConfig(**ranks))


def main(argv: list[str]) -> None:
  """Measures and writes the record."""
  parser = harness.Parser(prog="python -m benchmarks.pretrained", description=__doc__.splitlines()[0])
  parser.add_argument("--source", required=True, help="hf:FOLDER or gguf:FILE, a plain model with a tokenizer")
  parser.add_argument("--books", required=True, help=".jsonl.xz of books")
  parser.add_argument("--wikitext", default="", help="a text")
  parser.add_argument("--ranks", default="0,64,128,256", help="beside full rank")
  parser.add_argument("--recursions", default="2,3")
  parser.add_argument("--tokens", type=int, default=512, help="of an excerpt, one a book")
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  ranks, recursions = ([int(x) for x in text.split(",")] for text in (args.ranks, args.recursions))
  source = command.read(args.source)
  if source.tokenizer is None:
    raise ValueError(f"--source={args.source}: there is no tokenizer beside the model; give a folder or file with one")
  tokenizer = tokenizer_lib.JsonTokenizer(source.tokenizer, source.eos_id)
  windows = excerpts(args.books, tokenizer.encode, args.tokens, _STARTS[:1])
  first = imported(source, tokenizer, args.wikitext, args.books)
  print(json.dumps(first), file=sys.stderr, flush=True)
  rows = initialised(source, ranks, recursions, windows, tokenizer.encode(PARAGRAPH))
  sizes = {"source": pathlib.Path(args.source.partition(":")[2]).name, "ranks": ranks,
           "tokens": sum(len(window) - 1 for window in windows)}
  record = harness.header("pretrained", argv, "float32", sizes) | {"imported": first, "initialised": rows}
  harness.write(record, args.out)


NOTE = (
    "{sizes[source]}, {sizes[tokens]:,} tokens of books, on which the model itself is at the full rank's "
    "loss.")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: loss of a pretrained model made recursive, by method, recursions and rank."""
  ranks = list(record["initialised"][0]["nll"])
  rows = [[f"R = {row['num_recursions']}, {row['method']}", *(f"{row['nll'][rank]:.2f}" for rank in ranks),
           f"{row['full_rank_logits_difference']:.1e}"] for row in record["initialised"]]
  head = ["before training, nats per token", *(f"rank {rank}" for rank in ranks), "full rank's logits − source's"]
  return [head, *rows]


if __name__ == "__main__":
  harness.run(main)
