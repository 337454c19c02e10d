"""What is asked of several processes is checked before any of them waits for another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor import distributed


@pytest.mark.parametrize("given, said", [
    (dict(mode="auto", process_id=0), ["--distributed=auto with --process_id=0", "one or the other"]),
    (dict(coordinator="a:1"), ["--coordinator=a:1 without --num_processes and --process_id", "give all three"]),
    (dict(num_processes=2, process_id=0), ["--num_processes=2 --process_id=0 without --coordinator"]),
    (dict(coordinator="a", num_processes=2, process_id=0), ["--coordinator=a;", "HOST:PORT"]),
    (dict(coordinator="a:99999", num_processes=2, process_id=0), ["--coordinator=a:99999;", "HOST:PORT"]),
    (dict(coordinator="a:1", num_processes=0, process_id=0), ["--num_processes=0", "at least 1"]),
    (dict(coordinator="a:1", num_processes=2, process_id=2), ["--process_id=2 of --num_processes=2", "use 0 to 1"]),
])
def test_what_does_not_fit_is_one_line(given, said):
  with pytest.raises(ValueError) as caught:
    distributed.initialize(**given)
  assert "\n" not in str(caught.value)
  for words in said:
    assert words in str(caught.value)


def test_no_cluster_is_one_line(monkeypatch):
  def undetected(*unused, **unused_options):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", undetected)
  with pytest.raises(ValueError, match=r"--distributed=auto finds no cluster here \(coordinator_address .*; give"):
    distributed.initialize("auto")


def test_one_process_asks_nobody():
  distributed.initialize()
  assert not jax.distributed.is_initialized() and distributed.is_main() and distributed.process_name() == ""
  tree = {"a": np.ones(2)}
  for mine in (False, True):
    assert distributed.any_process(mine) == distributed.from_main(mine) == mine
  assert distributed.gather(tree) is tree and distributed.abandon(3) == 3
  distributed.barrier("nobody")
  assert not distributed.is_lost(jax.errors.JaxRuntimeError("Connection closed")), "there is no other"


def test_an_error_behind_another_says_that_a_process_is_gone(monkeypatch):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  wrapped = OSError("cannot save")
  wrapped.__cause__ = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
  assert distributed.is_lost(wrapped) and distributed.is_lost(jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"))
  assert not distributed.is_lost(OSError("no space left")) and not distributed.is_lost(None)
  assert not distributed.is_lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))


def test_a_program_is_compiled_before_the_others_are_awaited_and_not_again(monkeypatch, caplog):
  compilations = lambda: sum("Finished XLA compilation of jit(triple)" in r.message for r in caplog.records)
  at_barrier = []
  wait = lambda *, key, timeout_ms: at_barrier.append((key, compilations()))
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(distributed.multihost, "get_barrier_sync_fn", lambda: wait)

  def triple(x, times):
    return x * 3 * times

  jitted = jax.jit(triple, static_argnums=1, donate_argnums=0)
  with jax.log_compiles():
    for times in (1, 2):
      distributed.compile_together(jitted, jnp.ones(4), times)
      assert jitted(jnp.ones(4), times)[0] == 3 * times
  keys, counts = zip(*at_barrier)
  assert counts == (1, 2) and compilations() == 2
  assert len(set(keys)) == 2, "no barrier may be met twice"
