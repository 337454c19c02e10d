"""The benchmark of the host: its two equations, and a turn of a tiny engine."""

import pytest

from benchmarks import host


def test_costs_solve_both_equations():
  """2 us a token and 300 us a request."""
  mixes = [dict(tokens=20000, requests=80), dict(tokens=16000, requests=1000)]
  long, short = (mix | dict(seconds=2e-6 * mix["tokens"] + 3e-4 * mix["requests"]) for mix in mixes)
  costs = host.solve(long, short)
  assert costs["token"] == pytest.approx(2) and costs["request"] == pytest.approx(300)
  assert costs["token_short"] == pytest.approx(2 + 300 * 1000 / 16000)


def test_what_is_no_checkout_is_refused(tmp_path):
  with pytest.raises(ValueError, match="holds no mor/serve; give a checkout"):
    host.main([f"--other={tmp_path}"])


@pytest.mark.slow
def test_a_turn_of_an_engine():
  engine = host.make_engine(num_slots=3, ticks=4)
  got = host.measure(engine, "short")
  assert got["requests"] == 3 * 8 and got["tokens"] == 3 * 8 * 16 and got["seconds"] > 0
