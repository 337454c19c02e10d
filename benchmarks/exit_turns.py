"""Who takes turns in the benchmark of early exit (`early_exit.py`), and what a round of turns took."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from benchmarks import harness
from benchmarks import hf_early_exit
from mor.serve import engine as engine_lib

_ANSWER = 16  # tokens of an answer at most


@dataclasses.dataclass
class Asked(harness.Timed):
  """A variant that answers prompts; its work is counted in tokens.

  Attributes:
    tokens: tokens of each prompt's continuation, of the last round.
  """

  tokens: list[list[int]] = dataclasses.field(default_factory=list, init=False)

  def start_round(self) -> None:
    """Begins a round."""
    super().start_round()
    self.tokens = []


@dataclasses.dataclass
class Variant(Asked):
  """Requests of one kind, and an engine that serves them."""

  engine: engine_lib.Engine
  options: list[dict[str, Any]]  # of the requests, in turn
  early: int = 0
  drafts: int = 0
  confirmed: int = 0

  def start_round(self) -> None:
    """Begins a round."""
    super().start_round()
    self.early = self.drafts = self.confirmed = 0

  def run(self, prompts: list[list[int]], num_tokens: int) -> None:
    """Answers some prompts, as many at once as the engine has slots."""
    self.begin(prompts, num_tokens)
    while self.step():
      pass
    self.end()

  def begin(self, prompts: list[list[int]], num_tokens: int) -> None:
    """Takes the prompts in."""
    self._before = self.engine.metrics()
    self._lone, self._given = len(prompts) == 1, 0
    self._numbers = self._submit(prompts, num_tokens)

  def step(self) -> bool:
    """Runs one dispatch to its end; returns False once no prompt waits, when the timing ends."""
    if self._given and not self.engine.scheduler.queue and not self._lone or self.engine.idle:
      return False
    self._given += len(self.time(self._dispatch))
    return True

  def _dispatch(self) -> list[Any]:
    events = self.engine.step()
    if not self._lone:  # the next variant takes its turn now
      self.engine.wait()
    return events

  def end(self) -> None:
    """Notes what has come, and lets the last prompts run to their ends."""
    self.amounts[-1] += self._given
    done, before, after = self._finish(self._numbers), self._before, self.engine.metrics()
    self.tokens += [c.tokens for c in done]
    self.early += sum(sum(c.early) for c in done)
    self.drafts += after["drafts"] - before["drafts"]
    self.confirmed += after["confirmed"] - before["confirmed"]

  def answer(self, prompts: list[list[int]]) -> list[list[int]]:
    """Returns short continuations."""
    return [c.tokens for c in self._finish(self._submit(prompts, _ANSWER))]

  def figures(self) -> dict[str, Any]:
    """Returns the figures of the last round."""
    return {"exit_rate": self.early / sum(map(len, self.tokens)), "drafts": self.drafts,
            "acceptance": self.confirmed / self.drafts if self.drafts else None,
            "confirmed_per_token": self.confirmed / sum(map(len, self.tokens))}

  def _submit(self, prompts, num_tokens):
    return [self.engine.submit(prompt, max_tokens=num_tokens, stop_tokens=(), **self.options[i % len(self.options)])
            for i, prompt in enumerate(prompts)]

  def _finish(self, numbers):
    while not self.engine.idle:
      self.engine.step()
    self.engine.wait()
    return [self.engine.take(number) for number in numbers]


@dataclasses.dataclass
class Peer(Asked):
  """The same of transformers."""

  peer: hf_early_exit.EarlyExit
  draft: hf_early_exit.Draft | None
  deep_passes: int = 0

  def start_round(self) -> None:
    """Begins a round."""
    super().start_round()
    self.deep_passes = 0

  def run(self, prompts: list[list[int]], num_tokens: int) -> None:
    """Answers some prompts, one at a time."""
    done = self.time(lambda: [self.peer.generate(prompt, num_tokens, draft=self.draft) for prompt in prompts])
    self.amounts[-1] += sum(len(o.tokens) for o in done)
    self.tokens += [o.tokens for o in done]
    self.deep_passes += sum(o.deep_passes for o in done)

  def answer(self, prompts: list[list[int]]) -> list[list[int]]:
    """Returns short continuations."""
    return [self.peer.generate(prompt, _ANSWER, draft=self.draft).tokens for prompt in prompts]

  def figures(self) -> dict[str, Any]:
    """Returns the figures of the last round."""
    return {"exit_rate": 0.0, "drafts": None, "acceptance": None,
            "confirmed_per_token": 1.0 - self.deep_passes / sum(map(len, self.tokens))}


def together(variants: Sequence[Variant], prompts: list[list[int]], num_tokens: int) -> None:
  """Runs the same prompts through all variants, one dispatch of each in turn, so that the load of the machine falls on all alike."""
  for variant in variants:
    variant.begin(prompts, num_tokens)
  left = list(variants)
  while left:
    left = [variant for variant in left if variant.step()]
  for variant in variants:
    variant.end()
