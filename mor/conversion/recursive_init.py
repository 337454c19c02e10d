"""Makes a recursive model from a plain one: shared layers from source layers, and deltas for the rest.

With I source layers between prelude and coda and K shared ones, the layer at stack
index k runs as the unrolled layers U_k (`model/schedule.py`). It starts as

  stepwise   source layer ceil(k (I - 1) / (K - 1) - 1/2): at regular intervals, the
             first and the last included, halves rounded down (K = 1: the first)
  average    the mean of the source layers U_k
  lower      source layer k
  upper      source layer I - K + k
  random     normal, of the model's init_std (a control)

norms included. Prelude, coda, embedding, final norm and head are copied from the
source. A target of fewer unrolled layers takes the source layers nearest to regular
intervals, by the rule of stepwise.

The delta of a step is the best of its rank in the Frobenius norm: with W_l the
projection of the source layer and W that of the shared layer, the truncated SVD of

  diag(n_l / n) W_l - W  =  P S Q        a = P,  b = S Q

where n_l and n are the norms before the projections, so that a shared norm costs
nothing and full rank gives the source model. If nothing is lost, or if init.lora is
"zero", a is normal and b zero.

Source: RRT paper §3.1, Fig. 2 and App. C (which gives no rounding rule; the rule here
gives layers 1, 3, 6 of 6, as the figure does). The ratio of norms is ours: the paper ties norms.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from mor import config as config_lib
from mor import parameters
from mor.model import schedule as schedule_lib
from mor.model.routers import table as router_table

_EDGE = 1e-6  # least norm weight of a shared layer, which deltas divide by
_FREE = ("num_layers", "sharing", "num_recursions", "kv_plan", "execution", "attention", "init_std", "cross_documents",
         "compute_dtype", "remat", "scan_layers", "lora", "router", "recursions_train")  # fields in which target and source may differ
_SIZES = tuple(field.name for field in dataclasses.fields(config_lib.ModelConfig) if field.name not in _FREE)


def convert(target: config_lib.ModelConfig, how: config_lib.InitConfig, seed: int, source: config_lib.ModelConfig,
            variables: Mapping[str, Any]) -> dict[str, Any]:
  """Makes the variables of `target` from the variables of a source model.

  Args:
    target: model to make.
    how: methods by which shared layers and deltas are made.
    seed: seed of random weights.
    source: plain model, or model of the structure of `target`, whose variables are
      returned unchanged.
    variables: variables of the source.

  Raises:
    ValueError: source and target do not fit.
  """
  check(source, target)
  if _structure(source) == _structure(target):
    return dict(variables)
  init = _Init(target, how, seed, variables["params"])
  params = {row.path: variables["params"][row.path] for row in parameters.top(target)}
  for name in parameters.GROUPS:
    layers = init.group(name)
    if layers:
      params[name] = jax.tree.map(lambda *a: np.stack(a), *layers)
  if target.lora.ranks:
    params["lora"] = init.deltas(params["stack"])
  params |= _routers(target, seed)
  balance = {row.path: np.zeros(row.shape(target)[1], np.float32)
             for row in router_table.make(target).parameters if row.collection == "balance"}
  return {"params": params} | ({"balance": balance} if balance else {})


def check(source: config_lib.ModelConfig, target: config_lib.ModelConfig) -> None:
  """Raises ValueError if the target cannot be made from the source."""
  differing = [name for name in _SIZES if getattr(source, name) != getattr(target, name)]
  if differing:
    raise ValueError("the source is another kind of model: " + ", ".join(
        f"model.{name}={getattr(target, name)} (there {getattr(source, name)})" for name in differing)
                     + "; give the config these values")
  if _structure(source) != _structure(target):
    if source.sharing != "vanilla" or router_table.make(source).routes:
      raise ValueError(f"the source is itself recursive: sharing {source.sharing!r}, {source.num_recursions} "
                       f"recursions, {source.num_layers} layers, router {source.router.name!r}; use the same, "
                       "or a plain source")
    if target.num_layers > source.num_layers:
      raise ValueError(f"model.num_layers={target.num_layers} but the source has {source.num_layers}; "
                       f"use at most {source.num_layers}")


def _structure(model: config_lib.ModelConfig) -> tuple:
  """Returns the fields that, beside the sizes, decide the parameter tree."""
  router = router_table.make(model)
  return (model.sharing, model.num_layers, model.num_recursions, model.lora, router.routes and type(router),
          router.parameters)


def spread(count: int, total: int) -> list[int]:
  """Returns `count` of `total` indices at regular intervals, ends included; halves are rounded down."""
  return [math.ceil(k * (total - 1) / max(count - 1, 1) - 0.5) for k in range(count)]


class _Init:
  """The unrolled layers of the target, and the source layer of each."""

  def __init__(self, model: config_lib.ModelConfig, how: config_lib.InitConfig, seed: int, params: Mapping[str, Any]):
    self.model, self.how = model, how
    self.schedule = schedule_lib.make(model)
    num_source = params["stack"]["attention_norm"].shape[0]
    self.source = [jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float32), params["stack"])
                   for i in spread(self.schedule.num_unrolled, num_source)]
    self.rng = np.random.default_rng(seed)

  def group(self, name: str) -> list[dict]:
    """Returns the layers of prelude, stack or coda."""
    if name == "prelude":
      return self.source[:self.schedule.prelude]
    if name == "coda":
      return self.source[len(self.source) - self.schedule.coda:]
    return METHODS[self.how.method](self)

  def inner(self) -> list[dict]:
    """Returns the source layers between prelude and coda."""
    return self.source[self.schedule.prelude:len(self.source) - self.schedule.coda]

  def uses(self, stack_index: int) -> list[dict]:
    """Returns the source layers that the shared layer at `stack_index` replaces."""
    indices = [index for step in self.schedule.rows for index in step]
    return [layer for layer, used in zip(self.inner(), indices) if used == stack_index]

  def deltas(self, stack: Mapping[str, Any]) -> dict:
    """Returns the parameters of `model/lora.py`."""
    inner, depth = iter(self.inner()), self.schedule.depth
    steps = [[self._layer_deltas(next(inner), jax.tree.map(lambda a, index=index: a[index], stack)) for index in step]
             for step in self.schedule.rows]
    assert len(steps[0]) == depth
    return jax.tree.map(lambda *a: np.stack(a).reshape(len(steps), depth, *a[0].shape),
                        *(layer for step in steps for layer in step))

  def _layer_deltas(self, source: Mapping[str, Any], shared: Mapping[str, Any]) -> dict:
    deltas: dict[str, Any] = {}
    for row in parameters.PROJECTIONS:
      rank = self.model.lora.ranks.get(row.name)
      if rank:
        wanted_IO, shared_IO = (np.reshape(parameters.get(layer, row.path), row.matrix(self.model)).astype(np.float64)
                                for layer in (source, shared))
        if row.norm:
          ratio_D = source[row.norm].astype(np.float64) / shared[row.norm]
          wanted_IO = ratio_D[:, None] * wanted_IO
        parameters.put(deltas, row.path, self._delta(wanted_IO - shared_IO, rank))
    return deltas

  def _delta(self, lost_IO: np.ndarray, rank: int) -> dict:
    ins, outs = lost_IO.shape
    if self.how.lora == "zero" or not lost_IO.any():
      return {"a": self.normal(ins, rank), "b": np.zeros((rank, outs), np.float32)}
    p_IA, s_A, q_AO = np.linalg.svd(lost_IO.astype(np.float32), full_matrices=False)
    return {"a": p_IA[:, :rank], "b": s_A[:rank, None] * q_AO[:rank]}

  def normal(self, *shape: int) -> np.ndarray:
    """Draws weights as a fresh model has them."""
    return self.rng.normal(0.0, self.model.init_std, shape).astype(np.float32)


def _guarded(layer: dict) -> dict:
  """Raises norm weights that are too small to divide by."""
  def guard(norm_D):
    return np.where(np.abs(norm_D) < _EDGE, np.float32(_EDGE), norm_D)

  return layer | {name: guard(layer[name]) for name in {row.norm for row in parameters.PROJECTIONS if row.norm}}


def _stepwise(init: _Init) -> list[dict]:
  inner = init.inner()
  return [inner[i] for i in spread(init.schedule.num_stack_rows, len(inner))]


def _average(init: _Init) -> list[dict]:
  def mean(*leaves):
    return np.mean(np.stack(leaves), axis=0, dtype=np.float64).astype(np.float32)

  return [jax.tree.map(mean, *init.uses(index)) for index in range(init.schedule.num_stack_rows)]


def _random(init: _Init) -> list[dict]:
  def layer() -> dict:
    drawn = {}
    for row in parameters.layer(init.model):
      ins, outs = row.shape(init.model)
      parameters.put(drawn, row.path, init.normal(*ins, *outs) if ins else np.ones(outs, np.float32))
    return drawn
  return [layer() for _ in range(init.schedule.num_stack_rows)]


METHODS = {
    "stepwise": lambda init: [_guarded(layer) for layer in _stepwise(init)],
    "average": lambda init: [_guarded(layer) for layer in _average(init)],
    "lower": lambda init: [_guarded(layer) for layer in init.inner()[:init.schedule.num_stack_rows]],
    "upper": lambda init: [_guarded(layer) for layer in init.inner()[-init.schedule.num_stack_rows:]],
    "random": _random,
}


def _routers(model: config_lib.ModelConfig, seed: int) -> dict:
  """Makes fresh routers. If the gate is on the change, they are zero: then alpha = 1 / activation(0) starts as no gate."""
  params = router_table.make(model).init(jax.random.key(seed))
  if model.router.gating == "residual":
    params = {name: {**tree, "out": tree["out"] * 0.0} for name, tree in params.items()}
  return jax.tree.map(np.asarray, params)
