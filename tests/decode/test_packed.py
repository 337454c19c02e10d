"""Packed pages: their kernels over long rows, without races, and what the kernels cannot serve."""

import functools
import re

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from mor.decode import attention_tpu
from mor.decode import packed
from mor.decode import storage as storage_lib
from mor.decode import storages
from mor.model import kernels

PAGE, PAGES = 32, 40  # three turns of the TPU kernel, twenty of the GPU's
LENGTH_M = np.array([PAGE * PAGES, 0, 1, 700, 513, 0, 64])
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}


class Rows:
  """A pool of random entries, its rows in pages that come in no order, and their queries."""

  def __init__(self, kernel, num_heads, num_kv_heads, head_dim, kv_format="float32", hidden=False):
    rng = np.random.default_rng(1)
    num_pages = len(LENGTH_M) * PAGES + 1
    self.storage = packed.PackedPages(PAGE, num_kv_heads, head_dim, kv_format, kernel)
    page_P, offset_E = np.arange(num_pages), np.arange(PAGE)
    shape = (num_pages * PAGE, num_kv_heads, head_dim)
    self.buffer = self.storage.write(
        self.storage.make(num_pages), jnp.asarray(np.repeat(page_P, PAGE)), jnp.asarray(np.tile(offset_E, num_pages)),
        *(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)))
    page_MP = rng.permutation(num_pages)[:-1].reshape(len(LENGTH_M), PAGES).astype(np.int32)
    hidden_MS = rng.random((len(LENGTH_M), PAGES * PAGE)) < 0.3
    hidden_MS[:, 0] = False  # what sees nothing means nothing, so each row that has entries shows one
    self.rows = storage_lib.SeenEntries(jnp.asarray(page_MP), jnp.asarray(LENGTH_M, jnp.int32),
                                        jnp.asarray(hidden_MS) if hidden else None)
    self.q_MNH = jnp.asarray(rng.normal(size=(len(LENGTH_M), num_heads, head_dim)), jnp.float32)

  def attend(self, **options):
    """The kernel's result, and that of plain attention over whole rows; of empty rows that is 0."""
    kernel = packed.find_kernel(self.storage.kernel)
    got = kernel.attend(self.q_MNH, self.buffer.kv_PKEW, self.rows.page_MP, self.rows.length_M, self.rows.hidden_MS,
                        **dict(interpret=True) | options)
    expected = storage_lib.attend_whole(self.storage, self.q_MNH, [(self.buffer, self.rows)])
    return np.asarray(got), np.where(LENGTH_M[:, None, None] > 0, expected, 0)


@pytest.mark.parametrize("kernel", packed.KERNELS)
@pytest.mark.parametrize("shape, kv_format, hidden", [
    pytest.param((4, 2, 6), "float32", True, id="small"),
    pytest.param((3, 1, 64), "bfloat16", False, id="bfloat16"),
    pytest.param((15, 5, 64), "float32", False, id="mor-360m", marks=pytest.mark.slow),
    pytest.param((20, 2, 80), "bfloat16", True, id="large_groups", marks=pytest.mark.slow),
    pytest.param((2, 2, 128), "float32", True, id="wide", marks=pytest.mark.slow),
])
def test_long_rows(kernel, shape, kv_format, hidden):
  got, expected = Rows(kernel, *shape, kv_format, hidden).attend()
  np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCES[kv_format])


@pytest.mark.parametrize("hidden", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tpu_kernel_has_no_races(hidden):
  rows = Rows("tpu", 2, 1, 6, hidden=hidden)
  got, expected = rows.attend(interpret=pltpu.InterpretParams(detect_races=True))
  assert not interpret_pallas_call.races.races_found
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_tables_larger_than_the_scalar_memory_are_read_in_parts(monkeypatch):
  rows = Rows("tpu", 2, 1, 6, hidden=True)
  whole, _ = rows.attend()
  monkeypatch.setattr(attention_tpu, "_MOST_PAGES", 3 * PAGES)
  np.testing.assert_array_equal(rows.attend()[0], whole)


@pytest.mark.parametrize("kernel", packed.KERNELS)
def test_a_write_is_in_place(kernel):
  """The tick would copy the pool for each layer if its scatter were not."""
  storage = packed.PackedPages(PAGE, 2, 6, "float32", kernel)
  kv_PKEW, at_M, k_MKH = storage.make(50).kv_PKEW, jnp.zeros(3, jnp.int32), jnp.zeros((3, 2, 6))

  @functools.partial(jax.jit, donate_argnums=0)
  def write(kv_PKEW, at_M, k_MKH):
    return storage.write(packed.PackedBuffer(kv_PKEW), at_M, at_M, k_MKH, k_MKH).kv_PKEW
  memory = write.lower(kv_PKEW, at_M, k_MKH).compile().memory_analysis()
  assert memory.temp_size_in_bytes < kv_PKEW.nbytes / 10


@pytest.mark.parametrize("kernel, page_size, num_kv_heads, head_dim, kv_format, message", [
    ("tpu", 24, 2, 64, "bfloat16", "page_size=24 is no multiple of 16.*bfloat16"),
    ("tpu", 2048, 32, 64, "float32", "page_size=2048 with 32 key heads of 128 lanes needs .* use smaller pages"),
    ("gpu", 64, 2, 600, "float32", "entries of 2048 float32 numbers are more than the 1024"),
    ("tpu", 24, 2, 64, "float32", None), ("tpu", 64, 32, 64, "float32", None), ("gpu", 7, 32, 128, "bfloat16", None)])
def test_what_a_kernel_serves(kernel, page_size, num_kv_heads, head_dim, kv_format, message):
  reason = packed.PackedPages(page_size, num_kv_heads, head_dim, kv_format, kernel).explain_misfit()
  assert re.match(message, reason) if message else reason is None


def on(monkeypatch, platform, device_kind):
  monkeypatch.setattr(kernels, "platform", lambda: platform)
  monkeypatch.setattr(kernels, "device_kind", lambda: device_kind)
  monkeypatch.setattr(kernels, "interprets", lambda: platform == "cpu")


@pytest.mark.parametrize("platform, device_kind, expected", [
    ("cpu", "cpu", storage_lib.Paged(64, 5, 64, "bfloat16")),
    ("tpu", "TPU v5 lite", packed.PackedPages(64, 5, 64, "bfloat16", "tpu")),
    ("gpu", "NVIDIA H200", packed.PackedPages(64, 5, 64, "bfloat16", "gpu")),
    ("gpu", "AMD Instinct MI300X", storage_lib.Dense(64, 5, 64, "bfloat16"))])
def test_a_platform_gets_its_storage(monkeypatch, platform, device_kind, expected):
  on(monkeypatch, platform, device_kind)
  assert storages.make(None, 5, 64, "bfloat16", 64, 2048) == expected


def test_what_no_kernel_serves_is_gathered_and_the_reason_is_logged(monkeypatch, caplog):
  on(monkeypatch, "tpu", "TPU v5 lite")
  assert storages.make(None, 5, 64, "bfloat16", 24, 2048) == storage_lib.Dense(24, 5, 64, "bfloat16")
  assert "gathered by XLA" in caplog.text and "page_size=24 is no multiple of 16" in caplog.text
  with pytest.raises(ValueError, match="storage='packed': page_size=24 is no multiple .*; or use storage='gather'"):
    storages.make("packed", 5, 64, "bfloat16", 24, 2048)


def test_a_jax_without_the_kernel_gathers(monkeypatch, caplog):
  on(monkeypatch, "gpu", "NVIDIA H200")

  def find_kernel(name):
    raise ImportError("no pallas.triton")
  monkeypatch.setattr(packed, "find_kernel", find_kernel)
  assert storages.make(None, 5, 64, "bfloat16", 64, 2048) == storage_lib.Dense(64, 5, 64, "bfloat16")
  assert "this jax has no kernels for GPUs (no pallas.triton)" in caplog.text
