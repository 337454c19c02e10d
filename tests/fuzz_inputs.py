"""Damages inputs from the field at random and lets each enter where a user gives it.

  python -m tests.fuzz_inputs --seed=0 --count=2000

A damaged input is read, or refused with a ValueError or an OSError of one line, within
SECONDS; a refused source leaves nothing in the workdir, and a prompt file gives one answer of valid
JSON for each of its lines. Prints the counts by kind, and every input that breaks this;
exit status 1 if there is one. Inputs: folders of Hugging Face (config.json, other JSON files, header of
safetensors, tokenizer), headers of GGUF, recipes of the official code, .jsonl and .txt of training, files
of prompts, prompts.
"""

import argparse
import collections
from collections.abc import Callable
import contextlib
import functools
import io
import json
import pathlib
import random
import struct
import sys
import tempfile
import time
import traceback
from typing import Any
from unittest import mock

import yaml

from mor.conversion import command
from mor.conversion import layout
from mor.data import sources
from mor.data import tokenizer as tokenizer_lib
from mor.serve import cli
from mor.serve import model as model_lib
from mor.serve import request as request_lib
from tests.helpers import checkpoints
from tests.helpers import official_files
from tests.helpers import tiny
from tests.helpers import vocabularies
from tests.helpers import weights

SECONDS = 20.0
MODEL = checkpoints.llama(vocab_size=300, num_layers=1)
VALUES = [None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**12, 10**30, -10**18, 2**63,
          "", "x", "llama", "a\nb", "\x00", "\ud800", "é" * 300, [], [1], [[]], ["x", None], {}, {"a": 1}, {"content": 3},
          [0] * 50, "9" * 4000, {"rope_type": "llama3"}]
RAW = [b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 30000, b"{" * 3000, b'{"a":' * 3000, b"1" + b"0" * 5000, b"null",
       b"[]", b"3", b'"x"', b"NaN", b"\r", b"\n\n", b"- " * 20000, b"&a [*a]", bytes(range(256))]


def change_value(rng: random.Random, tree: Any) -> Any:
  """A tree of JSON with one place changed, removed or added."""
  places: list[tuple[Any, Any]] = []

  def walk(node):
    if len(places) < 3000:
      for key in list(node) if isinstance(node, dict) else range(min(len(node), 20)):
        places.append((node, key))
        if isinstance(node[key], (dict, list)):
          walk(node[key])

  tree = json.loads(json.dumps(tree))
  walk(tree)
  if not places or rng.random() < 0.02:
    return rng.choice(VALUES)
  for _ in range(rng.choice([1, 1, 1, 2, 4])):
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.15:
      node.pop(key, None)
    else:
      with contextlib.suppress(IndexError):
        node[key] = rng.choice(VALUES)
  return tree


def change_bytes(rng: random.Random, data: bytes) -> bytes:
  """Bytes with some flipped, cut out, repeated or replaced."""
  start = rng.randrange(len(data) + 1)
  end = min(len(data), start + rng.choice([1, 1, 2, 4, 8, 40]))
  new = rng.choice([bytes(rng.randrange(256) for _ in range(end - start)), b"", data[start:end] * 2, rng.choice(RAW),
                    struct.pack("<Q", rng.choice([0, 1, 2**31, 2**40, 2**62, 2**64 - 1]))])
  changed = data[:start] + new + data[end:]
  return changed[:rng.randrange(len(changed) + 1)] if rng.random() < 0.15 else changed


def change_json(rng: random.Random, path: pathlib.Path) -> None:
  data = path.read_bytes()
  if rng.random() < 0.25:
    path.write_bytes(rng.choice(RAW) if rng.random() < 0.3 else change_bytes(rng, data))
  else:
    path.write_text(json.dumps(change_value(rng, json.loads(data))))


def put_something_else(rng: random.Random, path: pathlib.Path) -> None:
  """A directory, a link to itself or to nothing, or nothing, in place of a file."""
  path.unlink()
  kind = rng.choice(["directory", "loop", "nowhere", "nothing"])
  if kind == "directory":
    path.mkdir()
  elif kind != "nothing":
    path.symlink_to(path.name if kind == "loop" else "absent")


def hf(rng: random.Random, folder: pathlib.Path, name: str) -> Callable[[], Any]:
  """A Hugging Face folder with one file damaged."""
  checkpoints.hf_folder(folder, MODEL, eos_token_id=257)
  maker = rng.choice([vocabularies.llama3, *(functools.partial(vocabularies.sentencepiece, k) for k in vocabularies.KINDS)])
  maker().save(str(folder / "tokenizer.json"))
  said = dict(bos_token="<s>", eos_token=dict(content="</s>"), add_bos_token=True, chat_template="{{a}}", pad_token=None)
  (folder / "tokenizer_config.json").write_text(json.dumps(said))
  (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[257, 258], bos_token_id=256)))
  if rng.random() < 0.1:
    put_something_else(rng, folder / name)
  elif name.endswith(".json"):
    change_json(rng, folder / name)
  else:
    change_safetensors(rng, folder / name)
  return lambda: convert(rng, f"hf:{folder}", folder.parent / "run")


def change_safetensors(rng: random.Random, path: pathlib.Path) -> None:
  data = path.read_bytes()
  size = struct.unpack("<Q", data[:8])[0]
  if rng.random() < 0.6:
    header = json.dumps(change_value(rng, json.loads(data[8:8 + size]))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size:])
  else:
    path.write_bytes(change_bytes(rng, data[:8 + size]) + data[8 + size:])


def gguf(rng: random.Random, folder: pathlib.Path) -> Callable[[], Any]:
  """A GGUF file with its header damaged."""
  fields = json.loads(vocabularies.llama3().to_str())
  tokens = [*fields["model"]["vocab"], *(token["content"] for token in fields["added_tokens"]), "ab"]
  extra = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
           "tokenizer.ggml.token_type": [1] * 256 + [3] * 3 + [1], "tokenizer.ggml.merges": ["a b"],
           "tokenizer.ggml.eos_token_id": 257, "tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.eot_token_id": 258}
  path = folder / "m.gguf"
  checkpoints.write_gguf(path, MODEL, dict(layout.write({"params": weights.draw(MODEL)}, MODEL, "gguf")), extra=extra)
  data = path.read_bytes()
  header = data.index(b"blk.0.ffn_down.weight") + 64
  path.write_bytes(change_bytes(rng, data[:header]) + data[header:])
  return lambda: convert(rng, f"gguf:{path}", folder.parent / "run")


def official(rng: random.Random, folder: pathlib.Path) -> Callable[[], Any]:
  """A checkpoint of the official code with its recipe or its config damaged."""
  router = dict(name="expert_choice")
  model = tiny.config(dict(model=dict(router=router))).model
  official_files.write(folder, model, {"params": weights.draw(model)})
  path = folder / "tiny.yaml"
  data = path.read_bytes()
  if rng.random() < 0.6:
    path.write_text(yaml.safe_dump(change_value(rng, yaml.safe_load(data))))
  else:
    path.write_bytes(rng.choice(RAW) if rng.random() < 0.3 else change_bytes(rng, data))
  return lambda: command.read(f"official_mor:{folder}", model if rng.random() < 0.5 else None)


def convert(rng: random.Random, spec: str, workdir: pathlib.Path) -> None:
  """Reads a source, and makes a run of it now and then, which takes the time of a checkpoint."""
  if rng.random() > 0.1:
    command.read(spec)
    return
  model = command.describe(spec)
  sizes = {name: getattr(model, name) for name in (
      "vocab_size", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "num_layers", "rope_theta", "norm_eps",
      "tie_embeddings", "qk_norm")}
  config = tiny.config(dict(model=tiny.VANILLA | sizes, data=dict(tokenizer=str(workdir / "tokenizer.json"))))
  try:
    command.convert(config, spec, workdir)
  except BaseException:
    if workdir.exists():
      raise AssertionError(f"something is left in {workdir}")
    raise
  model_lib.load(workdir).request("the state")


def texts(rng: random.Random, folder: pathlib.Path) -> Callable[[], Any]:
  """A file of training data, damaged."""
  name, data = rng.choice([
      ("a.jsonl", b"".join(json.dumps({"text": f"line {i} \u00e9"}).encode() + b"\n" for i in range(6))),
      ("a.txt", "é plain text\nof lines".encode()), ("a.jsonl.gz", b"\x1f\x8b"), ("a.txt.xz", b"\xfd7zXZ")])
  path = folder / name
  path.write_bytes(data)
  if name == "a.jsonl" and rng.random() < 0.6:
    lines = [json.loads(line) for line in data.splitlines()]
    path.write_text("".join(json.dumps(change_value(rng, line)) + "\n" for line in lines))
  elif rng.random() < 0.1:
    put_something_else(rng, path)
  else:
    path.write_bytes(change_bytes(rng, data))
  return lambda: [tokenizer_lib.ByteTokenizer().encode(text) for text in sources.open_source(str(path), "text", folder)]


ASKED = model_lib.Model(MODEL, {}, tokenizer_lib.ByteTokenizer(), 48)


def prompts(rng: random.Random, folder: pathlib.Path) -> Callable[[], Any]:
  """A file of prompts, damaged; the requests that are right are not run."""
  lines = [dict(prompt="one", max_tokens=3), dict(prompt=[1, 2], temperature=0.5, stop_strings=["x"], logprobs=True),
           dict(prompt="three", top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1, stop_tokens=[5])]
  path = folder / rng.choice(["p.jsonl", "p.txt"])
  changed = [change_value(rng, line) if rng.random() < 0.7 else line for line in lines]
  data = "".join(json.dumps(line) + "\n" for line in changed).encode()
  path.write_bytes(change_bytes(rng, data) if rng.random() < 0.4 else data)
  return lambda: answer(path)


def answer(path: pathlib.Path) -> None:
  def at_once(model, settings, requests, watch):
    del model, settings
    done = request_lib.Completion([1], [1], [False], [-1.0], "a", "length")
    watch.start()
    for index in range(len(requests)):
      watch.event(index, request_lib.Event(1, "a", 1, -1.0, "length"))
      watch.done(index, done)
    return [done] * len(requests)

  out, lines = io.StringIO(), cli._lines(str(path))
  with mock.patch.object(cli, "_at_once", at_once), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
    cli.answer(ASKED, str(path), {}, {"batching": "none"})
  answers = [json.loads(line, parse_constant=_refuse) for line in out.getvalue().splitlines()]
  assert len(answers) == len(lines), f"{len(answers)} answers for {len(lines)} lines"
  assert all(set(each) > {"prompt"} for each in answers)


def _refuse(constant):
  raise AssertionError(f"{constant} is no JSON")


def prompt(rng: random.Random, folder: pathlib.Path) -> Callable[[], Any]:
  """A prompt in Python."""
  del folder
  value = rng.choice([*VALUES, b"hi", (1, 2), range(3), {1, 2}, object(), "text", [1, 2], [-1], [10**9], [1.5], [True]])
  options = {rng.choice(["max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop_tokens", "stop_strings",
                         "logprobs", "exit", "threshold", "repetition_penalty", "self", "x"]): rng.choice(VALUES)
             for _ in range(rng.randrange(3))}
  return lambda: ASKED.request(value, **options).check(MODEL.vocab_size, 48)


KINDS = {
    "config": functools.partial(hf, name="config.json"), "safetensors": functools.partial(hf, name="model.safetensors"),
    "tokenizer": functools.partial(hf, name="tokenizer.json"),
    "tokenizer_config": functools.partial(hf, name="tokenizer_config.json"),
    "generation_config": functools.partial(hf, name="generation_config.json"), "gguf": gguf, "official": official,
    "texts": texts, "prompts": prompts, "prompt": prompt}


def try_one(kind: str, seed: int) -> tuple[str, str]:
  """Returns "read", "refused" or "broken" for an input, and what is wrong with it."""
  rng = random.Random(f"{kind} {seed}")
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root) / "in"
    folder.mkdir()
    enter = KINDS[kind](rng, folder)
    start = time.monotonic()
    try:
      enter()
      outcome = "read", ""
    except (ValueError, OSError) as error:
      outcome = judge(error)
    except BaseException as error:  # also a panic of a library
      if isinstance(error, KeyboardInterrupt):
        raise
      frame = traceback.extract_tb(error.__traceback__)[-1]
      outcome = "broken", f"{type(error).__name__}: {str(error)[:200]!r} at {frame.filename}:{frame.lineno}"
    if time.monotonic() - start > SECONDS:
      outcome = "broken", f"took {time.monotonic() - start:.0f} s, then {outcome}"
  return outcome


def judge(error: ValueError | OSError) -> tuple[str, str]:
  """Returns whether an error is one that somebody wrote: one line, not what Python says of our own mistakes."""
  frame = traceback.extract_tb(error.__traceback__)[-1]
  what = f"{type(error).__name__}: {str(error)[:200]!r} at {frame.filename}:{frame.lineno}"
  if len(str(error).splitlines()) != 1 or len(str(error)) > 3000:
    return "broken", what
  if isinstance(error, ValueError) and not str(frame.line).startswith("raise "):
    return "broken", what
  return "refused", str(error)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--count", type=int, default=2000)
  parser.add_argument("--kinds", default=",".join(KINDS))
  given = parser.parse_args()
  kinds = given.kinds.split(",")
  counts: dict[str, collections.Counter] = {kind: collections.Counter() for kind in kinds}
  for i in range(given.count):
    kind, seed = kinds[i % len(kinds)], given.seed * 1_000_000 + i
    outcome, what = try_one(kind, seed)
    counts[kind][outcome] += 1
    if outcome == "broken":
      print(f"{kind} {seed}: {what}", flush=True)
  for kind, count in counts.items():
    print(f"{kind:18}" + "  ".join(f"{name} {count[name]}" for name in ("read", "refused", "broken")))
  return int(any(count["broken"] for count in counts.values()))


if __name__ == "__main__":
  sys.exit(main())
