"""Few files take part in a tick: those that the docstrings of `decode/tick.py` and `exits/tick.py` list."""

import pathlib
import re
import sys

import jax
import pytest

import mor
from mor.decode import tick as decode_tick
from mor.exits import tick as exit_tick
from tests.helpers import exiting
from tests.helpers import serving

ROOMS = tuple(str(pathlib.Path(mor.__file__).parent / room) + "/" for room in ("decode", "exits"))


def visited(trace) -> list[str]:
  """Files of the two rooms in which a call of `trace` runs a function, as room/name, in order."""
  found = {}

  def profile(frame, event, _):
    if event == "call" and frame.f_code.co_filename.startswith(ROOMS):
      path = pathlib.Path(frame.f_code.co_filename)
      found.setdefault(f"{path.parent.name}/{path.stem}")

  before = sys.getprofile()
  sys.setprofile(profile)
  try:
    trace()
  finally:
    sys.setprofile(before)
  return list(found)


def listed(docstring: str, room: str = "") -> list[str]:
  """The files that a docstring says a tick visits."""
  found = re.search(r"that a tick visits, in order: ([^.]*)\.", docstring)
  return [room + name for name in found.group(1).replace("\n", " ").split(", ")]


@pytest.mark.parametrize("kind, exits, module, room, most", [
    ("expert_choice", None, decode_tick, "decode/", 9), ("plain", {}, exit_tick, "", 13),
    pytest.param("expert_choice", {}, exit_tick, "", 13, marks=pytest.mark.slow)])
def test_files_that_a_tick_visits(kind, exits, module, room, most):
  engine = serving.engine(exiting.model(kind), exits=exits if exits is None else exiting.exits(kind))
  more = dict(together=False) if exits is None else dict(setup=engine.runner.setup)
  run = module.run.__wrapped__

  def trace():
    jax.make_jaxpr(lambda weights, slots: run(engine.runner.decoder, weights, slots, num_ticks=1, vocab_size=61, **more))(
        engine.runner.weights, engine.runner.slots)

  files = visited(trace)
  assert len(files) <= most
  assert set(files) == set(listed(module.__doc__, room)), files
