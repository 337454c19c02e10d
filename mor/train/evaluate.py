"""Held-out loss, under the routing of training and under causal routing.

  oracle  `select`: expert-choice sees the whole row, as in training
  causal  `decide`: routing as in generation; compare models by this one
  nll     nats per target token
  bpb     bits per byte: sum of nll over targets / ln 2 / bytes of the targets

Bits per byte divide by the bytes of text that the targets encode, so they do not
depend on the tokenizer. The end of a document is a target of 0 bytes, and its loss counts.
Rows of a task are no text: in place of bits per byte they have the figures of `task_figures.py`.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
import lzma
import math
from typing import Any
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import numpy as np

from mor import config as config_lib
from mor import distributed
from mor import sharding
from mor.data.tasks import table as task_table
from mor.model import kernels
from mor.model import transformer
from mor.model.routers import table as router_table
from mor.train import loss as loss_lib
from mor.train import task_figures

Batch = Mapping[str, np.ndarray]


def make(config: config_lib.Config, mesh: Mesh, num_bytes_V: np.ndarray) -> Callable[..., dict[str, float]]:
  """Makes `evaluate(params, balance, batches) -> metrics`.

  The metrics are, for the routing "causal" and, if the model routes, "oracle":

    nll_, bpb_          see the module
    load_..._r          fraction of tokens that step r processes, r from 1
    nll_exit_n          loss of the early exit after layer n, causal routing
    agreement_exit_n    fraction of targets for which the exit and the last layer have the
                        same most likely token
    agreement           fraction of (token, step) pairs that both routings treat alike, over
                        the steps that may drop tokens
    accuracy_… and more  of a task, see `task_figures.py`
    targets, bytes      counts; a task has no bytes

  Args:
    config: the experiment.
    mesh: mesh that holds the batches.
    num_bytes_V: bytes of text that each token id encodes.
  """
  num_bytes_V = jnp.asarray(num_bytes_V, jnp.int32)

  def evaluate(params: dict, balance: dict, batches: Iterable[Batch]) -> dict[str, float]:
    total, pending = {}, None
    for batch in batches:
      given = config, mesh, params, balance, num_bytes_V, sharding.put_whole(mesh, batch)
      with jax.set_mesh(mesh):
        if pending is None:
          distributed.compile_together(_sums, *given)
        sums = _sums(*given)
      total = _add(total, pending)  # the batch before, while this one runs
      pending = sums
    return _metrics(config.model, config.exit.layers, _add(total, pending))

  return evaluate


def routings(model: config_lib.ModelConfig) -> dict[str, str]:
  """Returns the name of each figure and the routing behind it; a model that routes nothing has one figure."""
  return {"causal": "decide"} | ({"oracle": "select"} if router_table.make(model).routes else {})


def compressed_bits_per_byte(text: str) -> dict[str, float]:
  """Returns the bits per byte of `gzip -9` and `xz -9` on (at most 64 MiB of) a text."""
  data = text.encode()[:2**26]
  packed = {"gzip": zlib.compress(data, 9), "xz": lzma.compress(data, preset=9)}
  return {f"bpb_{name}": 8 * len(out) / max(len(data), 1) for name, out in packed.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
@kernels.full_precision
def _sums(config: config_lib.Config, mesh: Mesh, params: dict, balance: dict, num_bytes_V: jax.Array,
          batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns what a batch adds to each sum over the held-out rows."""
  def count(*given):
    return sharding.sum_over_devices(_local_sums(config, *given))
  specs = sharding.row_specs(params, router_table.make(config.model).parameters)
  return sharding.by_rows(mesh, count, in_specs=(specs, P(), P(), P(sharding.ROWS)),
                          out_specs=P())(params, balance, num_bytes_V, batch)


def _local_sums(config, params, balance, num_bytes_V, batch):
  """Returns what the rows of one device add to each sum."""
  model, exits, loss_block = config.model, config.exit.layers, config.train.loss_block
  params, key = transformer.whole(model, params), jax.random.key(config.seed)
  valid_BT, mask_BT = batch["segment_BT"] != 0, batch["loss_mask_BT"]
  sums, keep = {"tokens": jnp.sum(valid_BT), "targets": jnp.sum(mask_BT)}, {}
  if "difficulty_BT" not in batch:
    sums["bytes"] = jnp.sum(jnp.where(mask_BT, num_bytes_V[batch["target_BT"]], 0))
  for name, routing in routings(model).items():
    out = transformer.Transformer(model).apply(
        {"params": params, "balance": balance}, batch["tokens_BT"], batch["segment_BT"], routing=routing,
        key=key, exits=exits if name == "causal" else ())
    nll_BT = loss_lib.token_nll(transformer.head(params), out.hidden_BTD, batch["target_BT"], loss_block)
    keep[name] = out.keep_RBT & valid_BT[None]
    sums[f"nll_{name}"] = jnp.sum(jnp.where(mask_BT, nll_BT, 0.0))
    sums[f"kept_{name}"] = jnp.sum(keep[name], axis=(1, 2))
    if "difficulty_BT" in batch:
      likeliest_BT = loss_lib.likeliest(transformer.head(params), out.hidden_BTD, loss_block)
      counted = task_figures.count(task_table.make(config.data).num_levels, likeliest_BT, keep[name], batch)
      sums |= {f"task_{name}_{key}": value for key, value in counted.items()}
    for n, exit_BTD in zip(exits, out.exits):
      exit_nll_BT, same_BT = loss_lib.compare_exit(
          transformer.head(params), exit_BTD, out.hidden_BTD, batch["target_BT"], loss_block)
      sums[f"nll_exit_{n}"] = jnp.sum(jnp.where(mask_BT, exit_nll_BT, 0.0))
      sums[f"agreement_exit_{n}"] = jnp.sum(same_BT & mask_BT)
  if "oracle" in keep:
    same_RBT = (keep["causal"] == keep["oracle"]) & valid_BT[None]
    sums["same"] = jnp.sum(same_RBT, axis=(1, 2))
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), sums)  # every process reads them


def _add(total: dict[str, Any], sums: Mapping[str, jax.Array] | None) -> dict[str, Any]:
  """Adds the sums of a batch in float64, because float32 would round them."""
  if sums is None:
    return total
  return {k: total.get(k, 0.0) + np.asarray(v, np.float64) for k, v in jax.device_get(sums).items()}


def _metrics(model: config_lib.ModelConfig, exits: tuple[int, ...], total: Mapping[str, Any]) -> dict[str, float]:
  if not total or not total["targets"]:
    raise ValueError("there are no held-out tokens to evaluate; use a larger data.validation_fraction, "
                     "or name a data.validation_source")
  metrics = {}
  for name in routings(model):
    metrics[f"nll_{name}"] = total[f"nll_{name}"] / total["targets"]
    if "bytes" in total:
      metrics[f"bpb_{name}"] = total[f"nll_{name}"] / math.log(2) / max(total["bytes"], 1.0)
    else:
      metrics |= task_figures.figures(model, name, {
          key.removeprefix(f"task_{name}_"): value for key, value in total.items() if key.startswith(f"task_{name}_")})
    if model.num_recursions > 1:
      for r, kept in enumerate(total[f"kept_{name}"]):
        metrics[f"load_{name}_{r + 1}"] = kept / total["tokens"]
  for name in (f"{figure}_exit_{n}" for n in exits for figure in ("nll", "agreement")):
    metrics[name] = total[name] / total["targets"]
  if "same" in total:
    dropping = [r for r, fraction in enumerate(model.capacity) if fraction < 1] or range(model.num_recursions)
    metrics["agreement"] = np.mean([total["same"][r] for r in dropping]) / total["tokens"]
  metrics |= {name: total[name] for name in ("targets", "bytes") if name in total}
  return {k: float(v) for k, v in metrics.items()}
