"""What the program of a tick must be able to do, as far as the host knows it.

On a CPU the device decides while it runs what its slots ask for: a branch costs
nothing there, and one program is compiled. An accelerator would wait for the host at
each branch, so there the host looks at the requests in the slots and picks a program:
greedy, drawn or filtered, with or without log-probabilities, with exits or none. Each
is compiled when a dispatch first needs it, and gives every request the same tokens.
"""

from collections.abc import Iterable
import dataclasses

from mor.decode import control
from mor.decode import sampling as sampling_lib


@dataclasses.dataclass(frozen=True)
class Variant:
  """One program of a tick; None decides on the device.

  Attributes:
    sampling: kind of `sampling.KINDS` that serves all slots.
    logprobs: whether log-probabilities are computed.
    exits: whether tokens may leave early.
  """

  sampling: str | None = None
  logprobs: bool | None = None
  exits: bool | None = None


def pick(settings: Iterable[sampling_lib.Sampling], logprobs: bool, exits: bool) -> Variant:
  """Returns the least program that serves requests.

  Args:
    settings: of the requests.
    logprobs: whether any wants log-probabilities.
    exits: whether any may leave early.
  """
  if control.adapts():
    return Variant()
  kinds = sampling_lib.KINDS
  return Variant(max((s.kind for s in settings), key=kinds.index, default=kinds[0]), logprobs, exits)
