"""Language models whose depth adapts to the token.

  model = mor.load("runs/quickstart")
  model.generate(["My fellow"])
  for event in mor.Engine(model).stream("My fellow"):
    print(event.text, end="")
"""

import importlib
from typing import Any

_PUBLIC = {  # name -> module; imported at first use
    "load": "mor.serve.model",
    "Model": "mor.serve.model",
    "Engine": "mor.serve.engine",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
  if name not in _PUBLIC:
    raise AttributeError(f"module 'mor' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
  return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
