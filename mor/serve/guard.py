"""One caller at a time inside an engine, and what a call that an exception ends leaves behind.

An exception may come out of a call at any moment: Ctrl-C, a signal handler, a timeout of a thread. A change of
several parts of the state is *torn* if it ends in the middle; then every later call is refused.

A stream that Python collects ends its request at any moment too, in any thread, and must neither wait for a
lock nor change what a call is about to read. Such an end is noted, and done once no call is inside.
"""

import collections
from collections.abc import Callable
import functools
import threading
from typing import Any

_INTERRUPTED = ("this engine was interrupted while it handed out a token, and cannot say any more which tokens were "
                "handed out; make a new Engine and submit the requests again")
_NESTED = ("this call comes from inside another call of the same engine (a signal handler, a finalizer, a tokenizer), or "
           "that call was interrupted as it ended; call the engine from outside, or make a new one")


class Guard:
  """The lock of an engine.

  Attributes:
    lock: held by a call.
    inside: whether a call is inside.
    torn: whether several parts of the state are being changed; True for good if an exception ends that.
    noted: requests to end once no call is inside.
  """

  def __init__(self):
    self.lock = threading.RLock()
    self.inside = False
    self.torn = False
    self.noted: collections.deque[int] = collections.deque()

  def check(self) -> None:
    """Refuses a call.

    Raises:
      RuntimeError: the state is torn, or a call of the same thread is inside.
    """
    if self.inside:
      raise RuntimeError(_NESTED)
    if self.torn:
      raise RuntimeError(_INTERRUPTED)

  def is_nested(self) -> bool:
    """Returns True if a call of the same thread is inside."""
    if not self.lock.acquire(blocking=False):
      return False
    try:
      return self.inside
    finally:
      self.lock.release()

  def settle(self, end: Callable[[int], None]) -> None:
    """Ends the requests that are noted, by a function that may do it twice; a call that is inside does it later."""
    while self.noted and self.lock.acquire(blocking=False):
      try:
        if self.inside or self.torn:
          return
        try:
          self.inside = True
          while self.noted:
            end(self.noted[0])
            self.noted.popleft()
        finally:
          self.inside = False
      finally:
        self.lock.release()


def alone(method: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a method of an object with `guard` and `_drop` one that runs alone; requests noted meanwhile end after it."""

  @functools.wraps(method)
  def call(self, *args, **options):
    guard = self.guard
    try:
      with guard.lock:
        guard.check()
        # No function of ours between these lines: Python looks for signals as one begins.
        try:
          guard.inside = True
          return method(self, *args, **options)
        finally:
          guard.inside = False
    finally:
      if guard.noted:
        guard.settle(self._drop)

  return call
