"""A recursive model out of a plain one: which source layers a shared layer is made of.

With I source layers between prelude and coda and K shared ones, row k of the stack
is used at the unrolled layers U_k (`model/schedule.py`). It starts as

  stepwise   source layer ceil(k (I - 1) / (K - 1) - 1/2): at regular intervals, the
             first and the last included, halves rounded down (K = 1: the first)
  average    the mean of the source layers U_k
  lower      source layer k
  upper      source layer I - K + k
  random     normal, of the model's init_std (a control)

norms included; prelude, coda, embedding, final norm and head are the source's own.
A target of fewer unrolled layers is made of the source layers nearest to regular
intervals, by the rule of stepwise.

Each step's delta is the best of its rank in the Frobenius norm: with W_l the source
layer's projection and W that of its row, the truncated SVD of

  diag(n_l / n) W_l - W  =  P S Q        a = P,  b = S Q

where n_l and n are the norms before the projections, so that a shared norm costs
nothing and full rank gives the source model. Where nothing is lost, and with
init.lora "zero", a is normal and b zero.

Source: RRT paper §3.1, Fig. 2 and App. C (which gives no rounding rule; this one
gives layers 1, 3, 6 of 6, as its figure). The norm's ratio is ours: the paper ties norms.
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

_EDGE = 1e-6  # least norm weight of a row that is divided by
_FREE = ("num_layers", "sharing", "num_recursions", "kv_plan", "execution", "attention", "init_std", "cross_documents",
         "compute_dtype", "remat", "scan_layers", "lora", "router")  # fields in which target and source may differ
_SIZES = tuple(field.name for field in dataclasses.fields(config_lib.ModelConfig) if field.name not in _FREE)


def convert(target: config_lib.ModelConfig, how: config_lib.InitConfig, seed: int, source: config_lib.ModelConfig,
            variables: Mapping[str, Any]) -> dict[str, Any]:
  """Variables of `target`, from those of a source model.

  Args:
    target: the model wanted.
    how: its shared layers and deltas are made.
    seed: draws what is random.
    source: of a plain model, or of the target's own structure, whose variables are
      taken as they are.
    variables: the source's.

  Raises:
    ValueError: the models do not fit.
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
  """Raises ValueError where the target cannot be made of the source."""
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
  """What decides the parameter tree, beside the sizes."""
  router = router_table.make(model)
  return (model.sharing, model.num_layers, model.num_recursions, model.lora, router.routes and type(router),
          router.parameters)


def spread(count: int, total: int) -> list[int]:
  """`count` of `total` indices at regular intervals, ends included; halves go down."""
  return [math.ceil(k * (total - 1) / max(count - 1, 1) - 0.5) for k in range(count)]


class _Init:
  """The target's unrolled layers, and the source layers they stand for."""

  def __init__(self, model: config_lib.ModelConfig, how: config_lib.InitConfig, seed: int, params: Mapping[str, Any]):
    self.model, self.how = model, how
    self.schedule = schedule_lib.make(model)
    num_source = params["stack"]["attention_norm"].shape[0]
    self.source = [jax.tree.map(lambda a, i=i: np.asarray(a[i], np.float32), params["stack"])
                   for i in spread(self.schedule.num_unrolled, num_source)]
    self.rng = np.random.default_rng(seed)

  def group(self, name: str) -> list[dict]:
    """The layers of prelude, stack or coda."""
    if name == "prelude":
      return self.source[:self.schedule.prelude]
    if name == "coda":
      return self.source[len(self.source) - self.schedule.coda:]
    return METHODS[self.how.method](self)

  def inner(self) -> list[dict]:
    """Source layers between prelude and coda."""
    return self.source[self.schedule.prelude:len(self.source) - self.schedule.coda]

  def uses(self, row: int) -> list[dict]:
    """Source layers that a row of the stack stands for."""
    rows = [row for rows in self.schedule.rows for row in rows]
    return [layer for layer, used in zip(self.inner(), rows) if used == row]

  def deltas(self, stack: Mapping[str, Any]) -> dict:
    """`model/lora.py`'s parameters."""
    inner, depth = iter(self.inner()), self.schedule.depth
    steps = [[self._layer_deltas(next(inner), jax.tree.map(lambda a, row=row: a[row], stack)) for row in rows]
             for rows in self.schedule.rows]
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
    """Weights as a fresh model has them."""
    return self.rng.normal(0.0, self.model.init_std, shape).astype(np.float32)


def _guarded(layer: dict) -> dict:
  """The layer with no norm weight too small to divide by."""
  guard = lambda n_D: np.where(np.abs(n_D) < _EDGE, np.float32(_EDGE), n_D)
  return layer | {name: guard(layer[name]) for name in {row.norm for row in parameters.PROJECTIONS if row.norm}}


def _stepwise(init: _Init) -> list[dict]:
  inner = init.inner()
  return [inner[i] for i in spread(init.schedule.num_stack_rows, len(inner))]


def _average(init: _Init) -> list[dict]:
  mean = lambda *a: np.mean(np.stack(a), axis=0, dtype=np.float64).astype(np.float32)
  return [jax.tree.map(mean, *init.uses(row)) for row in range(init.schedule.num_stack_rows)]


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
  """Fresh routers; zero where the gate is on the change: then alpha = 1 / activation(0) starts as no gate."""
  params = router_table.make(model).init(jax.random.key(seed))
  if model.router.gating == "residual":
    params = {name: {**tree, "out": tree["out"] * 0.0} for name, tree in params.items()}
  return jax.tree.map(np.asarray, params)
