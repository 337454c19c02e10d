"""Times early exit against the full depth: what leaving early gains, and what it changes.

  python -m benchmarks.early_exit --workdir=runs/smollm2-exit --after=10 --first=8192 --pin=0
  python -m benchmarks.early_exit --shape=135m --after=10 --batches=16 --prompts=96 --pin=0

Engines of the same weights take turns at the same prompts, all new tokens greedy and
everything in the time: the core's of one process with --pin, else the clock's. So that
what the machine does meanwhile meets all alike, each takes a prompt in turn with one
slot, and a dispatch with more; then the time ends when no prompt waits any more: until
then every slot has a request. The requests are

  full         in an engine without exits
  none         at full depth in an engine that has exits
  trust-T      taken from an exit surer than T
  verify-T     drafted by an exit surer than T and confirmed by the full depth
  copied-T     as trust, deeper keys projected from the exit's state (CALM's)
  mixed-T      a third each of none, trust and verify
  hf, hf-N-C   transformers on the same weights (--hf=FOLDER of `--mode=export
               --target=llama`), alone and with drafts of N tokens, each but the last at
               least C probable, from the first exit; float32, one prompt at a time

Beside each rate stand the share of tokens that came from an exit, the share of drafts
that were confirmed, agreement with `full` (equal tokens at the same place, and tokens
before the first difference), nats per generated token under the full depth, and scores
of answers (--eval=FOLDER; `quality.py`). Prompts are openings of paragraphs of the
shipped text, or random ids for random weights (--shape).

How fast would a better exit make it? --damp=F multiplies what the layers after the
first exit add to a plain model's state: the text is worth nothing, but the less they
add, the more drafts are right, and each pass takes the time that it takes.
"""

import dataclasses
import lzma
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode as decode_throughput
from benchmarks import exit_turns
from benchmarks import harness
from benchmarks import hf_early_exit
from benchmarks import quality
from mor.data import readers
from mor.exits import policy as exits_lib
from mor.model import transformer
from mor.serve import engine as engine_lib
from mor.serve import model as model_lib

CONTEXT = 1024
KINDS = ("none", "trust", "verify", "copied", "mixed")
SCORED = ("full", "trust", "copied")  # the others' texts are the full depth's
_WARM_UP = 16  # tokens of each prompt before anything is timed


def prompts(model: model_lib.Model, num: int, length: int) -> list[list[int]]:
  """Openings of paragraphs, or random ids."""
  rng = np.random.default_rng(0)
  if model.tokenizer is None:
    return rng.integers(0, model.vocab_size, (num, length)).tolist()
  text = lzma.decompress(readers.SOTU.read_bytes()).decode()
  paragraphs = [p for p in text.split("\n") if len(p) > 20 * length]
  if num > len(paragraphs):
    raise ValueError(f"--prompts={num}, and the text has {len(paragraphs)} long paragraphs; use fewer")
  chosen = rng.choice(len(paragraphs), num, replace=False)
  return [[int(t) for t in model.tokenizer.encode(paragraphs[i])[:length]] for i in chosen]


def nll(model: model_lib.Model, asked: list[list[int]], tokens: list[list[int]]) -> float:
  """Nats per generated token under the full depth."""
  rows = [prompt + new for prompt, new in zip(asked, tokens)]
  width = -(-max(map(len, rows)) // 64) * 64

  @jax.jit
  def row_nll(row_1T):
    out = transformer.Transformer(model.config).apply(model.variables, row_1T, routing="decide")
    logits_TV = out.hidden_BTD[0] @ transformer.head(model.variables["params"]).T
    logprob_TV = jax.nn.log_softmax(logits_TV)
    return -jnp.take_along_axis(logprob_TV[:-1], row_1T[0, 1:, None], axis=1)[:, 0]

  total = []
  for prompt, row in zip(asked, rows):
    padded_1T = np.zeros((1, width), np.int32)
    padded_1T[0, :len(row)] = row
    total.append(np.asarray(row_nll(padded_1T))[len(prompt) - 1:len(row) - 1])
  return float(np.mean(np.concatenate(total)))


def damped(model: model_lib.Model, first: int, factor: float) -> model_lib.Model:
  """Returns a plain model whose layers from `first` on add less."""
  if model.config.num_recursions != 1:
    raise ValueError(f"--damp={factor} of a model whose recursions share their layers; use a plain one")
  stack = model.variables["params"]["stack"]

  def scale(w):
    return w.at[first:].multiply(factor)

  stack = stack | {"attention": stack["attention"] | {"o": scale(stack["attention"]["o"])},
                   "ffw": stack["ffw"] | {"down": scale(stack["ffw"]["down"])}}
  params = model.variables["params"] | {"stack": stack}
  return dataclasses.replace(model, variables=model.variables | {"params": params})


def variants(args, model: model_lib.Model, num_slots: int) -> list[exit_turns.Variant | exit_turns.Peer]:
  """Returns all variants that are asked for, each with an engine of its own."""
  exits = exits_lib.Exits(after=args.after, pending=args.pending, first=args.first)
  weights = {}  # one copy for all with the same exits

  def make(name, asked, exits=exits):
    engine = engine_lib.Engine(
        model, num_slots=num_slots, context=CONTEXT, weight_format=args.format,
        kv_format="float32" if args.format == "float32" else "bfloat16", exits=exits)
    engine.runner.weights = weights.setdefault(exits, engine.runner.weights)
    return exit_turns.Variant(name, engine, asked)

  made, ask = [make("full", [{}], None)], lambda mode, threshold: dict(exit=mode, threshold=threshold)
  if "none" in args.kinds:
    made.append(make("none", [{}]))
  for threshold in args.thresholds:
    trust, verify = ask("trust", threshold), ask("verify", threshold)
    several = dict(trust=[trust], verify=[verify], copied=[trust], mixed=[{}, trust, verify])
    made += [make(f"{kind}-{threshold}", asked, dataclasses.replace(exits, kv="copied") if kind == "copied" else exits)
             for kind, asked in several.items() if kind in args.kinds and (kind != "mixed" or num_slots > 1)]
  if args.hf and num_slots == 1:
    peer = hf_early_exit.EarlyExit(args.hf, threads=harness.num_cores())
    drafts = [hf_early_exit.Draft(args.after[0], num, sure) for num, sure in ((2, 0.0), (5, 0.4))]
    made += [exit_turns.Peer("hf", peer, None), *(exit_turns.Peer(f"hf-{d.num_tokens}-{d.confidence}", peer, d) for d in drafts)]
  return made


def measure(args, model: model_lib.Model, num_slots: int) -> dict[str, Any]:
  """Times all variants at one batch size, in turn."""
  clock = args.clock
  made, asked = variants(args, model, num_slots), prompts(model, max(args.prompts, 2 * num_slots), args.prompt_tokens)

  def warm_up():
    for variant in made:
      variant.run(asked, min(args.new_tokens, _WARM_UP))  # compiles

  def play():
    if num_slots > 1:
      exit_turns.together(made, asked, args.new_tokens)
    for prompt in asked if num_slots == 1 else ():
      for variant in made:
        variant.run([prompt], args.new_tokens)

  harness.take_turns(made, 0, warm_up=1, play=warm_up)
  harness.take_turns(made, args.rounds, play=play, label=f"batch {num_slots}, ",
                     tell=lambda variant: f"{variant.rates(clock)[-1]:.1f}")
  rows, items = [], tasks(args) if num_slots == args.batches[0] else {}
  for variant in made:
    scores, kind = {}, variant.name.partition("-")[0]
    for name, task in items.items() if kind in SCORED else ():
      texts = [model.tokenizer.decode(t) for t in variant.answer([list(model.request(item.prompt).prompt) for item in task])]
      scores[name] = quality.score(task, texts)
      print(variant.name, name, scores[name], file=sys.stderr, flush=True)
    rows.append({
        "variant": variant.name, "tokens_per_second": harness.spread(variant.rates(clock)),
        "wall_tokens_per_second": harness.spread(variant.rates("wall")),
        "to_full": harness.ratios(variant.rates(clock), made[0].rates(clock)), **variant.figures(),
        "agreement": quality.agreement(variant.tokens, made[0].tokens), "nll": nll(model, asked, variant.tokens),
        "scores": scores})
  return {"batch": num_slots, "variants": rows}


def tasks(args) -> dict[str, list[quality.Item]]:
  """Returns the questions to score, if a folder is named."""
  if not args.eval:
    return {}
  return {"squad": quality.squad(args.eval, args.questions, seed=0, shots=1),
          "lambada": quality.lambada(args.eval, args.questions, seed=0)}


def main(argv: list[str]) -> None:
  """Measures and writes."""
  def numbers(kind):
    return lambda text: tuple(kind(x) for x in text.split(","))

  parser = harness.Parser(description=__doc__.partition("\n")[0])
  parser.add_argument("--workdir", default="", help="run whose newest checkpoint decodes; else random weights")
  parser.add_argument("--shape", default="135m", choices=("135m", "360m"), help="of random weights, three recursions")
  parser.add_argument("--after", type=numbers(int), default=(10,), help="layers of the exits")
  parser.add_argument("--thresholds", type=numbers(float), default=(0.0, 0.3, 0.6, 0.9))
  parser.add_argument("--kinds", type=lambda text: tuple(text.split(",")), default=KINDS,
                      help="of requests, beside `full`: of " + ", ".join(KINDS))
  parser.add_argument("--batches", type=numbers(int), default=(1,))
  parser.add_argument("--format", default="bfloat16", choices=("float32", "bfloat16", "int8"))
  parser.add_argument("--pending", type=int, default=7)
  parser.add_argument("--first", type=int, default=0, help="tokens an exit chooses from; 0 is all")
  parser.add_argument("--prompts", type=int, default=8, help="at least; twice the batch where that is more")
  parser.add_argument("--prompt_tokens", type=int, default=24)
  parser.add_argument("--new_tokens", type=int, default=96)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--hf", default="", help="folder of the same weights, for transformers")
  parser.add_argument("--eval", default="", help="folder of the questions; see quality.py")
  parser.add_argument("--questions", type=int, default=100, help="of each task")
  parser.add_argument("--damp", type=float, default=1.0, help="factor on what the layers after the exit add")
  parser.add_argument("--pin", type=int, default=None, help="core to stay on")
  parser.add_argument("--out", default="", help="file; else standard output")
  args = parser.parse_args(argv)
  if unknown := set(args.kinds) - set(KINDS):
    raise ValueError(f"--kinds={','.join(args.kinds)}: no {', '.join(sorted(unknown))}; use some of {', '.join(KINDS)}")
  args.clock = harness.choose_clock(args.pin)
  if not args.workdir and (args.hf or args.eval):
    raise ValueError("--hf and --eval need trained weights; give --workdir")
  model = model_lib.load(args.workdir) if args.workdir else decode_throughput.random_model(
      decode_throughput.model_config(args.shape, 3, False))
  if args.damp != 1.0:
    model = damped(model, args.after[0], args.damp)
  sizes = {name: value for name, value in vars(args).items() if name not in ("out", "pin", "clock")}
  record = harness.header("early_exit", argv, args.format, sizes) | {"clock": args.clock}
  record["model"] = args.workdir or f"random weights of the {args.shape} shape, three recursions"
  record["batches"] = [measure(args, model, num_slots) for num_slots in args.batches]
  harness.write(record, args.out)


NOTE = (
    "{model}, exits after {sizes[after]}; {sizes[prompt_tokens]} prompt and {sizes[new_tokens]} new "
    "tokens, medians of {sizes[rounds]} rounds in turn.")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: each kind of request by batch, its speed and its quality."""
  def number(value, form=".3f"):
    return "" if value is None else format(value, form)

  rates = "wall_tokens_per_second" if record.get("clock") == "wall" else "tokens_per_second"
  rows = []
  for batch in record["batches"]:
    for row in batch["variants"]:
      rate, ratio, scores = row[rates], row["to_full"], row["scores"]
      rows.append([
          str(batch["batch"]), row["variant"], f"{rate['median']:.1f}",
          f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})", number(row["exit_rate"], ".2f"),
          number(row["acceptance"], ".2f"), number(row["confirmed_per_token"], ".2f"), number(row["agreement"]["equal"], ".2f"),
          number(row["nll"], ".2f"), number(scores.get("squad", {}).get("f1")),
          number(scores.get("lambada", {}).get("last_word"))])
  return [["batch", "requests", "tokens/s", "to full (min–max)", "tokens from exits", "drafts confirmed",
           "confirmed a token", "tokens as full's", "nats a token", "SQuAD F1", "LAMBADA"], *rows]


if __name__ == "__main__":
  harness.run(main)
