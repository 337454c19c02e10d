"""Storage for accelerators: packed pages, one attention kernel a layer.

A layer has one buffer `[pages, K, page_size, W]`. An entry is a key in the first `head_dim` numbers and its value in
the next ones, so a page of one key head is one piece of memory that a kernel reads whole, and the lanes of a TPU are
full at a head size of 64. W is 2 * head_dim, rounded up to what the kernel takes. Ahead-of-time compilation for v5e
shows what other layouts cost: buffers that are cut or transposed by their write or read are copied whole, each tick.

Numbers are bfloat16 or float32 as such. Entries that are not finite are written with NaN keys and zero values (see
`storage.hide_broken`). A kernel gives a hidden entry no score, so its NaN reaches the lanes of keys only, which are
dropped.
"""

from collections.abc import Sequence
import dataclasses
import types as python_types

from flax import struct
import jax
import jax.numpy as jnp

from mor.decode import storage as storage_lib
from mor.model import kernels

KERNELS = ("tpu", "gpu")


def find_kernel(name: str) -> python_types.ModuleType:
  """Returns the module of one of `KERNELS`. The imports stand here, because Pallas takes time that a CPU need not spend."""
  if name == "gpu":
    from mor.decode import attention_gpu  # pylint: disable=g-import-not-at-top
    return attention_gpu
  from mor.decode import attention_tpu  # pylint: disable=g-import-not-at-top
  return attention_tpu


@struct.dataclass
class PackedBuffer:
  """Keys (rotated) beside values, of one layer."""

  kv_PKEW: jax.Array

  @property
  def num_pages(self) -> int:
    return self.kv_PKEW.shape[0]


@dataclasses.dataclass(frozen=True)
class PackedPages:
  """Buffers `[pages, K, page_size, W]`, read by the kernel of `KERNELS`; on a CPU it is interpreted, for tests."""

  page_size: int
  num_kv_heads: int
  head_dim: int
  kv_format: str
  kernel: str = "tpu"
  sorts_rows = False  # a row costs the same wherever it stands

  @property
  def dtype(self) -> jnp.dtype:
    return jnp.dtype(self.kv_format)

  @property
  def width(self) -> int:
    return self._module.round_width(2 * self.head_dim)

  @property
  def _module(self) -> python_types.ModuleType:
    return find_kernel(self.kernel)

  def explain_misfit(self) -> str | None:
    """Returns why the kernel cannot serve such pages, with the remedy, or None if it can."""
    try:
      find_kernel(self.kernel)
    except ImportError as error:  # jax will drop the Triton back end of Pallas
      return f"this jax has no kernels for {self.kernel.upper()}s ({error})"
    return self._module.explain_misfit(self.page_size, self.num_kv_heads, self.width, self.dtype)

  def make(self, num_pages: int) -> PackedBuffer:
    return PackedBuffer(jnp.zeros((num_pages, self.num_kv_heads, self.page_size, self.width), self.dtype))

  def write(self, buffer: PackedBuffer, page_M: jax.Array, offset_M: jax.Array, k_MKH: jax.Array,
            v_MKH: jax.Array) -> PackedBuffer:
    """Puts one entry for each token; see `storage.py`."""
    kv_MKW = jnp.concatenate(storage_lib.hide_broken(k_MKH, v_MKH), axis=-1)
    kv_MKW = jnp.pad(kv_MKW, ((0, 0), (0, 0), (0, self.width - kv_MKW.shape[2]))).astype(self.dtype)
    head_1K = jnp.arange(self.num_kv_heads)[None, :]
    at = buffer.kv_PKEW.at[page_M[:, None], head_1K, offset_M[:, None]]
    return PackedBuffer(at.set(kv_MKW, mode="drop"))

  def attend(self, q_MNH: jax.Array, parts: Sequence[tuple[PackedBuffer, storage_lib.SeenEntries]],
             cuts: Sequence[int] = (), num: jax.Array | None = None) -> jax.Array:
    """Attends over the pages in use, of all parts at once; a token that sees nothing gets what is finite."""
    if any(buffer is not parts[0][0] for buffer, _ in parts):  # only `generate` of steps with layers of their own
      return storage_lib.attend_whole(self, q_MNH, parts)
    rows = parts[0][1]
    for _, more in parts[1:]:
      rows = join_rows(rows, more, self.page_size)
    return self._module.attend(q_MNH, parts[0][0].kv_PKEW, rows.page_MP, rows.length_M, rows.hidden_MS,
                               interpret=kernels.interprets())

  def read(self, buffer: PackedBuffer, rows: storage_lib.SeenEntries) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns whole rows: keys and values `[M, S, K, H]` in float32, and which entries are seen."""
    kv_MPKEW = buffer.kv_PKEW.at[rows.page_MP].get(mode="clip")
    kv_MSKW = jnp.swapaxes(kv_MPKEW, 2, 3).reshape(kv_MPKEW.shape[0], -1, self.num_kv_heads, self.width)
    k_MSKH, v_MSKH, _ = jnp.split(kv_MSKW.astype(jnp.float32), (self.head_dim, 2 * self.head_dim), axis=-1)
    return k_MSKH, v_MSKH, rows.mark_seen(k_MSKH.shape[1])


def join_rows(first: storage_lib.SeenEntries, second: storage_lib.SeenEntries,
              page_size: int) -> storage_lib.SeenEntries:
  """Returns one row of what two rows of a buffer show: the pages of the second follow the used ones of the first."""
  assert second.hidden_MS is None, "only a base has hidden entries"
  used_M = (first.length_M + page_size - 1) // page_size
  num = first.page_MP.shape[1] + second.page_MP.shape[1]
  column_1P = jnp.arange(num)[None, :]
  both_MP = jnp.concatenate([first.page_MP, second.page_MP], axis=1)
  shift_M1 = (first.page_MP.shape[1] - used_M)[:, None]
  index_MP = jnp.where(column_1P < used_M[:, None], column_1P, jnp.minimum(column_1P + shift_M1, num - 1))
  index_1S, start_M1 = jnp.arange(num * page_size)[None, :], (used_M * page_size)[:, None]
  hidden_MS = (index_1S >= first.length_M[:, None]) & (index_1S < start_M1)
  if first.hidden_MS is not None:
    spare = hidden_MS.shape[1] - first.hidden_MS.shape[1]
    hidden_MS |= jnp.pad(first.hidden_MS, ((0, 0), (0, spare))) & (index_1S < start_M1)
  length_M = jnp.where(second.length_M > 0, start_M1[:, 0] + second.length_M, first.length_M)
  return storage_lib.SeenEntries(jnp.take_along_axis(both_MP, index_MP, axis=1), length_M, hidden_MS)
