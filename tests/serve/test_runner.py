"""What a dispatch gave, in order."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import sampling
from mor.decode import slots as slots_lib
from mor.decode import tick
from mor.exits import ring
from mor.model import kernels
from mor.serve import runner
from tests.helpers import serving


def make_out(rng, exits: bool) -> slots_lib.Out:
  """Random results of 5 ticks, the last of which were not run: 4 slots, three places with exits."""
  num_ticks, num_slots, places = 5, 4, 3 if exits else 1
  count_KB = rng.integers(0, places + 1, (num_ticks, num_slots))
  shape = num_ticks, num_slots, places
  given_KBW = np.arange(places)[None, None, :] < count_KB[:, :, None]
  token_KBW = np.where(given_KBW, rng.choice([0, 7, 60, sampling.NOT_FINITE], shape), -1).astype(np.int32)
  report = None
  if exits:
    int_KB = np.zeros(shape[:2], np.int32)
    report = ring.ExitReport(rng.random(shape) < 0.5, int_KB, int_KB, np.zeros((5, 4, 0), np.float32), np.zeros((5, 4, 0), bool))
  new = slots_lib.NewTokens(token_KBW, rng.integers(1, 4, shape).astype(np.int32), rng.random(shape).astype(np.float32),
                            rng.integers(0, 4, shape[:2]).astype(np.int32), report)
  nobody_KB = np.zeros(shape[:2], bool)
  return slots_lib.Out(slots_lib.Ticked(new, nobody_KB, nobody_KB, nobody_KB), np.array(3), np.array(0), np.array(0),
                       np.array(True))


@pytest.mark.parametrize("exits", [False, True])
def test_tokens_come_in_the_order_of_ticks_slots_and_places(exits):
  rng = np.random.default_rng(0)
  for _ in range(20):
    out, expected = make_out(rng, exits), []
    new = out.ticks.new
    for k in range(3):
      for slot in range(4):
        tokens = [int(t) for t in new.token_BW[k, slot] if t != -1]
        for i, token in enumerate(tokens):
          at, is_last = (k, slot, i), i + 1 == len(tokens)
          expected.append((slot, token, int(new.depth_BW[at]), float(new.logprob_BW[at]),
                           exits and bool(new.exits.early_BW[at]), int(new.finish_B[k, slot]) if is_last else 0))
    got = list(runner.list_tokens(out))
    assert got == expected and all(type(x) in (int, float, bool) for row in got for x in row)


@pytest.mark.parametrize("platform, ticks, chunk", [("cpu", (4, 4, 6, 4, 5), 256), ("gpu", (12, 12, 12, 12, 15), 1024),
                                                    ("tpu", (12, 12, 12, 12, 15), 1024)])
def test_a_dispatch_is_longer_on_an_accelerator(platform, ticks, chunk, monkeypatch):
  """Whole rounds of 1 to 5 steps."""
  monkeypatch.setattr(kernels, "platform", lambda: platform)
  schedule = types.SimpleNamespace(cyclic=True)
  decoders = [types.SimpleNamespace(num_steps=1 + i, tables=types.SimpleNamespace(schedule=schedule)) for i in range(5)]
  assert tuple(tick.count_ticks.__wrapped__(decoder) for decoder in decoders) == ticks and runner.count_chunk() == chunk


def test_several_requests_start_in_one_call():
  """In slots 3 and 1 of four; the rows beyond them are padding, and what was in the slots before is gone."""
  greedy, drawn = sampling.Sampling(), sampling.Sampling(temperature=0.5, top_k=3, repetition_penalty=1.5, seed=2**32 - 1)
  starts = [slots_lib.Start(3, (5, 6, 7), 1, 9, greedy, (2,), True), slots_lib.Start(1, (4, 4, 8), 0, 6, drawn, (), False)]
  slots = serving.engine(serving.model(), num_slots=4).runner.slots
  vocab_size = slots.seen_BV.shape[1]
  slots = slots.replace(seen_BV=jnp.ones_like(slots.seen_BV), stop_BE=jnp.zeros_like(slots.stop_BE))
  admission = slots_lib.make_admission(starts, 3, 4, vocab_size)
  got = slots_lib.place(slots, admission)
  assert got.phase_B.tolist() == [slots_lib.FREE, slots_lib.START, slots_lib.FREE, slots_lib.START]
  assert got.token_B.tolist() == [0, 8, 0, 7] and got.position_B.tolist() == [0, 2, 0, 2]
  assert got.index_B.tolist() == [0, 0, 0, 1] and got.left_B.tolist() == [0, 6, 0, 9]
  assert got.logprob_B.tolist() == [False, False, False, True]
  assert got.rows.seed_B.tolist() == [0, 2**32 - 1, 0, 0] and got.rows.top_k_B.tolist() == [0, 3, 0, 0]
  assert np.flatnonzero(got.seen_BV[1]).tolist() == [4, 8] and not got.seen_BV[3].any() and got.seen_BV[::2].all()
  assert got.stop_BE[3].tolist() == [2] + [-1] * 7 and got.stop_BE[1].tolist() == [-1] * 8 and not got.stop_BE[0].any()
