"""What an engine costs its host: processor time of the thread that calls `step`, for a token and for a request.

  python -m benchmarks.host --other=DIR --out=benchmarks/results/host.json

The model is so small that the device is fast, and every slot gets a token in every
tick. What the device does is in threads of its own, and the thread that calls `step`
sleeps while it waits, so the processor time of that thread is the host's: admission,
prefill, dispatch, harvest. Two mixes of requests, of many and of few new tokens, each
served from an idle engine to an idle one, give two equations for the two costs:

  seconds = token * tokens + request * requests

With `--other`, a checkout of another commit takes turns, each in a process of its own.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

MIXES = {"long": (1, 16, 256), "short": (8, 16, 16)}  # requests of a slot, tokens of a prompt, new ones


def make_engine(num_slots: int, ticks: int):
  """Returns an engine of a tiny model without recursion: each slot gets a token in each tick."""
  import jax
  import jax.numpy as jnp
  from mor import config as config_lib
  from mor.model import transformer
  from mor.serve import engine as engine_lib
  from mor.serve import model as model_lib

  config = config_lib.default()
  config.model.update(vocab_size=64, d_model=8, num_heads=1, num_kv_heads=1, d_ff=8, num_layers=1, sharing="vanilla",
                      num_recursions=1)
  config.model.router.update(name="fixed", sampling="none")
  model = config_lib.from_config_dict(config).model
  variables = jax.jit(transformer.Transformer(model).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  return engine_lib.Engine(model_lib.Model(model, variables, None, 512), num_slots=num_slots, ticks=ticks, page_size=512)


def measure(engine, mix: str) -> dict[str, float]:
  """Serves the requests of a mix; returns the seconds of `step`, tokens and requests."""
  a_slot, num_prompt, num_new = MIXES[mix]
  for _ in range(a_slot * engine.num_slots):
    engine.submit(list(range(1, 1 + num_prompt)), max_tokens=num_new)
  seconds, tokens, requests = 0.0, 0, 0
  while not engine.idle:
    start = time.thread_time()
    events = engine.step()
    seconds += time.thread_time() - start
    tokens += len(events)
    for number, event in events:
      if event.finish:
        engine.take(number)
        requests += 1
  return {"seconds": seconds, "tokens": tokens, "requests": requests}


def serve(args) -> None:
  """Measures a mix for each line of standard input; runs in a process of its own, on whichever `mor` it finds."""
  engine = make_engine(args.slots, args.ticks)
  for line in sys.stdin:
    print(json.dumps(measure(engine, line.strip())), flush=True)


def start_program(directory: pathlib.Path, args) -> subprocess.Popen:
  """Starts `serve` on the code of a checkout."""
  command = [sys.executable, "-P", __file__, "--serve", f"--slots={args.slots}", f"--ticks={args.ticks}"]
  return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(directory)})


def ask(program: subprocess.Popen, mix: str) -> dict[str, float]:
  """Returns what a program measures of a mix.

  Raises:
    OSError: the program has ended.
  """
  program.stdin.write(mix + "\n")
  program.stdin.flush()
  line = program.stdout.readline()
  if not line:
    raise OSError(f"the program ended with status {program.wait()}; its message is above")
  return json.loads(line)


def solve(long: dict[str, float], short: dict[str, float]) -> dict[str, float]:
  """Returns the microseconds of a token and of a request, and those of a token with all that a mix needs."""
  determinant = long["tokens"] * short["requests"] - short["tokens"] * long["requests"]
  token = (long["seconds"] * short["requests"] - short["seconds"] * long["requests"]) / determinant
  request = (long["tokens"] * short["seconds"] - short["tokens"] * long["seconds"]) / determinant
  return {"token": 1e6 * token, "request": 1e6 * request} | {
      f"token_{name}": 1e6 * one["seconds"] / one["tokens"] for name, one in (("long", long), ("short", short))}


def main(argv: list[str]) -> None:
  """Measures and writes the record."""
  from benchmarks import harness  # not in the other checkout's process

  parser = harness.Parser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
  parser.add_argument("--slots", type=int, default=128, help="requests that run at once")
  parser.add_argument("--ticks", type=int, default=16, help="ticks of a dispatch")
  parser.add_argument("--rounds", type=int, default=7, help="timed turns of each program")
  parser.add_argument("--other", default="", help="checkout of another commit, which takes turns")
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  if args.other and not (pathlib.Path(args.other) / "mor" / "serve").is_dir():
    raise ValueError(f"--other={args.other} holds no mor/serve; give a checkout of this project")
  directories = {"now": harness.ROOT} | ({"other": pathlib.Path(args.other)} if args.other else {})
  sizes = {name: getattr(args, name) for name in ("slots", "ticks", "rounds")}
  record = harness.header("host", argv, "float32", sizes) | {"commits": {
      name: harness.commit(directory) for name, directory in directories.items()}}
  programs = {name: start_program(directory.resolve(), args) for name, directory in directories.items()}
  rounds: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
  for index in range(1 + args.rounds):
    for name, program in programs.items():
      rounds[name].append(solve(ask(program, "long"), ask(program, "short")))
      print(f"round {index} of {args.rounds}: {name} {rounds[name][-1]}", file=sys.stderr, flush=True)
  for program in programs.values():
    program.communicate()
  record["microseconds"] = {name: {what: harness.spread([one[what] for one in found[1:]]) for what in found[0]}
                            for name, found in rounds.items()}
  if args.other:
    record["other_per_now"] = {what: harness.ratios(*([one[what] for one in rounds[name][1:]] for name in ("other", "now")))
                               for what in rounds["now"][0]}
  harness.write(record, args.out)


NOTE = ("{sizes[slots]} slots, {sizes[ticks]} ticks a dispatch; microseconds of the host, medians of {sizes[rounds]} rounds "
        "in turn (least to greatest), load average {load_average:.1f}.")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: a program's costs."""
  def number(spread):
    return f"{spread['median']:.2f} ({spread['min']:.2f}–{spread['max']:.2f})"

  names = ("token", "request", "token_long", "token_short")
  return [["commit", "a token", "a request", "a token of 256, all in", "a token of 16, all in"],
          *[[record["commits"][name], *(number(found[what]) for what in names)]
            for name, found in record["microseconds"].items()]]


if __name__ == "__main__":
  if "--serve" in sys.argv:
    parser = argparse.ArgumentParser()
    for name in ("slots", "ticks"):
      parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--serve", action="store_true")
    serve(parser.parse_args())
  else:
    from benchmarks import harness
    harness.run(main)
