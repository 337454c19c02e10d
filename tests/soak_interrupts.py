"""Interrupts an engine's steps at random moments, and compares what it answers with what `generate` does.

  python -m tests.soak_interrupts --seed=0 --num=500

Half of the interrupts come at a random line of `mor/serve`, half by a signal at a random time. Prints one JSON
object: how often the engine went on exactly, refused every later call, or was done before. Exit status 1 if an
answer or an event is wrong, or lost. Some minutes; run by hand.
"""

import argparse
import collections
import json
import random
import sys
import time

from tests.helpers import exiting
from tests.helpers import interrupts
from tests.helpers import serving


def make_cases():
  """Returns functions that make engines, each with requests and what they are answered: an engine, a small pool, exits."""
  plain, some = serving.model(), serving.requests(12)
  pressing = serving.requests(6, seed=1, max_tokens=20, stop_tokens=[])
  early, greedy = exiting.model("middle"), serving.requests(8, seed=2, **exiting.GREEDY)
  verified = [(prompt, dict(options, exit="verify", threshold=0.2)) for prompt, options in greedy]
  return [
      (lambda: serving.engine(plain), some, serving.reference(plain, some)),
      (lambda: serving.engine(plain, num_pages=24, num_edge_pages=12), pressing, serving.reference(plain, pressing)),
      (lambda: exiting.engine(early, "middle"), verified, serving.reference(early, greedy)),
  ]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--num", type=int, default=500)
  args = parser.parse_args()
  rng, outcomes = random.Random(args.seed), collections.Counter()
  for index, (make, requests, expected) in enumerate(cases := make_cases()):
    engine = make()
    lines, begun = interrupts.count_lines(engine, requests, expected), time.perf_counter()
    interrupts.run(engine, requests, expected, 0, interrupts.at_line(0, interrupts.interrupt))
    seconds = (time.perf_counter() - begun) / 5
    wanted = (index + 1) * args.num // len(cases)
    while outcomes["exact"] + outcomes["refused"] < wanted:
      interruption = interrupts.choose(rng, lines, seconds)
      outcome = interrupts.run(engine, requests, expected, rng.randrange(6), interruption)
      outcomes[outcome] += 1
      if outcome == "refused":
        engine = make()
  print(json.dumps(dict(seed=args.seed, **outcomes)))
  return 0


if __name__ == "__main__":
  sys.exit(main())
