"""Times decoding engines in turn: what depth-wise batching gains, and what it could.

  python -m benchmarks.decode --shape=135m --batches=16,32 --pin=0
  python -m benchmarks.decode --shape=135m --batches=1,16,32 --pin=0 --peers=all

All run `mor/serve/engine.py` on random weights (a trained router comes with
`--workdir`), always with requests waiting, and take turns at a fixed number of new
tokens, so that all are at the same point of the same requests. Everything is in
the time: embedding, prelude, writes, coda, head, sampling, scheduler.

  vanilla         distinct layers, R = 1: continuous sequence-wise batching
  unrolled-rR     the recursive model's layers run as one step: its sequence-wise batching
  never-rR        the MoR engine, router included, no token leaves early
  balanced-rR     a third (R = 3) of the tokens leaves after each step
  all-rR          every token leaves after step 1
  naive-rR        balanced exits in a batch that waits for its deepest row
  trained, trained-never   the checkpoint's own model and router, and the same held back

The gain of depth is balanced / never: same engine, weights and requests. Its
ceiling, at mean depth m, is what the parts cost when nothing is lost between them:

  G = (R b + h(B)) / (m (b' + h(B / m)))

with b, b' a pass of the shared stack in the two runs' steady states (rows of deeper
steps are shorter where tokens leave: with b' = b the ceiling is `ceiling_one_pass`),
and h(n) embedding, prelude, coda, head and sampling for a batch of n.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import decode_parts
from benchmarks import decode_peers
from benchmarks import harness
from configs import paper
from mor import config as config_lib
from mor.model import transformer
from mor.model.routers import prescribed
from mor.model.routers import table as router_table
from mor.serve import engine as engine_lib
from mor.serve import model as model_lib

CONTEXT = 512
VARIANTS = ("vanilla", "unrolled", "never", "balanced", "all", "naive")
_LEAST = 8  # tokens of a prompt, or new ones, at least
WARM_UP = 160  # tokens a slot generates before timing: about half a request


@dataclasses.dataclass
class Runner(harness.Timed):
  """An engine and its endless requests; its work is counted in tokens."""

  engine: engine_lib.Engine
  requests: Any

  def run(self, num_tokens: int) -> None:
    """Decodes about so many tokens, with requests waiting throughout."""
    start = self._tokens()
    self.time(lambda: self._decode(start + num_tokens))
    self.amounts[-1] += self._tokens() - start

  def _decode(self, until: int) -> None:
    engine = self.engine
    while self._tokens() < until:
      while len(engine.scheduler.queue) < engine.num_slots:
        engine.submit_request(next(self.requests))
      for number, event in engine.step():
        if event.finish:
          engine.take(number)
    engine.wait()

  def _tokens(self) -> int:
    return self.engine.metrics()["output_tokens"]


def model_config(shape: str, recursions: int, router: bool, vanilla: bool = False) -> config_lib.ModelConfig:
  """Returns a model of the paper's sizes; 135M shares all layers (30 = 10 x 3), 360M all but the ends (32)."""
  layers, d_model, num_heads, num_kv_heads, d_ff = paper.SIZES[shape]
  fields = paper.get_config(f"mor-{shape}-r{recursions if recursions > 1 else 3}").model
  edge = 0 if shape == "135m" else 2
  inner = -(-(layers - edge) // recursions) * recursions
  fields.update(num_layers=inner + edge, num_recursions=recursions, sharing="middle_cycle" if edge else "cycle")
  fields.update(d_model=d_model, num_heads=num_heads, num_kv_heads=num_kv_heads, d_ff=d_ff)
  if vanilla:
    fields.update(sharing="vanilla", num_recursions=1)
  if not router:
    fields.router.update(name="fixed", sampling="none")
  config = paper.get_config(f"mor-{shape}-r3")
  config.model = fields
  return config_lib.from_config_dict(config).model


def random_model(config: config_lib.ModelConfig) -> model_lib.Model:
  """Returns a model with fresh weights."""
  variables = jax.jit(transformer.Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  return model_lib.Model(config, variables, None, CONTEXT)


def unroll(model: model_lib.Model) -> model_lib.Model:
  """Returns the same model as one step of distinct layers that happen to be equal."""
  config, params = model.config, dict(model.variables["params"])
  repeated = jax.tree.map(lambda a: jnp.concatenate([a] * config.num_recursions), params["stack"])
  groups = [params.pop("prelude"), repeated, params.pop("coda")] if "prelude" in params else [repeated]
  params["stack"] = jax.tree.map(lambda *a: jnp.concatenate(a), *groups)
  flat = dataclasses.replace(config, sharing="vanilla", num_recursions=1,
                             router=dataclasses.replace(config.router, name="fixed", sampling="none"))
  return dataclasses.replace(model, config=flat, variables={"params": params})


def requests(vocab_size: int, mix: str, context: int = CONTEXT, seed: int = 0):
  """Endless requests: "plain", N(256, 64) new tokens after one, or "chat", N(128, 32) prompt and N(128, 48) new."""
  rng = np.random.default_rng(seed)

  def draw(mean, std, most):
    return int(np.clip(rng.normal(mean, std), _LEAST, most))

  while True:
    num_prompt, num_new = (
        (1, draw(256, 64, context)) if mix == "plain" else (draw(128, 32, context // 2), draw(128, 48, context // 2)))
    prompt = [int(t) for t in rng.integers(0, vocab_size, num_prompt)]
    yield decode_parts.request(prompt, num_new)


def probabilities(kind: str, num_steps: int) -> tuple[float, ...]:
  """Returns the probability of leaving after each step."""
  if kind in ("balanced", "naive"):
    return (1 / num_steps,) * num_steps
  return tuple(float(r == (0 if kind == "all" else num_steps - 1)) for r in range(num_steps))


def make_runner(name: str, args, num_slots: int, models: dict[str, model_lib.Model]) -> Runner:
  """Builds the engine of a variant, e.g. "balanced-r3"; models are kept in `models`."""
  kind, _, r = name.partition("-r")
  def get(key, make):
    if key not in models:
      models[key] = make()
    return models[key]
  options = dict(num_slots=num_slots, weight_format=args.format, page_size=args.page_size, context=args.context,
                 ticks=args.ticks)
  if args.storage:
    options["storage"] = args.storage
  options["kv_format"] = "float32" if args.format == "float32" else "bfloat16"
  if kind.startswith("trained"):
    model = get("trained", lambda: model_lib.load(args.workdir))
    if kind == "trained-never":
      options["router"] = _prescribe(model, "never")
  elif kind == "vanilla":
    model = get("vanilla", lambda: random_model(model_config(args.shape, 1, False, vanilla=True)))
  else:
    model = get(f"mor-r{r}", lambda: random_model(model_config(args.shape, int(r), True)))
    if kind == "unrolled":
      model = get(f"unrolled-r{r}", lambda: unroll(model))
    else:
      options.update(router=_prescribe(model, kind), batching="sequence" if kind == "naive" else "depth")
  engine = engine_lib.Engine(model, **options)
  return Runner(name, engine, requests(model.vocab_size, args.mix, args.context))


def _prescribe(model, kind):
  inner = router_table.make(model.config)
  return prescribed.Prescribed(inner, probabilities(kind, model.config.num_recursions))


def measure(args, num_slots: int, models: dict[str, model_lib.Model]) -> dict[str, Any]:
  """Times all variants at one batch size, in turn, and the parts of the ceilings."""
  names = [name for kind in args.variants for name in (
      [kind] if kind in ("vanilla", "trained", "trained-never") else [f"{kind}-r{r}" for r in args.recursions])]
  runners = {}
  for name in names:
    print(f"batch {num_slots}: warming up {name}", file=sys.stderr, flush=True)
    runners[name] = make_runner(name, args, num_slots, models)
    harness.take_turns([runners[name]], 0, warm_up=1, play=lambda: runners[name].run(WARM_UP * num_slots))

  def play():
    for runner in runners.values():
      runner.run(args.turn * num_slots)

  harness.take_turns(list(runners.values()), args.rounds, play=play, label=f"batch {num_slots}, ",
                     tell=lambda runner: f"{runner.rates(args.clock)[-1]:.0f}")
  rows = [{"variant": name, "tokens_per_second": harness.spread(r.rates(args.clock)),
           "wall_tokens_per_second": harness.spread(r.rates("wall")), "metrics": r.engine.metrics(),
           "kv_bytes": decode_parts.kv_bytes(r.engine)} for name, r in runners.items()]
  gains = [_gain(runners, f"balanced-r{r}", f"never-r{r}", args.clock) for r in args.recursions
           if {f"balanced-r{r}", f"never-r{r}"} <= runners.keys()]
  if {"trained", "trained-never"} <= runners.keys():
    gains.append(_gain(runners, "trained", "trained-never", args.clock))
  ratios = {f"{a} / {b}": harness.ratios(runners[a].rates(args.clock), runners[b].rates(args.clock)) for a, b in _pairs(runners)}
  return {"batch": num_slots, "variants": rows, "gains": gains, "ratios": ratios}


def _pairs(runners):
  """Ratios that answer a question: never-exit and naive against sequence-wise, all against vanilla."""
  for name in runners:
    kind, _, r = name.partition("-r")
    if kind in ("never", "naive") and f"unrolled-r{r}" in runners:
      yield name, f"unrolled-r{r}"
    if kind == "balanced" and "vanilla" in runners:
      yield name, "vanilla"


def _gain(runners, routed: str, never: str, clock: str) -> dict[str, Any]:
  """Returns the gain of a controlled pair, and its ceiling."""
  a, b = runners[routed], runners[never]
  gain = harness.ratios(a.rates(clock), b.rates(clock))
  depth = a.engine.metrics()["mean_depth"]
  parts = decode_parts.measure(b.engine, a.engine, depth, clock)
  num_steps = b.engine.runner.decoder.num_steps
  full = num_steps * parts["pass_full"] + parts["edge_full"]
  ceiling = full / (depth * (parts["pass_routed"] + parts["edge_routed"]))
  return {"routed": routed, "full": never, "mean_depth": depth, "gain": gain, "seconds": parts,
          "ceiling": ceiling, "ceiling_one_pass": full / (depth * (parts["pass_full"] + parts["edge_routed"])),
          "gain_per_ceiling": gain["median"] / ceiling}


def parse(argv: list[str]):
  """Reads the options."""
  parser = harness.Parser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
  parser.add_argument("--shape", default="135m", choices=sorted(paper.SIZES))
  parser.add_argument("--batches", default="16,32", help="slots, e.g. 1,16,32")
  parser.add_argument("--recursions", default="3", help="e.g. 2,3,4")
  parser.add_argument("--variants", default="vanilla,unrolled,never,balanced,naive",
                      help=f"of {', '.join(VARIANTS)}, trained, trained-never")
  parser.add_argument("--mix", default="plain", choices=["plain", "chat"], help="requests")
  parser.add_argument("--format", default="bfloat16", choices=["float32", "bfloat16", "int8"],
                      help="of weights; keys are bfloat16 unless these are float32")
  parser.add_argument("--page_size", type=int, default=64, help="entries in a page")
  parser.add_argument("--context", type=int, default=CONTEXT, help="positions of a request at most")
  parser.add_argument("--ticks", type=int, help="ticks of a dispatch; default the engine's")
  parser.add_argument("--storage", default="", help="storage of keys and values; default the platform's")
  parser.add_argument("--rounds", type=int, default=9, help="timed turns of each variant")
  parser.add_argument("--turn", type=int, default=16, help="new tokens of a slot in a turn")
  parser.add_argument("--peers", default="", help="time these on the vanilla weights instead: all, or names")
  parser.add_argument("--peer_tokens", type=int, default=128, help="new tokens of each request, beside peers")
  parser.add_argument("--workdir", default="", help="run whose trained model and router `trained` uses")
  parser.add_argument("--pin", type=int, help="run on this core only and judge by processor time")
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  args.variants = args.variants.split(",")
  for name in args.variants:
    if name not in (*VARIANTS, "trained", "trained-never"):
      raise ValueError(f"--variants: {name!r} is not one; use some of {', '.join(VARIANTS)}, trained, trained-never")
    if name.startswith("trained") and not args.workdir:
      raise ValueError("--variants=trained needs the run of a model; give --workdir=DIR")
  try:
    args.batches, args.recursions = ([int(x) for x in text.split(",")] for text in (args.batches, args.recursions))
  except ValueError:
    raise ValueError(f"--batches={args.batches} --recursions={args.recursions}; use counts, e.g. 16,32") from None
  if min(args.batches) < 1 or min(args.recursions) < 2 or args.rounds < 1 or args.turn < 1:
    raise ValueError("--batches, --rounds and --turn start at 1, --recursions at 2")
  if args.context < 2 * _LEAST:
    raise ValueError(f"--context={args.context} is too short for the requests; use at least {2 * _LEAST}")
  return args


def main(argv: list[str]) -> None:
  """Measures and writes the record."""
  args = parse(argv)
  args.clock = harness.choose_clock(args.pin)
  sizes = {name: getattr(args, name) for name in (
      "shape", "mix", "page_size", "context", "ticks", "storage", "rounds", "turn", "peer_tokens")}
  record = harness.header("decode", argv, args.format, sizes)
  record["clock"] = args.clock
  models: dict[str, model_lib.Model] = {}
  if args.peers:
    record["peers"] = [decode_peers.measure(args, batch, models, make_runner) for batch in args.batches]
  else:
    record["batches"] = [measure(args, batch, models) for batch in args.batches]
  harness.write(record, args.out)


NOTE = (
    "{sizes[shape]} shape, {sizes[mix]} requests, random weights; medians of {sizes[rounds]} rounds in "
    "turn, {clock} time, load average {load_average:.1f}.")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: engines or peers by batch, and the gain of depth beside its ceiling."""
  def number(spread):
    return f"{spread['median']:.0f} ({spread['min']:.0f}–{spread['max']:.0f})"

  if "peers" in record:
    rows = [[str(batch["batch"]), name, number(rate), f"{rate['median'] / best['median']:.2f}"]
            for batch in record["peers"] for best in [batch["tokens_per_second"][batch["best_peer"]]]
            for name, rate in batch["tokens_per_second"].items()]
    return [["batch", "program", "tokens/s (min–max)", "to the best peer"], *rows]
  rows = []
  for batch in record["batches"]:
    gains = {gain["routed"]: gain for gain in batch["gains"]}
    for row in batch["variants"]:
      gain, metrics = gains.get(row["variant"]), row["metrics"]
      depth = ["", ""]
      if gain:  # the same b in both runs, and each run's own
        depth = [f"{gain['gain']['median']:.3f}", " / ".join(
            f"{gain[name]:.3f} ({gain['gain']['median'] / gain[name]:.3f})" for name in ("ceiling_one_pass", "ceiling"))]
      rows.append([
          str(batch["batch"]), row["variant"], number(row["tokens_per_second"]), f"{metrics['mean_depth']:.2f}",
          f"{metrics['slot_utilisation']:.3f}", *depth])
  return [["batch", "engine", "tokens/s (min–max)", "mean depth", "slots in use", "gain of depth",
           "ceiling (gain / ceiling): one b, two"], *rows]


if __name__ == "__main__":
  harness.run(main)
