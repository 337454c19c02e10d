"""The tensors of a file, and where each is in our variables: one list for each form, read in both directions.

  hf            model.layers.{l}.{name}.weight, l an unrolled layer
  gguf          blk.{l}.{name}.weight, of llama.cpp's Llama
  gguf_halves   the same of its models that turn the halves of a head
  official_mor  as hf where nothing routes; else a recursion step wraps its layers:
                expert-choice  model.layers.{e + r}.block.{j}.{name}.weight
                               model.layers.{e + r}.mor_router.…, mlp_router.… (auxiliary)
                token-choice   model.layers.{e}.block_list.{r}.{j}.{name}.weight
                               model.layers.{e}.mor_router.…, router_bias
                with e = 1 behind a prelude, else 0; a token-choice model without
                a prelude is no list, so its names have no "{e}."
  mor           model.{prelude, stack, coda}.{i}.{name}.weight, i a parameter set; the
                routers, and model.lora.{r}.{i}.{name}_{a, b}.weight of recursion step r

Names are those of `parameters.py`. Elsewhere a projection is `[out, in]`. We and Hugging
Face turn the two halves of a head against each other; llama.cpp's Llama turns
neighbours, so there the rows of q and k are interleaved.

Source: transformers models/llama; llama.cpp convert_hf_to_gguf.py, `permute`;
raymin0223/mixture_of_recursions model/mor_model.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from mor import model_config
from mor import parameters
from mor.model import schedule as schedule_lib
from mor.model.routers import table as router_table


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a file, and its place in our variables.

  Attributes:
    key: name in the file.
    path: our leaf, e.g. "params/stack/attention/q".
    index: place of the tensor in the leading axes of the leaf; () is the leaf itself.
    ins, outs: sizes of our input and output axes; without inputs both sides are equal.
    heads: number of heads whose rows the file interleaves; 0 is none.
  """

  key: str
  path: str
  index: tuple[int, ...]
  ins: tuple[int, ...]
  outs: tuple[int, ...]
  heads: int = 0

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape in the file: `(out, in)`, or ours without inputs."""
    return (math.prod(self.outs), math.prod(self.ins)) if self.ins else self.outs

  def read(self, theirs: np.ndarray) -> np.ndarray:
    """Returns our array from the tensor of the file."""
    if self.heads:
      theirs = deinterleave(theirs, self.heads)
    return theirs.T.reshape(self.ins + self.outs) if self.ins else theirs

  def write(self, variables: Mapping[str, Any]) -> np.ndarray:
    """Returns the tensor of the file from our variables, float32 and contiguous."""
    ours = np.asarray(parameters.get(variables, self.path)[self.index], np.float32)
    theirs = ours.reshape(self.shape[::-1]).T if self.ins else ours
    return np.ascontiguousarray(interleave(theirs, self.heads) if self.heads else theirs)


def layout(model: model_config.ModelConfig, form: str) -> tuple[Entry, ...]:
  """Returns every tensor of a model's file; a tensor that several layers use comes once per use.

  Args:
    model: config of the variables. Only the form "mor" has low-rank deltas; only "mor"
      and "official_mor" have routers.
    form: one of `FORMS`.
  """
  return tuple(FORMS[form](model))


def write(variables: Mapping[str, Any], model: model_config.ModelConfig, form: str) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, tensor) of every entry of `layout`."""
  for entry in layout(model, form):
    yield entry.key, entry.write(variables)


def check(variables: Mapping[str, Any], model: model_config.ModelConfig) -> None:
  """Raises ValueError unless the variables are those of the model, leaf by leaf and in shape."""
  shapes: dict[str, tuple[int, ...]] = {}

  def walk(tree, path):
    for name, value in tree.items():
      walk(value, [*path, name]) if isinstance(value, Mapping) else shapes.update(
          {"/".join([*path, name]): tuple(value.shape)})

  walk(variables, [])
  last = {entry.path: entry for entry in layout(model, "mor")}  # the one of the largest index
  for path in sorted(shapes.keys() ^ last.keys()):
    problem = "have, and the model's config does not ask for," if path in shapes else "miss"
    raise ValueError(f"the variables {problem} {path!r}; give the config that they were trained with")
  for path, entry in last.items():
    shape = tuple(i + 1 for i in entry.index) + entry.ins + entry.outs
    if shapes[path] != shape:
      raise ValueError(f"{path!r} has shape {shapes[path]}, and the model's config asks for {shape}; "
                       "give the config that it was trained with")


def _entry(key: str, row: parameters.Parameter, model: model_config.ModelConfig, group: str = "",
           index: tuple[int, ...] = (), interleaves: bool = False) -> Entry:
  path = "/".join(part for part in (row.collection, group, row.path) if part)
  ins, outs = row.shape(model)
  return Entry(key, path, index, ins, outs, outs[0] if interleaves and row.interleaved else 0)


def _top(model: model_config.ModelConfig, column: str) -> Iterator[Entry]:
  for row in parameters.top(model):
    yield _entry(f"{getattr(row, column)}.weight", row, model)


def _layers(model: model_config.ModelConfig, column: str, modules: Iterable[tuple[str, tuple[str, int]]],
            interleaves: bool = False) -> Iterator[Entry]:
  """Yields the entries of layers, each a module with its (group, index of the parameter set)."""
  for module, (group, i) in modules:
    for row in parameters.layer(model):
      yield _entry(f"{module}.{getattr(row, column)}.weight", row, model, group, (i,), interleaves)


def _unrolled(model: model_config.ModelConfig, prefix: str) -> Iterator[tuple[str, tuple[str, int]]]:
  for layer, place in enumerate(schedule_lib.make(model).unrolled()):
    yield f"{prefix}.{layer}", place


def _hugging_face(model: model_config.ModelConfig) -> Iterator[Entry]:
  yield from _top(model, "hf")
  yield from _layers(model, "hf", _unrolled(model, "model.layers"))


def _llama_cpp(model: model_config.ModelConfig) -> Iterator[Entry]:
  yield from _top(model, "gguf")
  yield from _layers(model, "gguf", _unrolled(model, "blk"), interleaves=True)


def _llama_cpp_halves(model: model_config.ModelConfig) -> Iterator[Entry]:
  return (dataclasses.replace(entry, heads=0) for entry in _llama_cpp(model))


def _official(model: model_config.ModelConfig) -> Iterator[Entry]:
  yield from _top(model, "hf")
  schedule = schedule_lib.make(model)
  router = router_table.make(model)
  if not router.routes:
    yield from _layers(model, "hf", _unrolled(model, "model.layers"))
    return
  steps, blocks = router.official_modules(schedule.prelude)
  after = schedule.prelude + len(steps)
  modules = ([f"model.layers.{i}" for i in range(schedule.prelude)]
             + [f"{block}.{j}" for block in blocks for j in range(schedule.depth)]
             + [f"model.layers.{after + i}" for i in range(schedule.coda)])
  yield from _layers(model, "hf", zip(modules, schedule.unrolled(), strict=True))
  for row in router.parameters:
    if row.count is None:
      yield _entry(f"{steps[0]}.{row.official}", row, model)
    else:
      for i in range(row.count):
        yield _entry(f"{steps[i]}.{row.official}.weight", row, model, index=(i,))


def _exported(model: model_config.ModelConfig) -> Iterator[Entry]:
  schedule = schedule_lib.make(model)
  yield from _top(model, "hf")
  sizes = dict(zip(parameters.GROUPS, (schedule.prelude, schedule.num_stack_rows, schedule.coda)))
  yield from _layers(model, "hf", ((f"model.{group}.{i}", (group, i)) for group in sizes for i in range(sizes[group])))
  for row in router_table.make(model).parameters:
    if row.count is None:
      yield _entry(row.hf, row, model)
    else:
      for i in range(row.count):
        yield _entry(f"{row.hf.format(i=i)}.weight", row, model, index=(i,))
  for r in range(schedule.num_steps):
    for i in range(schedule.depth):
      for row in parameters.deltas(model):
        yield _entry(f"model.lora.{r}.{i}.{row.hf}.weight", row, model, index=(r, i))


FORMS = {"hf": _hugging_face, "gguf": _llama_cpp, "gguf_halves": _llama_cpp_halves, "official_mor": _official,
         "mor": _exported}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
  """Returns the rows `[out, in]` of q or k with the two halves of each head in turn, as llama.cpp has them."""
  return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: np.ndarray, heads: int) -> np.ndarray:
  """Inverts `interleave`."""
  return rows.reshape(heads, len(rows) // heads // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
