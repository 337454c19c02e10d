"""Which program of a tick the host picks for the requests in the slots, and that none of them branches."""

import jax
import pytest

from mor.decode import sampling
from mor.decode import tick
from mor.decode import variant
from mor.exits import tick as exit_tick
from tests.helpers import exiting
from tests.helpers import platforms
from tests.helpers import serving

GREEDY, DRAWN = sampling.Sampling(), sampling.Sampling(temperature=1.0)
FILTERED = sampling.Sampling(temperature=1.0, top_p=0.9)


@pytest.mark.parametrize("settings, kind", [
    ([], "greedy"), ([GREEDY], "greedy"), ([GREEDY, DRAWN], "drawn"), ([FILTERED, DRAWN, GREEDY], "filtered"),
    ([GREEDY, sampling.Sampling(repetition_penalty=1.2)], "filtered")])
def test_the_least_program_that_serves_all_slots(settings, kind):
  assert variant.pick(settings, True, False) == variant.Variant(), "a CPU has one program"
  with platforms.pretend("tpu"):
    assert variant.pick(settings, True, False) == variant.Variant(kind, True, False)
    assert variant.pick(settings, False, True) == variant.Variant(kind, False, True)


@pytest.mark.parametrize("kind, exits", [
    ("plain", False), ("expert_choice", True), pytest.param("hybrid", True, marks=pytest.mark.slow)])
def test_no_program_for_an_accelerator_branches(kind, exits):
  """A plain model cut at its exits is the exception: with exits a deeper pass runs only where it is needed."""
  with platforms.pretend("gpu"):
    made = serving.engine(exiting.model(kind), storage="dense", exits=exiting.exits(kind, first=7, monitor=True))
    runner = made.runner
    for name, logprobs in (("greedy", False), ("filtered", True)):
      program = jax.make_jaxpr(lambda weights, slots: exit_tick.run.__wrapped__(
          runner.decoder, weights, slots, num_ticks=2, vocab_size=60, setup=runner.setup,
          variant=variant.Variant(name, logprobs, exits)))(runner.weights, runner.slots)
      assert not platforms.find_branches(program), (name, logprobs)


@pytest.mark.parametrize("name", sampling.KINDS)
def test_no_program_without_exits_branches(name):
  with platforms.pretend("gpu"):
    runner = serving.engine(serving.model(), storage="dense").runner
    program = jax.make_jaxpr(lambda weights, slots: tick.run.__wrapped__(
        runner.decoder, weights, slots, num_ticks=2, vocab_size=60, together=False,
        variant=variant.Variant(name, True, False)))(runner.weights, runner.slots)
    assert not platforms.find_branches(program)
