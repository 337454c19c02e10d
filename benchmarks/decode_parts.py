"""What the parts of a tick cost, measured on the states of running engines."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from mor.decode import cache as cache_lib
from mor.decode import slots as slots_lib
from mor.decode import tick
from mor.serve import engine as engine_lib
from mor.serve import request as request_lib

_TURNS = 8  # repetitions in one dispatch
_ROUNDS = 9


def request(prompt: list[int], num_new: int) -> request_lib.Request:
  """Returns a greedy request."""
  return request_lib.make(prompt, max_tokens=num_new)


def kv_bytes(engine: engine_lib.Engine) -> int:
  """Returns the bytes of keys and values that the engine has allocated."""
  cache = engine.runner.slots.cache
  return sum(a.nbytes for a in jax.tree.leaves((cache.edge, cache.stack)))


def measure(full: engine_lib.Engine, routed: engine_lib.Engine, mean_depth: float, clock: str) -> dict[str, float]:
  """Seconds (on a clock of `harness`) of a pass and of the rest of a tick, in the two engines' states.

  pass_full, pass_routed   the shared stack for all slots, at steps as in that run
  edge_full, edge_routed   embedding, prelude, coda, head and sampling of B and of
                           B / mean_depth rows, each in a program of just so many
  """
  num = full.num_slots
  few = max(1, round(num / mean_depth))
  programs = {
      "pass_full": _pass(full, np.arange(_TURNS)[:, None] % full.runner.decoder.num_steps + np.zeros((1, num), int)),
      "pass_routed": _pass(routed, _steps(routed)),
      "edge_full": _edge(full, num),
      "edge_routed": _edge(full, few),
  }
  timed = [harness.Program(name, function) for name, function in programs.items()]
  harness.take_turns(timed, _ROUNDS, warm_up=1)
  return {one.name: statistics.median(one.seconds(clock)) / _TURNS for one in timed} | {"edge_routed_rows": few}


def _steps(engine) -> np.ndarray:
  """Steps `[turn, B]` as often as they occur: as the entries that each step has stored."""
  length_R = np.asarray(engine.runner.slots.cache.length_BR).sum(axis=0).astype(float)
  if len(length_R) < engine.runner.decoder.num_steps:  # one row for all steps
    length_R = np.ones(engine.runner.decoder.num_steps)
  rng = np.random.default_rng(0)
  return rng.choice(len(length_R), (_TURNS, engine.num_slots), p=length_R / length_R.sum())


def _pass(engine, steps_KB):
  """Returns a program of the stack alone; entries are written over and over in the same places."""
  decoder, weights = engine.runner.decoder, engine.runner.weights

  @jax.jit
  def run(slots, steps_KB):
    run_B = jnp.ones(engine.num_slots, bool)

    def body(carry, step_B):
      cache, h_BD = carry
      new, y_BD = decoder.run_pass(weights, cache, h_BD, cache_lib.one_each(slots.position_B, step_B, run_B))
      return (cache.replace(stack=new.stack), h_BD + 1e-3 * y_BD), None

    (cache, h_BD), _ = jax.lax.scan(body, (slots.cache, slots.h_BD), steps_KB)
    return cache.stack, h_BD

  run = _donating(run)
  return lambda: run(engine, jnp.asarray(steps_KB, jnp.int32))


def _donating(run):
  """Copies of an engine's buffers would cost more than what is timed, so one is kept and donated on."""
  state: dict[str, Any] = {}
  jitted = jax.jit(lambda stack, slots, steps_KB: run(
      slots.replace(cache=slots.cache.replace(stack=stack)), steps_KB), donate_argnums=0)

  def call(engine, steps_KB):
    slots = engine.runner.slots
    stack = state.pop("stack", None)
    if stack is None:
      stack = jax.tree.map(jnp.copy, slots.cache.stack)
    bare = slots.replace(cache=slots.cache.replace(stack=()))
    stack, h_BD = jitted(stack, bare, steps_KB)
    state["stack"] = stack
    return h_BD
  return call


def _edge(engine, num: int):
  """Returns a program of everything but the stack, for the first `num` slots."""
  decoder, weights = engine.runner.decoder, engine.runner.weights
  state: dict[str, Any] = {}

  def run(edge, slots):
    all_B = jnp.ones(num, bool)
    tokens = cache_lib.one_each(slots.position_B, jnp.zeros(num, jnp.int32), all_B)

    def body(carry, _):
      edge, token_B = carry
      cache = slots.cache.replace(edge=edge)
      cache, h_BD = decoder.edge("prelude", weights, cache, decoder.embed(weights, token_B), tokens)
      cache, h_BD = decoder.edge("coda", weights, cache, h_BD, tokens)
      token_B, _ = tick.next_tokens(decoder, weights, slots, h_BD, all_B, engine.model.vocab_size)
      return (cache.edge, token_B), None

    return jax.lax.scan(body, (edge, slots.token_B), None, length=_TURNS)[0]

  jitted = jax.jit(run, donate_argnums=0)

  def call():
    slots = slots_lib.first(engine.runner.slots, num)
    edge = state.pop("edge", None)
    if edge is None:
      edge = jax.tree.map(jnp.copy, slots.cache.edge)
    state["edge"], token_B = jitted(edge, slots.replace(cache=slots.cache.replace(edge=(), stack=())))
    return token_B
  return call
