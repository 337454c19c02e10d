"""The batching simulator: by hand, against closed forms, against Table K.2."""

import numpy as np
import pytest

from benchmarks import throughput

# Three requests; the loops of each token.
REQUESTS = [np.array(loops_T) for loops_T in ([1, 3], [2], [1, 1])]
PASS_MS, EDGE_MS = throughput.interpolate({1: 2, 2: 3}), throughput.interpolate({1: 0.5, 2: 1.0})
# Two slots. static: {A1 B1} 2 loops, {A2 -} 3, then {C1 -} and {C2 -} as a batch of one.
# sequence: {A1 B1} 2, {A2 C1} 3, {C2} 1. depth: {A1 B1} {A2 B1} {A2 C1} {A2 C2}, leavers 1, 1, 1 and 2.
BY_HAND = {
    "static": (2 * 3 + 1) + (3 * 3 + 1) + 2 * (2 + 0.5),
    "sequence": (2 * 3 + 1) + (3 * 3 + 1) + (2 + 0.5),
    "depth": 3 * (3 + 0.5) + (3 + 1),
}
PASS_MS_5 = throughput.interpolate({1: 1.0, 3: 1.7, 5: 2.9})
EXITS = (0.5, 0.2, 0.3)


def queue(exits=EXITS, num=60, seed=0):
  return throughput.draw(np.random.default_rng(seed).integers(1, 15, num).tolist(), exits, seed)


@pytest.mark.parametrize("policy", throughput.POLICIES)
def test_equals_a_queue_played_by_hand(policy):
  rate = throughput.simulate(REQUESTS, 2, policy, PASS_MS, EDGE_MS)
  np.testing.assert_allclose(rate, 1000 * 5 / BY_HAND[policy])


@pytest.mark.parametrize("loops", [1, 3])
def test_depth_wise_is_sequence_wise_where_all_tokens_go_equally_deep(loops):
  requests = queue([0.0] * (loops - 1) + [1.0])
  rates = [throughput.simulate(requests, 5, policy, PASS_MS_5, throughput.constant(0.3))
           for policy in ("sequence", "depth")]
  np.testing.assert_allclose(*rates)


@pytest.mark.parametrize("seed", range(3))
def test_policies_are_ordered(seed):
  """With the same passes to pay for, waiting less is never slower."""
  requests = queue(seed=seed)
  static, sequence, depth = (
      throughput.simulate(requests, 5, policy, throughput.constant(1.0)) for policy in throughput.POLICIES)
  assert static < sequence < depth


def test_long_queues_approach_the_closed_forms():
  slots, token_ms = 7, 0.4
  requests = throughput.draw([20] * 100 * slots, EXITS, seed=0)
  cost = throughput.constant(token_ms * slots)
  depth = throughput.simulate(requests, slots, "depth", cost)
  whole = throughput.simulate([np.ones_like(loops_T) for loops_T in requests], slots, "sequence", cost)
  assert throughput.mean_loops(EXITS) == pytest.approx(1.8)
  # 14,000 draws: one standard deviation of the mean number of loops is 0.4 % of it.
  np.testing.assert_allclose(depth, throughput.depth_limit(token_ms, EXITS), rtol=0.02)
  np.testing.assert_allclose(whole, throughput.sequence_limit(token_ms), rtol=1e-12)


def test_one_slot_pays_for_every_loop():
  requests = queue()
  loops = sum(int(loops_T.sum()) for loops_T in requests)
  tokens = sum(map(len, requests))
  for policy in throughput.POLICIES:
    np.testing.assert_allclose(throughput.simulate(requests, 1, policy, throughput.constant(2.0)),
                               1000 * tokens / (2 * loops))


def test_table_k2_of_the_paper():
  rows = throughput.table_k2()
  assert len(rows) == 11
  worst = max(rows, key=lambda row: abs(row.error))
  assert abs(worst.error) <= 0.02, f"{worst.name}: {worst.simulated:.5g} against {worst.published}"
  assert [row.name for row in rows if row.given == "time of K.1"] == ["Gemma 2B, sequence-wise"]


def test_times_lie_on_lines_between_the_measured():
  assert [PASS_MS_5(rows) for rows in (1, 2, 3, 4, 5)] == pytest.approx([1.0, 1.35, 1.7, 2.3, 2.9])
  with pytest.raises(ValueError, match="6 rows, but times are known up to 5"):
    PASS_MS_5(6)


@pytest.mark.parametrize("arguments, message", [
    (([], 2, "depth"), "empty queue"),
    (([np.array([], int)], 2, "depth"), "empty queue or request"),
    (([np.array([0])], 2, "depth"), "less than one loop"),
    ((REQUESTS, 0, "depth"), "slots=0"),
    ((REQUESTS, 2, "wide"), "use one of"),
])
def test_a_bad_queue_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    throughput.simulate(*arguments, throughput.constant(1.0))


@pytest.mark.parametrize("exits", [(), (0.5, 0.4), (1.5, -0.5)])
def test_exits_are_probabilities(exits):
  with pytest.raises(ValueError, match="sum to 1"):
    throughput.draw([3], exits, seed=0)
