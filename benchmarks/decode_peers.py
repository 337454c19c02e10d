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
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import decode_parts
from benchmarks import harness as results
from benchmarks import peers

FORMATS = ("bfloat16", "int8")  # of our weights


def measure(args, num_slots: int, models: dict[str, Any], make_runner: Callable) -> dict[str, Any]:
  """Tokens per second of every program, in turn."""
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
      peer = peers.make(name, vanilla.config, vanilla.variables["params"], results.num_cores(), pathlib.Path(directory))
      programs[name] = _peer(peer, num_slots, args.peer_tokens, vanilla.config.vocab_size)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for turn in range(args.rounds + 1):
      for name, program in programs.items():
        wall, cpu = time.perf_counter(), time.process_time()
        program()
        if turn:
          seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
      rates = ", ".join(f"{name} {num_slots * args.peer_tokens / s[-1][0]:.0f}" for name, s in seconds.items() if s)
      print(f"batch {num_slots}, round {turn} of {args.rounds}: {rates}", file=sys.stderr, flush=True)
  which = 0 if args.pin is not None else 1
  rate = {name: [num_slots * args.peer_tokens / s[which] for s in values] for name, values in seconds.items()}
  best = max(names, key=lambda name: statistics.median(rate[name]))
  return {"batch": num_slots, "best_peer": best, "tokens_per_second": {name: results.spread(v) for name, v in rate.items()},
          "ratio_to_best_peer": {name: results.spread([a / b for a, b in zip(rate[name], rate[best])]) for name in ours}}


def _prompts(num_slots, vocab_size):
  return [[int(t)] for t in np.random.default_rng(0).integers(0, vocab_size, num_slots)]


def _engine(runner, num_slots, num_tokens):
  prompts = itertools.cycle(_prompts(num_slots, runner.engine.model.vocab_size))
  runner.requests = (decode_parts.request(prompt, num_tokens) for prompt in prompts)
  return lambda: runner.run(num_slots * num_tokens)


def _peer(peer, num_slots, num_tokens, vocab_size):
  prompts = _prompts(num_slots, vocab_size)

  def run():
    assert peer.generate(prompts, num_tokens).shape == (num_slots, num_tokens)
  return run
