"""Times early exit against the full depth: what leaving early gains, and what it changes.

  python -m mor.benchmarks.early_exit --workdir=runs/smollm2-exit --after=10 --pin=0
  python -m mor.benchmarks.early_exit --shape=135m --after=10 --batches=1,16 --pin=0

Engines of the same weights take turns at the same prompts, all new tokens greedy and
everything in the time. Their requests are

  full         in an engine without exits
  none         at full depth in an engine that has exits
  trust-T      taken from an exit surer than T
  verify-T     drafted by an exit surer than T and confirmed by the full depth
  copied-T     as trust, deeper keys projected from the exit's state (CALM's)
  mixed-T      a third each of none, trust and verify

Beside each rate stand the share of tokens that came from an exit, the share of drafts
that were confirmed, and two measures of agreement with `full`: equal tokens at the same
place, and tokens before the first difference. Prompts are openings of paragraphs of the
shipped text, or random ids for random weights (--shape).
"""

import dataclasses
import lzma
import sys
import time
from typing import Any

import numpy as np

from mor.benchmarks import decode_throughput
from mor.benchmarks import results
from mor.data import readers
from mor.inference import engine as engine_lib
from mor.inference import exits as exits_lib
from mor.inference import model as model_lib

CONTEXT = 512


@dataclasses.dataclass
class Variant:
  """Requests of one kind, what each turn took, and what came last."""

  name: str
  engine: engine_lib.Engine
  options: list[dict[str, Any]]  # of the requests, in turn
  rates: list[float] = dataclasses.field(default_factory=list)
  wall_rates: list[float] = dataclasses.field(default_factory=list)
  tokens: list[list[int]] = dataclasses.field(default_factory=list)
  early: int = 0
  drafts: tuple[int, int] = (0, 0)

  def run(self, prompts: list[list[int]], num_tokens: int) -> None:
    """All prompts, as many at once as the engine has slots."""
    engine, before = self.engine, self.engine.metrics()
    wall, cpu = time.perf_counter(), time.process_time()
    numbers = [engine.submit(prompt, max_tokens=num_tokens, stop_tokens=(), **self.options[i % len(self.options)])
               for i, prompt in enumerate(prompts)]
    while not engine.idle:
      engine.step()
    engine.wait()
    num = num_tokens * len(prompts)
    self.rates.append(num / (time.process_time() - cpu))
    self.wall_rates.append(num / (time.perf_counter() - wall))
    done, after = [engine.take(number) for number in numbers], engine.metrics()
    self.tokens, self.early = [c.tokens for c in done], sum(sum(c.early) for c in done)
    self.drafts = (after["drafts"] - before["drafts"], after["confirmed"] - before["confirmed"])


def prompts(model: model_lib.Model, num: int, length: int) -> list[list[int]]:
  """Openings of paragraphs, or random ids."""
  rng = np.random.default_rng(0)
  if model.tokenizer is None:
    return rng.integers(0, model.vocab_size, (num, length)).tolist()
  text = lzma.decompress(readers.SOTU.read_bytes()).decode()
  paragraphs = [p for p in text.split("\n") if len(p) > 20 * length]
  chosen = rng.choice(len(paragraphs), num, replace=False)
  return [[int(t) for t in model.tokenizer.encode(paragraphs[i])[:length]] for i in chosen]


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> dict[str, float]:
  """Shares of tokens: equal at their place, and before the first difference."""
  same = [np.equal(a, b) for a, b in zip(tokens, reference, strict=True)]
  return {"equal": float(np.mean(np.concatenate(same))),
          "prefix": float(np.mean(np.concatenate([np.cumprod(s) for s in same])))}


def variants(args, model: model_lib.Model, num_slots: int) -> list[Variant]:
  """All of them; those with the same engine share it."""
  make = lambda **options: engine_lib.Engine(
      model, num_slots=num_slots, context=CONTEXT, weight_format=args.format,
      kv_format="float32" if args.format == "float32" else "bfloat16", **options)
  exits = exits_lib.Exits(after=args.after, pending=args.pending, first=args.first)
  shared, copied = make(exits=exits), make(exits=dataclasses.replace(exits, kv="copied"))
  made = [Variant("full", make(), [{}]), Variant("none", shared, [{}])]
  for threshold in args.thresholds:
    ask = lambda mode, threshold=threshold: dict(exit=mode, threshold=threshold)
    made += [Variant(f"trust-{threshold}", shared, [ask("trust")]),
             Variant(f"verify-{threshold}", shared, [ask("verify")]),
             Variant(f"copied-{threshold}", copied, [ask("trust")]),
             Variant(f"mixed-{threshold}", shared, [{}, ask("trust"), ask("verify")])]
  return made


def measure(args, model: model_lib.Model, num_slots: int) -> dict[str, Any]:
  """All variants at one batch size, in turn."""
  made, asked = variants(args, model, num_slots), prompts(model, max(args.prompts, 2 * num_slots), args.prompt_tokens)
  for variant in made:
    variant.run(asked, args.new_tokens)  # compiles
  for variant in made:
    variant.rates, variant.wall_rates = [], []
  for turn in range(args.rounds):
    for variant in made:
      variant.run(asked, args.new_tokens)
    print(f"batch {num_slots}, round {turn + 1} of {args.rounds}: "
          + ", ".join(f"{v.name} {v.rates[-1]:.1f}" for v in made), file=sys.stderr, flush=True)
  full, rows = made[0], []
  for variant in made:
    drafts, kept = variant.drafts
    rows.append({
        "variant": variant.name, "tokens_per_second": results.spread(variant.rates),
        "wall_tokens_per_second": results.spread(variant.wall_rates),
        "to_full": results.spread([a / b for a, b in zip(variant.rates, full.rates)]),
        "exit_rate": variant.early / sum(map(len, variant.tokens)), "drafts": drafts,
        "acceptance": kept / drafts if drafts else None, "agreement": agreement(variant.tokens, full.tokens)})
  return {"batch": num_slots, "variants": rows}


def main(argv: list[str]) -> None:
  """Measures and writes."""
  numbers = lambda kind: lambda text: tuple(kind(x) for x in text.split(","))
  parser = results.Parser(description=__doc__.partition("\n")[0])
  parser.add_argument("--workdir", default="", help="run whose newest checkpoint decodes; else random weights")
  parser.add_argument("--shape", default="135m", choices=("135m", "360m"), help="of random weights, three recursions")
  parser.add_argument("--after", type=numbers(int), default=(10,), help="layers of the exits")
  parser.add_argument("--thresholds", type=numbers(float), default=(0.0, 0.3, 0.6, 0.9))
  parser.add_argument("--batches", type=numbers(int), default=(1,))
  parser.add_argument("--format", default="bfloat16", choices=("float32", "bfloat16", "int8"))
  parser.add_argument("--pending", type=int, default=7)
  parser.add_argument("--first", type=int, default=0, help="tokens an exit chooses from; 0 is all")
  parser.add_argument("--prompts", type=int, default=8, help="at least; twice the batch where that is more")
  parser.add_argument("--prompt_tokens", type=int, default=24)
  parser.add_argument("--new_tokens", type=int, default=96)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--pin", type=int, default=None, help="core to stay on")
  parser.add_argument("--out", default="", help="file; else standard output")
  args = parser.parse_args(argv)
  if args.pin is not None:
    results.pin(args.pin)
  model = model_lib.load(args.workdir) if args.workdir else decode_throughput.random_model(
      decode_throughput.model_config(args.shape, 3, False))
  sizes = {name: value for name, value in vars(args).items() if name not in ("out", "pin")}
  record = results.header("early_exit", argv, args.format, sizes)
  record["batches"] = [measure(args, model, num_slots) for num_slots in args.batches]
  results.write(record, args.out)


if __name__ == "__main__":
  results.run(main)
