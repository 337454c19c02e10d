"""`python -m mor` and the command `mor`: the command line of `mor/main.py`.

It is a file of its own so that Ctrl-C is quiet from the first moment: importing `main` takes seconds.
"""

import signal


def run() -> None:
  """Imports and runs the command line; Ctrl-C during the import ends the program without a traceback."""
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # `main.run` takes it back
  from mor import main

  main.run()


if __name__ == "__main__":
  run()
