"""Routers by name. A new router is one file and one line here."""

from mor.model.routers import expert_choice
from mor.model.routers import fixed
from mor.model.routers import token_choice

ROUTERS = {
    "fixed": fixed.Fixed,
    "expert_choice": expert_choice.ExpertChoice,
    "token_choice": token_choice.TokenChoice,
}
