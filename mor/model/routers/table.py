"""Routers by name. A new router is one file and one line here."""

from mor import model_config
from mor.model.routers import base
from mor.model.routers import expert_choice
from mor.model.routers import fixed
from mor.model.routers import halting
from mor.model.routers import token_choice

ROUTERS: dict[str, type[base.Router]] = {
    "fixed": fixed.Fixed,
    "expert_choice": expert_choice.ExpertChoice,
    "token_choice": token_choice.TokenChoice,
    "halting": halting.Halting,
}


def make(model: model_config.ModelConfig) -> base.Router:
  """Returns the router of a model.

  Raises:
    ValueError: there is no such router, or the model's fields do not suit it.
  """
  if model.router.name not in ROUTERS:
    raise ValueError(f"config.model.router.name={model.router.name!r}; use one of {', '.join(ROUTERS)}")
  return ROUTERS[model.router.name](model)
