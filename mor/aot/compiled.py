"""`--mode=compile`: compiles a training step, a tick and a prefill for a TPU or GPU, without one.

The compilers run on any CPU (`chips.py`) and report memory and operations of a chip. The
time of a step is bounded by a roofline of three times, as if each resource ran at its
peak and all ran at once:

  compute      FLOPs of the executed program (`costs.py`; twice the forward for a
               backward, once more where layers are rematerialised) / peak in bfloat16
  memory       bytes that the instructions read and write / bandwidth of the HBM
  collectives  bytes that each chip sends round its ring / bandwidth of the links

  step >= max of them;  MFU <= FLOPs of the model / (step * peak)

A bound, not a forecast: kernels run below their peaks.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from mor import config as config_lib
from mor import costs
from mor import sharding
from mor.aot import chips
from mor.aot import decoding
from mor.aot import executed
from mor.aot import hlo
from mor.decode import parts as parts_lib
from mor.train import step as step_lib

# Without a GPU there is no autotuner, and some of Triton's products have no tile without one.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


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
    options = _GPU_OPTIONS if mesh.devices.flat[0].platform == "gpu" else None
    return step_lib.make_train_step(config, mesh).jitted.lower(state, batch, None, None).compile(options)


def report(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Reports memory, counts of XLA (loops once), traffic, operations and collectives (loops multiplied out), per chip."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}  # XLA:GPU has none without a GPU
  text = compiled.as_text()
  counted, program = hlo.measure(text), hlo.parse(text)
  return {
      "hbm_bytes": {"arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
                    "aliased": memory.alias_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
                    "total": memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                             + memory.temp_size_in_bytes},
      "flops_loops_once": cost.get("flops"), "bytes_loops_once": cost.get("bytes accessed"),
      "bytes": counted.bytes, "unknown_loops": counted.unknown_loops,
      "attention": "cudnn" if "__cudnn" in text else "kernel" if "tpu_custom_call" in text else "xla",
      "executed": dataclasses.asdict(executed.count(program)),
      "collectives": {kind: dataclasses.asdict(one) for kind, one in sorted(counted.collectives.items())},
  }


def bound(config: config_lib.Config, peaks: chips.Chip, num_chips: int, figures: dict[str, Any]) -> dict[str, float]:
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
  found = chips.devices(topology)
  peaks, mesh = chips.find(found[0]), sharding.make_mesh(config.mesh, found)
  step = report(compile_train_step(config, mesh))
  return {"topology": topology, "chips": mesh.size, "device_kind": found[0].device_kind, "mesh": dict(mesh.shape),
          "hbm_of_a_chip": peaks.memory, "fits": step["hbm_bytes"]["total"] <= peaks.memory, "step": step,
          "bound": bound(config, peaks, mesh.size, step)}


def command(config: config_lib.Config, topology: str, num_slots: int | None = None,
            context: int | None = None, tensor: int | None = None) -> dict[str, Any]:
  """Returns all figures of a config on a topology; the engine runs on one of its chips, or on the first `tensor`.

  Raises:
    ValueError: the topology is unknown, or a count is not positive.
    OSError: the compiler is not installed.
  """
  for name, value in (("num_slots", num_slots), ("context", context), ("tensor", tensor)):
    if value is not None and value < 1:
      raise ValueError(f"--{name}={value}; use a count >= 1")
  found = chips.devices(topology)
  if (tensor or 1) > len(found):
    raise ValueError(f"--tensor={tensor}, and {topology} has {len(found)} chips; use at most {len(found)}")
  parts_lib.cut(config.model, tensor or 1)  # refuses before anything is compiled
  figures = step_figures(config, topology)
  setup = decoding.DecodingSetup(config, found[0], num_slots or 16, context, more=tuple(found[1:tensor or 1]))
  return figures | {"tick": decoding.tick_figures(setup, decoding.compile_tick(setup)),
                    "prefill": decoding.prefill_figures(setup, decoding.compile_prefill(setup))}
