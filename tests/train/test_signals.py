"""A step that hangs ends the process, with where it hangs; one that does not, does not."""

import subprocess
import sys
import time

import pytest

from mor import main
from mor.train import signals

HANGS = """
import time
from mor.train import signals

def a_step_that_hangs():
  time.sleep(60)

with signals.Watchdog(0.2, 6) as watched:
  watched.beat(7)
  a_step_that_hangs()
"""


def test_a_hung_step_ends_the_process_and_says_where():
  begun = time.monotonic()
  done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, check=False)
  assert done.returncode == signals.HUNG == main.LOST and time.monotonic() - begun < 50
  assert done.returncode not in (0, main.STOPPED, main.WRONG, main.DIVERGED)
  line, *stacks = done.stderr.splitlines()
  assert line.startswith("error: no step has finished since step 7, in train.step_timeout=0.2 s")
  assert "start the run again" in line and any("in a_step_that_hangs" in stack for stack in stacks)


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_steps_that_finish_and_pauses_are_left_alone(seconds):
  ended = []
  with signals.Watchdog(seconds, end=ended.append) as watched:
    time.sleep(0.6)  # compiling
    for step in range(4):
      watched.beat(step)
      time.sleep(0.1)
    watched.pause()
    time.sleep(0.6)  # saving
  assert ended == []


def test_a_pause_ends_as_well(capsys):
  ended = []
  with signals.Watchdog(0.05, end=ended.append) as watched:
    watched.pause()
    time.sleep(2)
  assert ended == [signals.HUNG] and "since step 0" in capsys.readouterr().err
