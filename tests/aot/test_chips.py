"""Chips that are not there: what is asked for wrongly, and peaks."""

import importlib.util

import pytest

from mor.aot import chips

HAS_GPU_COMPILER = importlib.util.find_spec("jax_plugins") is not None


class Device:

  def __init__(self, kind):
    self.device_kind = kind


@pytest.mark.parametrize("topology", ["h100", "h200:0", "h100:9", "h200:1x1", "h100:two"])
def test_a_host_has_up_to_eight_gpus(topology):
  with pytest.raises(ValueError, match=f"--topology={topology}: a host has 1 to 8 GPUs; use {topology[:4]}:1"):
    chips.devices(topology)


@pytest.mark.skipif(HAS_GPU_COMPILER, reason="the GPU compiler is installed")
def test_a_missing_gpu_compiler_names_the_package():
  with pytest.raises(OSError, match=r"the GPU compiler is not installed.*pip install 'mor\[aot-gpu\]'"):
    chips.devices("h200:1")


@pytest.mark.parametrize("kind,bandwidth", [
    ("TPU v5 lite", 819e9), ("TPU v5", 2765e9), ("TPU v6 lite", 1640e9), ("NVIDIA H100 80GB HBM3", 3.35e12),
    ("NVIDIA H200", 4.8e12)])
def test_peaks_are_found_by_the_kind_of_device(kind, bandwidth):
  assert chips.find(Device(kind)).bandwidth == bandwidth


def test_chips_without_peaks_are_refused():
  with pytest.raises(ValueError, match="no peaks of 'TPU v99'"):
    chips.find(Device("TPU v99"))


@pytest.mark.parametrize("kind,clock", [("TPU v5 lite", 1.5e9), ("TPU v5", 1.75e9), ("TPU v6 lite", 1.75e9)])
def test_a_tpu_has_the_clock_that_its_peak_needs(kind, clock):
  assert chips.cycles_per_second(Device(kind)) == pytest.approx(clock, rel=2e-3)
