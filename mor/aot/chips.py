"""Chips to compile for, which need not be there: peaks, and devices without a driver.

  v5e:4x4   a TPU slice; the compiler is libtpu            (pip install 'mor[tpu]')
  h100:1    one GPU; the compiler is XLA:GPU with ptxas    (pip install 'mor[aot-gpu]')

A GPU is made of a description of the card (`GpuTargetConfigProto` of XLA), so neither a
driver nor CUDA is needed. The driver's version stands in it, because without one XLA
lets no loop into a CUDA graph. A host has at most eight of them.

Source: `jax.experimental.topologies`; openxla/xla
xla/backends/gpu/target_config/specs/{h100_sxm,h200}.txtpb.
"""

import dataclasses
import os
import re
from typing import Any

import jax

from mor.train import metrics


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one chip from its data sheet.

  Attributes:
    flops: FLOP/s in bfloat16, dense.
    memory: bytes of HBM.
    bandwidth: bytes/s of the HBM.
    links: bytes/s in one direction, summed over the links of a chip.
  """

  flops: float
  memory: float
  bandwidth: float
  links: float


CHIPS = {  # by a part of `device_kind`; cloud.google.com/tpu/docs/v5e, v5p, v6e; nvidia.com/en-us/data-center/h100, h200
    "v5 lite": Chip(metrics.peak_flops("TPU v5 lite"), 16 * 2**30, 819e9, 200e9),
    "v5": Chip(metrics.peak_flops("TPU v5"), 95 * 2**30, 2765e9, 600e9),
    "v6 lite": Chip(metrics.peak_flops("TPU v6 lite"), 32 * 2**30, 1640e9, 448e9),
    "h100": Chip(metrics.peak_flops("H100"), 80e9, 3.35e12, 450e9),
    "h200": Chip(metrics.peak_flops("H200"), 141e9, 4.8e12, 450e9),
}

# Compute cycles a second, from the peak and the multiply-adds of a cycle: 4 MXUs of 128 x 128 on a v5e core (197 TFLOP/s),
# 8 on a v5p chip of two cores, 2 of 256 x 256 on a v6e. The data sheets name no clock.
_TPU_LANES = {"v5 lite": 4 * 128**2, "v5": 8 * 128**2, "v6 lite": 4 * 256**2}

_GPUS = {"h100": ("NVIDIA H100 80GB HBM3", 3352320000000, 84942979072),  # name, bytes/s, bytes
         "h200": ("NVIDIA H200", 4800000000000, 151397597184)}
_GPUS_OF_A_HOST = 8
_GPU_SPEC = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}"
"""


def devices(topology: str) -> list[Any]:
  """Returns the chips of a topology, e.g. "v5e:4x4" or "h200:1".

  Raises:
    ValueError: the topology is unknown.
    OSError: the compiler for it is not installed.
  """
  return _gpus(topology) if topology.partition(":")[0] in _GPUS else _tpus(topology)


def find(device: Any) -> Chip:
  """Returns the peaks of a device.

  Raises:
    ValueError: the device is not in `CHIPS`.
  """
  return CHIPS[_find_name(device)]


def cycles_per_second(device: Any) -> float:
  """Returns the clock in which the TPU compiler estimates, from the peak and the width of the matmul units."""
  name = _find_name(device)
  return CHIPS[name].flops / (2 * _TPU_LANES[name])


def _find_name(device: Any) -> str:
  kind = device.device_kind.lower()
  for name in CHIPS:
    if name in kind:
      return name
  raise ValueError(f"no peaks of {device.device_kind!r}; add them to CHIPS in mor/aot/chips.py")


def _tpus(topology: str) -> list[Any]:
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not look for the host of a TPU
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is used, so another process may compile, too
  from jax.experimental import topologies  # pylint: disable=g-import-not-at-top
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  except Exception as error:  # jaxlib raises exceptions of its own
    if "not installed" in str(error) or "libtpu" in str(error) or isinstance(error, (ImportError, FileNotFoundError)):
      raise OSError("the TPU compiler is not installed; run pip install 'mor[tpu]'") from error
    raise ValueError(f"--topology={topology}: {str(error).splitlines()[0][:160]}; use one such as v5e:4x4, v5p:4x4x4, "
                     "v6e:8x8, h100:1 or h200:8") from error


def _gpus(topology: str) -> list[Any]:
  card, _, count = topology.partition(":")
  if not re.fullmatch(r"[1-9]\d*", count) or int(count) > _GPUS_OF_A_HOST:
    raise ValueError(f"--topology={topology}: a host has 1 to {_GPUS_OF_A_HOST} GPUs; use {card}:1 or {card}:8")
  name, bandwidth, memory = _GPUS[card]
  spec = _GPU_SPEC.format(name=name, bandwidth=bandwidth, memory=memory)
  from jax.experimental import topologies  # pylint: disable=g-import-not-at-top
  try:
    return list(topologies.get_topology_desc(
        platform="cuda", topology_name=card, topology=f"1x1x{count}", target_config=spec).devices)
  except Exception as error:  # jaxlib raises exceptions of its own
    raise OSError("the GPU compiler is not installed, or its plugin did not start; run pip install 'mor[aot-gpu]', and "
                  f"set JAX_PLATFORMS=cpu where there is no driver ({str(error).splitlines()[0][:120]})") from error
