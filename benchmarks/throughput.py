"""Simulates the tokens a second of sequence-wise and depth-wise batching.

  python -m benchmarks.throughput --out=benchmarks/results/throughput_k2.json

A static queue of requests is played through `slots` rows of a batch. What a
pass costs is measured beforehand; the simulator adds up the passes.

  static    the next batch starts when every row of this one has ended
  sequence  an ended row is replaced at once; a step makes one token of each row
            and runs as many loops as its deepest row needs
  depth     a pass runs one loop of every row, each at its own depth; a token
            that leaves is followed at once by the next of its request or queue

With a long queue and t ms a token of a full batch, they approach

  sequence  1000 / (t_block)           depth  1000 / (t_loop * E[loops])

`table_k2` compares with the paper's figures. Its simulation, like this one,
leaves out what the exit decision costs, waiting for requests, and the keys and
values that a token would still have to compute at the loops it skips.

Source: Relaxed Recursive Transformers (arXiv 2410.20672), Appendix K.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import numpy as np

from benchmarks import harness

POLICIES = ("static", "sequence", "depth")

Cost = Callable[[int], float]  # ms, from the number of rows


def constant(ms: float) -> Cost:
  """Returns a cost that is the same for any number of rows."""
  return lambda rows: ms


def interpolate(ms: Mapping[int, float]) -> Cost:
  """Returns the cost by measured times, linear between numbers of rows; fewer rows than measured cost the least."""
  rows_B = np.asarray(sorted(ms))
  ms_B = np.asarray([ms[rows] for rows in sorted(ms)], float)

  def cost(rows: int) -> float:
    if rows > rows_B[-1]:
      raise ValueError(f"{rows} rows, but times are known up to {rows_B[-1]}; measure more, or use fewer slots")
    return float(np.interp(rows, rows_B, ms_B))
  return cost


def draw(lengths: Sequence[int], exits: Sequence[float], seed: int) -> list[np.ndarray]:
  """Returns requests of these many tokens; a request is the number of loops of each token.

  Args:
    lengths: tokens of every request.
    exits: probability of leaving after loop 1, 2, ….
    seed: of the draws.
  """
  _check_exits(exits)
  rng = np.random.default_rng(seed)
  return [rng.choice(len(exits), size=length, p=exits) + 1 for length in lengths]


def simulate(requests: Sequence[np.ndarray], slots: int, policy: str, pass_ms: Cost,
             edge_ms: Cost = constant(0.0)) -> float:
  """Plays the queue to its end, its thin tail included.

  Args:
    requests: loops of every token, request by request. A model without loops
      is one whose tokens all take one.
    slots: rows of the batch.
    policy: one of `POLICIES`.
    pass_ms: time of one loop of so many rows (of all layers without loops).
    edge_ms: time of embedding, head and sampling of so many rows.

  Returns:
    Tokens a second.

  Raises:
    ValueError: no request, an empty one, no slot, or an unknown policy.
  """
  _check_queue(requests, slots, policy)
  loops_T = np.concatenate(requests)
  bounds = np.cumsum([0, *map(len, requests)])
  next_B, end_B, run_B = np.zeros((3, slots), int)  # next token, end of the request, loops the token has run
  admitted, group, ms = 0, 0, 0.0
  while True:
    free = np.flatnonzero(next_B == end_B)
    if policy != "static" or len(free) == slots:
      free = free[:len(requests) - admitted]
      next_B[free] = bounds[admitted:admitted + len(free)]
      end_B[free] = bounds[admitted + 1:admitted + 1 + len(free)]
      admitted, group = admitted + len(free), len(free)
    alive_B = next_B < end_B
    if not alive_B.any():
      return 1000 * len(loops_T) / ms
    loops_B = np.where(alive_B, loops_T[np.minimum(next_B, len(loops_T) - 1)], 0)
    run_B += alive_B
    leave_B = alive_B & (run_B == loops_B) if policy == "depth" else alive_B
    # A static batch keeps its ended rows.
    passes, rows, edge_rows = {
        "static": (loops_B.max(), group, group),
        "sequence": (loops_B.max(), alive_B.sum(), alive_B.sum()),
        "depth": (1, alive_B.sum(), leave_B.sum()),
    }[policy]
    ms += passes * pass_ms(int(rows)) + (edge_ms(int(edge_rows)) if edge_rows else 0.0)
    next_B += leave_B
    run_B[leave_B] = 0


def sequence_limit(block_ms: float) -> float:
  """Returns tokens a second of a full batch whose tokens cost `block_ms` each."""
  return 1000 / block_ms


def depth_limit(loop_ms: float, exits: Sequence[float]) -> float:
  """Returns tokens a second of a full batch whose loops cost `loop_ms` a token each."""
  return 1000 / (loop_ms * mean_loops(exits))


def mean_loops(exits: Sequence[float]) -> float:
  """Returns E[loops] of the probabilities of leaving after loop 1, 2, …."""
  _check_exits(exits)
  return float(np.dot(np.arange(1, len(exits) + 1), exits))


@dataclasses.dataclass(frozen=True)
class Row:
  """A published figure beside the simulated one.

  Attributes:
    name: model, data and batching.
    published: tokens a second of Table K.2, or a ratio of them.
    simulated: ours.
    given: what the simulation was told, and whence.
  """

  name: str
  published: float
  simulated: float
  given: str

  @property
  def error(self) -> float:
    """Relative, signed."""
    return self.simulated / self.published - 1


# Relaxed Recursive Transformers, Tables K.1 and K.2, prompts of 512 tokens and
# 2048 new ones, on an A100. ms of a token at the largest batch, blocks alone.
_GEMMA_MS = 0.616
# Full depth of two loops is 1.16 times as fast as Gemma, by Table K.1.
_LOOP_MS = _GEMMA_MS / 1.16 / 2
_SLOTS = 43  # of recursive Gemma; the rates do not depend on it
K2_REQUESTS = 100 * _SLOTS  # a queue long enough for a tail of about 1 %
_DATASETS = ("SlimPajama", "RedPajama", "PG19")
_VANILLA, _SEQUENCE = 1080, 1528  # mean tokens a second of Gemma, static and continuous

_K1, _TIME = "time of K.1", "time implied by this figure"
_LOOPS, _BOTH = "time of K.1, E[loops] implied by this figure", "time implied by this figure, E[loops] by its parts"

# Whole models: name, published tokens a second, ms, given.
_WHOLE = (("Gemma 2B", 1622, _GEMMA_MS, _K1), ("TinyLlama 1.1B", 1227, 0.815, _TIME), ("Pythia 1B", 829, 1.206, _TIME))
# Two loops: E[loops] of each data set.
_RECURSIVE_LOOPS, _RECURSIVE = (1.19, 1.24, 1.56), (3159, 3050, 2421)
_RELAXED_LOOPS, _RELAXED_MS = (1.31, 1.37, 1.67), 0.323


def table_k2() -> list[Row]:
  """Simulates the figures of Table K.2 that the published numbers let us simulate.

  Only Gemma's own row is predicted: its time is measured apart from its rate.
  The paper prints no E[loops]. Those of the recursive rows follow from their
  rates and loop time, so these rows check the simulator (queue, drawn exits and
  tail, against a closed form), and that one loop time fits three data sets; not
  the exits. Where the time too is implied, only the simulator is checked.
  """
  rows = [Row(f"{name}, sequence-wise", published, _play([1.0], "sequence", ms), given)
          for name, published, ms, given in _WHOLE]
  rates = [_play([2 - loops, loops - 1], "depth", _LOOP_MS) for loops in _RECURSIVE_LOOPS]
  rows += [Row(f"recursive Gemma, {data}, depth-wise", published, rate, _LOOPS)
           for data, published, rate in zip(_DATASETS, _RECURSIVE, rates, strict=True)]
  mean = float(np.mean(rates))
  relaxed = float(np.mean([_play([2 - loops, loops - 1], "depth", _RELAXED_MS) for loops in _RELAXED_LOOPS]))
  return rows + [
      Row("recursive Gemma, mean", 2877, mean, _LOOPS),
      Row("recursive Gemma, mean / static Gemma", 2.66, mean / _VANILLA, _LOOPS),
      Row("recursive Gemma, mean / sequence-wise Gemma", 1.88, mean / _SEQUENCE, _LOOPS),
      Row("relaxed Gemma, rank 64, mean", 2157, relaxed, _BOTH),
      Row("relaxed Gemma, rank 64, mean / static Gemma", 2.00, relaxed / _VANILLA, _BOTH),
  ]


def _play(exits: list[float], policy: str, token_ms: float) -> float:
  """Plays a queue of K2_REQUESTS."""
  lengths = np.maximum(1, np.random.default_rng(0).normal(20, 5, K2_REQUESTS)).astype(int)
  return simulate(draw(lengths.tolist(), exits, seed=1), _SLOTS, policy, constant(token_ms * _SLOTS))


def _check_exits(exits: Sequence[float]) -> None:
  if not len(exits) or min(exits) < 0 or abs(sum(exits) - 1) > 1e-6:
    raise ValueError(f"exits={list(exits)}; give probabilities of leaving after loop 1, 2, … that sum to 1")


def _check_queue(requests: Sequence[np.ndarray], slots: int, policy: str) -> None:
  if policy not in POLICIES:
    raise ValueError(f"policy={policy!r}; use one of {POLICIES}")
  if slots < 1:
    raise ValueError(f"slots={slots}; use at least 1")
  if not requests or not all(map(len, requests)):
    raise ValueError("an empty queue or request; give every request at least one token")
  if min(int(loops_T.min()) for loops_T in requests) < 1:
    raise ValueError("a token of less than one loop; loops count from 1")


NOTE = (
    "Relaxed Recursive Transformers, Table K.2; {sizes[requests]} requests.")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: the simulator beside the paper."""
  rows = [[row["name"], f"{row['published']:g}", f"{row['simulated']:.4g}", f"{100 * row['error']:+.2f} %", row["given"]]
          for row in record["rows"]]
  return [["figure", "published", "simulated", "error", "given"], *rows]


def main(argv: list[str]) -> None:
  """Simulates and writes the record."""
  parser = harness.Parser(prog="python -m benchmarks.throughput", description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  rows = table_k2()
  record = harness.header("throughput", argv, "float64", {"requests": K2_REQUESTS})
  record["rows"] = [{**dataclasses.asdict(row), "error": row.error} for row in rows]
  record["largest_error"] = max(abs(row.error) for row in rows)
  harness.write(record, args.out)


if __name__ == "__main__":
  harness.run(main)
