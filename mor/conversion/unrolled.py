"""The plain Llama that a model without routing is.

Every unrolled layer has its own tensors, into which LoRA is folded: W + B A, summed in
float64 and rounded once.
"""

from collections.abc import Callable, Iterator, Mapping
import functools
from typing import Any

import numpy as np

from mor import model_config
from mor import parameters
from mor.conversion import layout
from mor.model import schedule as schedule_lib
from mor.model.kv import plans as kv_plans
from mor.model.routers import table as router_table


def check(model: model_config.ModelConfig) -> None:
  """Raises ValueError if the unrolled model is no plain Llama."""
  if router_table.make(model).routes:
    raise ValueError(f"router.name={model.router.name!r}: tokens leave at different depths, which no Llama does; "
                     "export with --target=hf")
  if any(slot < 0 for slot in kv_plans.PLANS[model.kv_plan](schedule_lib.make(model)).own):
    raise ValueError(f"model.kv_plan={model.kv_plan!r}: later steps have no keys of their own, as each layer of a "
                     "Llama has; export with --target=hf")


def write(variables: Mapping[str, Any], model: model_config.ModelConfig, form: str) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, tensor) of every entry of a form of `layout`, float32.

  Args:
    variables: those of the model; see `layout.check`.
    model: config that `check` accepts.
    form: "hf", "gguf" or "gguf_halves".
  """
  deltas = _deltas(model, variables)
  for plain, entry in zip(layout.layout(model, "hf"), layout.layout(model, form), strict=True):
    theirs = plain.write(variables)
    if plain.key in deltas:
      theirs = (theirs.astype(np.float64) + deltas[plain.key]()).astype(np.float32)
    yield entry.key, layout.interleave(theirs, entry.heads) if entry.heads else theirs


def _deltas(model: model_config.ModelConfig, variables: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
  """Returns, by tensor of the unrolled layers, a function that computes the delta of LoRA in float64."""
  schedule = schedule_lib.make(model)
  entries = {entry.key: entry for entry in layout.layout(model, "mor")}

  def delta(module):
    a_AI, b_OA = (entries[f"{module}_{part}.weight"].write(variables) for part in "ab")
    return b_OA.astype(np.float64) @ a_AI.astype(np.float64)

  folded = {}
  for r in range(schedule.num_steps):
    for i in range(schedule.depth):
      for row in parameters.PROJECTIONS:
        if row.name in model.lora.ranks:
          layer = schedule.prelude + r * schedule.depth + i
          folded[f"model.layers.{layer}.{row.hf}.weight"] = functools.partial(delta, f"model.lora.{r}.{i}.{row.hf}")
  return folded
