"""Checkpoints whose names a wrapper of PyTorch has changed.

  module.                       DistributedDataParallel
  _orig_mod.                    torch.compile
  _fsdp_wrapped_module.         FullyShardedDataParallel
  _checkpoint_wrapped_module.   gradient checkpointing
  base_model.model.             PEFT, after its adapters were merged
  (no "model.")                 the model without its head, e.g. `AutoModel`
  anything else                 an attribute of the module that was saved

The names are taken back only if then every tensor is one that the model has. If not, the
names stay, and the message about them is that of the file as it is.

Source: torch/nn/parallel/distributed.py, torch/_dynamo/eval_frame.py (`_orig_mod`),
torch/distributed/fsdp, torch/distributed/algorithms/_checkpoint.
"""

from collections.abc import Collection, Mapping
import re

from absl import logging
import numpy as np

from mor import parameters
from mor.conversion import tensors as tensors_lib

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_NOTHING = re.compile("(?!)")
_INNER = "model."  # begins all names but that of the head


class _Renamed:
  """A `tensors.Tensors` under other names."""

  def __init__(self, tensors: tensors_lib.Tensors, names: Mapping[str, str]):
    self.where, self._tensors, self._names = tensors.where, tensors, names
    self.shapes = {ours: tensors.shapes[theirs] for ours, theirs in names.items()}

  def file(self, key: str) -> str:
    return self._tensors.file(self._names[key])

  def read(self, key: str) -> np.ndarray:
    return self._tensors.read(self._names[key])


def unwrap(tensors: tensors_lib.Tensors, names: Collection[str],
           optional: re.Pattern[str] = _NOTHING) -> tensors_lib.Tensors:
  """Returns the tensors under the names that the model has, if a wrapper alone has changed them.

  Args:
    tensors: tensors of a checkpoint.
    names: names of a model's tensors, as its config says.
    optional: names that a checkpoint may have besides.

  Raises:
    ValueError: the checkpoint holds an adapter that is not merged.
  """
  names = set(names)

  def has(name):
    return name in names or optional.fullmatch(name) is not None

  if all(map(has, tensors.shapes)):
    return tensors
  adapter = next((name for name in tensors.shapes if ".lora_A." in name), None)
  if adapter is not None:
    raise ValueError(f"{tensors.file(adapter)} has tensor {adapter!r} of a LoRA adapter that is not merged; save "
                     "model.merge_and_unload() of PEFT")
  bare = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in tensors.shapes}
  row = parameters.find("params/embedding")
  anchor = next(name for name in (f"{row.hf}.weight", f"{row.gguf}.weight") if name in names)
  inner = anchor.removeprefix(_INNER)
  outers = {name[:-len(end)] for name in bare.values() for end in (anchor, inner) if name.endswith(end)}
  for outer in sorted({"", *outers}, key=len):
    plain = {theirs: name.removeprefix(outer) for theirs, name in bare.items()}
    ours = {name if has(name) else _INNER + name: theirs for theirs, name in plain.items()}
    if len(ours) == len(tensors.shapes) and all(map(has, ours)):
      name, theirs = next((name, theirs) for name, theirs in ours.items() if name != theirs)
      logging.warning("%s: a wrapper has changed the names; %r is read as %r.", tensors.where, theirs, name)
      return _Renamed(tensors, ours)
  return tensors
