"""`--mode=compile`: compiles a training step and an engine tick for a TPU, without a TPU.

The TPU compiler runs on any CPU (`pip install 'mor[tpu]'`) and reports memory and
operations of a chip. The time of a step is bounded by a roofline of three times, as if
each resource ran at its peak and all ran at once:

  compute      FLOPs of the executed program (`costs.py`; twice the forward for a
               backward, once more where layers are rematerialised) / peak in bfloat16
  memory       bytes that the instructions read and write / bandwidth of the HBM
  collectives  bytes that each chip sends round its ring / bandwidth of the links

  step >= max of them;  MFU <= FLOPs of the model / (step * peak)

A bound, not a forecast: kernels run below their peaks.
"""

import dataclasses
import os
from typing import Any

import jax
import numpy as np

from mor import config as config_lib
from mor import costs
from mor import sharding
from mor.aot import hlo
from mor.decode import decoder as decoder_lib
from mor.decode import slots as slots_lib
from mor.decode import storage
from mor.decode import tick as tick_lib
from mor.decode import weights as weights_lib
from mor.model import transformer
from mor.train import metrics
from mor.train import step as step_lib


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one chip from its data sheet: FLOP/s in bfloat16, bytes, bytes/s.

  `links` is the bandwidth in one direction, summed over the links of a chip.
  """

  flops: float
  memory: float
  bandwidth: float
  links: float


CHIPS = {  # by a part of `device_kind`; cloud.google.com/tpu/docs/v5e, v5p, v6e
    "v5 lite": Chip(metrics.peak_flops("TPU v5 lite"), 16 * 2**30, 819e9, 200e9),
    "v5": Chip(metrics.peak_flops("TPU v5"), 95 * 2**30, 2765e9, 600e9),
    "v6 lite": Chip(metrics.peak_flops("TPU v6 lite"), 32 * 2**30, 1640e9, 448e9),
}


def devices(topology: str) -> list[Any]:
  """Returns the chips of a topology, e.g. "v5e:4x4".

  Raises:
    ValueError: the topology is unknown.
    OSError: the TPU compiler is not installed.
  """
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for the host of a TPU
  from jax.experimental import topologies  # pylint: disable=g-import-not-at-top
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  except Exception as error:  # jaxlib raises exceptions of its own
    if "not installed" in str(error) or "libtpu" in str(error) or isinstance(error, (ImportError, FileNotFoundError)):
      raise OSError("the TPU compiler is not installed; run pip install 'mor[tpu]'") from error
    raise ValueError(f"--topology={topology}: {str(error).splitlines()[0][:160]}; use one such as v5e:4x4, v5p:4x4x4 "
                     "or v6e:8x8") from error


def chip(device: Any) -> Chip:
  """Returns the peaks of a device.

  Raises:
    ValueError: the device is not in `CHIPS`.
  """
  kind = device.device_kind.lower()
  for name, peaks in CHIPS.items():
    if name in kind:
      return peaks
  raise ValueError(f"no peaks of {device.device_kind!r}; add them to CHIPS in mor/aot/compiled.py")


def compile_train_step(config: config_lib.Config, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
  """Compiles the whole training step of a mesh, without any array."""
  def place(x, placement):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement)

  state = jax.tree.map(place, step_lib.state_shapes(config), step_lib.state_shardings(config, mesh))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.ROWS))
  shape = (config.data.batch_size, config.data.seq_len)
  dtypes = dict(tokens_BT=np.int32, target_BT=np.int32, segment_BT=np.int32, loss_mask_BT=np.bool_)
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in dtypes.items()}
  with jax.set_mesh(mesh):
    return step_lib.make_train_step(config, mesh).jitted.lower(state, batch, None, None).compile()


def compile_tick(config: config_lib.Config, device: Any, num_slots: int = 16,
                page_size: int = 64) -> jax.stages.Compiled:
  """Compiles a tick of the engine for one chip, in bfloat16, with the context of the config."""
  model = config.model
  variables = jax.eval_shape(transformer.Transformer(model).init, jax.random.key(0),
                             jax.ShapeDtypeStruct((1, 1), "int32"))
  pages = -(-config.data.seq_len // page_size)
  decoder = decoder_lib.Decoder(model, storage.Paged(page_size, model.num_kv_heads, model.head_dim, "bfloat16"))
  structures = []

  def leaves(variables):
    weights = weights_lib.prepare(model, variables, "bfloat16")
    slots = slots_lib.make(decoder, weights, num_slots, num_slots * pages * decoder.tables.num_rows,
                           num_slots * pages, pages)
    structures.extend(jax.tree.structure(tree) for tree in (weights, slots))
    return jax.tree.leaves(weights), jax.tree.leaves(slots)

  def tick(weights, slots):
    trees = (jax.tree.unflatten(*given) for given in zip(structures, (weights, slots), strict=True))
    return tick_lib.run(decoder, *trees, num_ticks=1, vocab_size=model.vocab_size, together=False)

  one = jax.sharding.SingleDeviceSharding(device)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
                        jax.eval_shape(leaves, variables))
  return jax.jit(tick, donate_argnums=1).lower(*shapes).compile()


def report(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Reports memory, counts of XLA (loops once), traffic and collectives (loops multiplied out), per chip."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  counted = hlo.measure(compiled.as_text())
  return {
      "hbm_bytes": {"arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
                    "aliased": memory.alias_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
                    "total": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                             + memory.temp_size_in_bytes},
      "flops_loops_once": cost.get("flops", 0.0), "bytes_loops_once": cost.get("bytes accessed", 0.0),
      "bytes": counted.bytes, "unknown_loops": counted.unknown_loops,
      "collectives": {kind: dataclasses.asdict(one) for kind, one in sorted(counted.collectives.items())},
  }


def bound(config: config_lib.Config, peaks: Chip, num_chips: int, figures: dict[str, Any]) -> dict[str, float]:
  """Returns the roofline of a step; see the module docstring."""
  tokens = config.data.batch_size * config.data.seq_len
  passes = 4 if config.model.remat == "full" else 3
  executed = passes * costs.forward_flops_per_token(config.model, config.data.seq_len, executed=True)
  sent = sum(one["bytes"] * (2 if kind == "all-reduce" else 1) for kind, one in figures["collectives"].items())
  seconds = {"compute": executed * tokens / num_chips / peaks.flops, "memory": figures["bytes"] / peaks.bandwidth,
             "collectives": sent / peaks.links}
  step = max(seconds.values())
  useful = costs.train_flops_per_token(config.model, config.data.seq_len) * tokens
  return {**{f"{name}_seconds": value for name, value in seconds.items()}, "step_seconds": step,
          "mfu": useful / (step * num_chips * peaks.flops), "tokens_per_second": tokens / step}


def step_figures(config: config_lib.Config, topology: str) -> dict[str, Any]:
  """Returns the figures of a training step on a topology, with the mesh `config.mesh`."""
  found = devices(topology)
  peaks, mesh = chip(found[0]), sharding.make_mesh(config.mesh, found)
  step = report(compile_train_step(config, mesh))
  return {"topology": topology, "chips": mesh.size, "device_kind": found[0].device_kind, "mesh": dict(mesh.shape),
          "hbm_of_a_chip": peaks.memory, "fits": step["hbm_bytes"]["total"] <= peaks.memory, "step": step,
          "bound": bound(config, peaks, mesh.size, step)}


def command(config: config_lib.Config, topology: str) -> dict[str, Any]:
  """Returns all figures of a config on a topology."""
  return step_figures(config, topology) | {"tick": report(compile_tick(config, devices(topology)[0]))}
