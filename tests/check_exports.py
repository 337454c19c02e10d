"""Checks that every export of a run continues a text as `generate` does.

  python -m tests.check_exports [--steps=300] [--folder=DIR]

Trains three small models on the shipped texts: a vanilla one, a recursive one without routing,
and a Mixture-of-Recursions. Sends the same texts through `mor`, through
`pipeline("text-generation")` of transformers (--target=hf, --target=llama), and through
llama.cpp (--target=gguf), greedily in float32. Prints one JSON line per model; the exit status is 1
if any differs, and 2 if llama-cpp-python is missing.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import tempfile

import mor
from mor import config as config_lib
from mor.conversion import command
from mor.train import loop

TEXTS = ("My fellow citizens", "In the year 1862,", "the union — café", "It's <|endoftext|> what we'll")
NUM_TOKENS = 40
MODELS = {  # name -> fields of the model, and exports beside --target=hf
    "vanilla": (dict(sharing="vanilla", num_recursions=1, router=dict(name="fixed")), ("llama", "gguf")),
    "recursive": (dict(sharing="middle_cycle", num_recursions=3, router=dict(name="fixed")), ("llama", "gguf")),
    "mor": (dict(sharing="middle_cycle", num_recursions=3, router=dict(name="expert_choice", sampling="aux_loss")), ()),
}


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--steps", type=int, default=300, help="training steps of each model")
  parser.add_argument("--folder", help="where runs and exports go; default is a temporary one")
  options = parser.parse_args(argv)
  if importlib.util.find_spec("llama_cpp") is None:
    print("error: llama-cpp-python is missing; pip install '.[peers]'", file=sys.stderr)
    return 2
  with tempfile.TemporaryDirectory() as temporary:
    reports = [check(name, pathlib.Path(options.folder or temporary), options.steps) for name in MODELS]
  return 0 if all(report["ok"] for report in reports) else 1


def check(name: str, folder: pathlib.Path, steps: int) -> dict:
  """Trains and exports a model of `MODELS`; returns and prints how its exports continue the texts."""
  fields, others = MODELS[name]
  workdir = folder / name
  if not workdir.exists():
    loop.train(_config(fields, steps, folder), workdir)
  model = mor.load(workdir)
  ours = model.generate(TEXTS, temperature=0.0, max_tokens=NUM_TOKENS, stop_tokens=[])
  expected = [list(completion.tokens) for completion in ours]
  report = dict(name=name, texts=len(TEXTS), tokens=NUM_TOKENS, different=len({t for row in expected for t in row}))
  for target in ("hf", *others):
    output = folder / f"{name}-{target}{'.gguf' if target == 'gguf' else ''}"
    if not output.exists():
      command.export(workdir, target, output, "float32")
    found = _llama_cpp(output) if target == "gguf" else _pipeline(output)
    report[target] = sum(row == theirs for row, theirs in zip(expected, found, strict=True))
  report["ok"] = all(report[target] == len(TEXTS) for target in ("hf", *others))
  print(json.dumps(report | dict(example=ours[0].text)), flush=True)
  return report


def _config(fields: dict, steps: int, folder: pathlib.Path) -> config_lib.Config:
  config = config_lib.default()
  router = fields["router"]
  config.model.update({key: value for key, value in fields.items() if key != "router"}, vocab_size=1024, d_model=128,
                      num_heads=4, num_kv_heads=2, head_dim=32, d_ff=320, num_layers=5, scan_layers=False)
  config.model.router.update(router)
  config.data.update(source="sotu", tokenizer="bpe:1024", seq_len=128, batch_size=4, cache_dir=str(folder / "cache"))
  config.optim.update(learning_rate=3e-3, warmup_steps=10)
  config.train.update(steps=steps, eval_every=steps, checkpoint_every=steps, eval_rows=4, sample_prompt="")
  return config_lib.from_config_dict(config)


def _pipeline(folder: pathlib.Path) -> list[list[int]]:
  """Returns the tokens with which transformers continues each text; ids in place of text, so nothing hides in it."""
  import torch
  import transformers
  pipe = transformers.pipeline("text-generation", str(folder), trust_remote_code=True, dtype=torch.float32)
  rows = []
  for text in TEXTS:
    made, = pipe(text, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False, return_tensors=True)
    rows.append(list(made["generated_token_ids"])[-NUM_TOKENS:])
  return rows


def _llama_cpp(file: pathlib.Path) -> list[list[int]]:
  """Returns the tokens with which llama.cpp continues each text."""
  import llama_cpp
  model = llama_cpp.Llama(str(file), n_ctx=256, type_k=0, type_v=0, verbose=False)
  rows = []
  try:
    for text in TEXTS:
      model.reset()
      drawn = model.generate(model.tokenize(text.encode(), add_bos=True, special=False), temp=0.0, repeat_penalty=1.0)
      rows.append([token for token, _ in zip(drawn, range(NUM_TOKENS))])
  finally:
    model.close()
  return rows


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
