"""Our engine beside other programs: the same vanilla weights, the same requests.

Requests of one prompt token and a fixed number of new tokens. A peer decodes one
batch of them, all rows in use from the first step to the last: the best case of a
static batch. Our engines decode as many tokens with requests waiting. Prompt,
sampling (greedy) and host are in the time. Ours run in bfloat16, which the peers'
best formats are, and in int8, which is less exact.
"""

import argparse
from collections.abc import Callable
import itertools
import pathlib
import statistics
import tempfile
from typing import Any

import numpy as np

from benchmarks import decode_parts
from benchmarks import harness
from benchmarks import peers

FORMATS = ("bfloat16", "int8")  # of our weights


def measure(args, num_slots: int, models: dict[str, Any], make_runner: Callable) -> dict[str, Any]:
  """Returns tokens per second of every program, in turn."""
  ours = [(name, form) for form in FORMATS for name in ("vanilla", *(f"balanced-r{r}" for r in args.recursions))]
  programs = {}
  for name, form in ours:
    options = argparse.Namespace(**{**vars(args), "format": form})
    programs[f"{name} {form}"] = _engine(make_runner(name, options, num_slots, models), num_slots, args.peer_tokens)
  ours = list(programs)
  names = list(peers.PEERS) if args.peers == "all" else args.peers.split(",")
  with tempfile.TemporaryDirectory() as directory:
    vanilla = models["vanilla"]
    for name in names:
      peer = peers.make(name, vanilla.config, vanilla.variables["params"], harness.num_cores(), pathlib.Path(directory))
      programs[name] = _peer(peer, num_slots, args.peer_tokens, vanilla.config.vocab_size)
    timed = [harness.Program(name, function, num_slots * args.peer_tokens) for name, function in programs.items()]
    harness.take_turns(timed, args.rounds, warm_up=1, label=f"batch {num_slots}, ",
                       tell=lambda program: f"{program.rates(args.clock)[-1]:.0f}")
  rate = {program.name: program.rates(args.clock) for program in timed}
  best = max(names, key=lambda name: statistics.median(rate[name]))
  return {"batch": num_slots, "best_peer": best, "tokens_per_second": {name: harness.spread(v) for name, v in rate.items()},
          "ratio_to_best_peer": {name: harness.ratios(rate[name], rate[best]) for name in ours}}


def _prompts(num_slots, vocab_size):
  return [[int(t)] for t in np.random.default_rng(0).integers(0, vocab_size, num_slots)]


def _engine(runner, num_slots, num_tokens):
  prompts = itertools.cycle(_prompts(num_slots, runner.engine.model.vocab_size))
  runner.requests = (decode_parts.request(prompt, num_tokens) for prompt in prompts)
  runner.start_round()  # the program around it is timed
  return lambda: runner.run(num_slots * num_tokens)


def _peer(peer, num_slots, num_tokens, vocab_size):
  prompts = _prompts(num_slots, vocab_size)

  def run():
    assert peer.generate(prompts, num_tokens).shape == (num_slots, num_tokens)
  return run
