"""Damaged inputs are refused in one line; `tests/fuzz_inputs.py` does it for longer."""

import pytest

from tests import fuzz_inputs


@pytest.mark.parametrize("kind", fuzz_inputs.KINDS)
def test_damaged_inputs_are_read_or_refused_in_one_line(kind):
  outcomes = [fuzz_inputs.try_one(kind, seed) for seed in range(6)]
  assert not [what for outcome, what in outcomes if outcome == "broken"]
  assert kind == "prompts" or "refused" in [outcome for outcome, _ in outcomes], "a line of prompts is answered alone"
