"""The tensors of `MorForCausalLM`, and where each is in our variables: one table, read in both directions.

Layers have the names of `names.py` in the groups model.prelude, model.stack and
model.coda; beside them are model.router, model.aux_router and model.lora, by step.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from mor import model_config
from mor.conversion import names
from mor.model import schedule as schedule_lib
from mor.model.routers import scores


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of `MorForCausalLM` and where it is in our variables.

  Attributes:
    theirs: its name.
    path: of our leaf, e.g. "params/stack/attention/q".
    index: of the tensor in the leaf's leading axes.
    ins, outs: its input and output axes in ours; theirs is `(out, in)`.
  """

  theirs: str
  path: str
  index: tuple[int, ...]
  ins: tuple[int, ...]
  outs: tuple[int, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Theirs."""
    return (math.prod(self.outs), math.prod(self.ins)) if self.ins else self.outs

  def write(self, ours: np.ndarray) -> np.ndarray:
    """Theirs from ours."""
    return ours.reshape(self.shape[::-1]).T if self.ins else ours

  def read(self, theirs: np.ndarray) -> np.ndarray:
    """Ours from theirs."""
    return theirs.T.reshape(self.ins + self.outs) if self.ins else theirs


def entries(model: model_config.ModelConfig) -> Iterator[Entry]:
  """Every tensor of a model."""
  for ours, theirs, _ in names.TOP:
    if ours != "head" or not model.tie_embeddings:
      lead = () if ours == "final_norm" else (model.vocab_size,)
      yield Entry(f"{theirs}.weight", f"params/{ours}", (), (), (*lead, model.d_model))
  schedule = schedule_lib.make(model)
  for group, num in (("prelude", schedule.prelude), ("stack", schedule.num_stack_rows), ("coda", schedule.coda)):
    for i in range(num):
      for weight in names.LAYER:
        theirs, ours = f"model.{group}.{i}.{weight.hf}.weight", f"params/{group}/{weight.ours}"
        yield Entry(theirs, ours, (i,), *weight.shape(model))
  yield from _router_entries(model)
  widths = model.projections
  for r in range(schedule.num_steps):
    for i in range(schedule.depth):
      for weight in names.LAYER:
        name = weight.ours.split("/")[-1]
        if name in model.lora.ranks:
          (ins, outs), rank = widths[name], model.lora.ranks[name]
          theirs, ours = f"model.lora.{r}.{i}.{weight.hf}", f"params/lora/{weight.ours}"
          yield Entry(f"{theirs}.a.weight", f"{ours}/a", (r, i), (ins,), (rank,))
          yield Entry(f"{theirs}.b.weight", f"{ours}/b", (r, i), (rank,), (outs,))


def _router_entries(model: model_config.ModelConfig) -> Iterator[Entry]:
  router, steps = model.router, model.num_recursions
  if router.name == "fixed":
    return
  num, outs = (steps, 1) if router.name == "expert_choice" else (1, steps)
  width = scores.WIDTHS.get(router.arch, 1) * model.d_model
  for name in ("router", "aux_router") if router.sampling == "aux_router" else ("router",):
    for r in range(num):
      yield Entry(f"model.{name}.{r}.out.weight", f"params/{name}/out", (r,), (width,), (outs,))
      if router.arch in scores.WIDTHS:
        yield Entry(f"model.{name}.{r}.hidden.weight", f"params/{name}/hidden", (r,), (model.d_model,), (width,))
  if router.balancing == "loss_free":
    yield Entry("model.balance_bias", "balance/bias_R", (), (), (steps,))


def find(model: model_config.ModelConfig, variables: Mapping[str, Any]) -> Callable[[Entry], np.ndarray]:
  """Looks an entry up in variables, once they are found to be the model's."""
  found: dict[str, Any] = {}

  def walk(tree, path):
    for name, value in tree.items():
      walk(value, [*path, name]) if isinstance(value, Mapping) else found.update({"/".join([*path, name]): value})

  walk(variables, [])
  leads: dict[str, Entry] = {entry.path: entry for entry in entries(model)}  # the last one has the largest index
  for path in sorted(found.keys() ^ leads.keys()):
    problem = "have, and the model's config does not ask for," if path in found else "miss"
    raise ValueError(f"the variables {problem} {path!r}; give the config that they were trained with")
  for path, entry in leads.items():
    shape = tuple(i + 1 for i in entry.index) + entry.ins + entry.outs
    if tuple(found[path].shape) != shape:
      raise ValueError(f"{path!r} has shape {tuple(found[path].shape)}, and the model's config asks for {shape}; "
                       "give the config that it was trained with")
  return lambda entry: np.asarray(found[entry.path][entry.index], np.float32)
