"""A branch that works on a cache in place."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Carry = TypeVar("Carry")


def once(on: jax.Array, function: Callable[[Carry], Carry], carry: Carry) -> Carry:
  """`function(carry)` where `on`, else `carry`: a loop of one turn, because `cond` would copy what it passes through."""
  def body(turn_carry):
    return jnp.bool_(False), function(turn_carry[1])
  return jax.lax.while_loop(lambda turn_carry: turn_carry[0], body, (on, carry))[1]
