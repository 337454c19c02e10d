"""Fused attention: which kernel a pass uses, and the kernels.

  xla     scores and probabilities [B, N, T, S] in memory; any mask, any device
  splash  TPU: blocks of queries against blocks of keys, later blocks skipped;
          neither scores nor mask ever exist whole
  cudnn   GPU, 16 bits: blocks too, causal by place, or else under a mask [B, T, S]

Splash knows masks that are causal by place and by segment. Routed tokens are
gathered in ascending order, so "causal by original position" is causal by place
for every pass whose queries and keys are the same tokens. Gathered queries
against all keys (a sharing KV plan's later steps) are not, and run in XLA.

Under a mesh a kernel runs on each device's rows (over those of `data`, `fsdp` that
divide them) and heads (over `tensor` or `model`, if it divides them). It does not
split the sequence: where the mesh does, "auto" is xla.

Source: `jax.experimental.pallas.ops.tpu.splash_attention`, `jax.nn.dot_product_attention`.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.extend import backend as jax_backend
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

from mor import config as config_lib
from mor import types

_MOST_BLOCK = 512  # tokens of a side of splash's blocks
_LANES = 128  # what a block must be a multiple of
PRIMITIVES = ("pallas_call", "dot_product_attention_fwd_wrapper")  # what splash and cudnn are in a jaxpr
_CUDNN_HEAD_DIM = 128  # older GPUs than Hopper take no more


def platform() -> str:
  """Returns the platform that the program is lowered for: "cpu", "gpu", "tpu".

  That of the devices of the mesh in `jax.set_mesh`, so that compiling ahead of
  time for machines that are not here is right under it; without a mesh, the
  default backend's.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = jax.default_backend() if device is None else device.platform
  return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
  """Returns the kind of device that the program is lowered for, such as "NVIDIA H200"; see `platform`."""
  return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def interprets() -> bool:
  """Returns True if Pallas kernels are interpreted, as the device has no compiler for them: on a CPU."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (jax.default_backend() if device is None else device.platform) == "cpu"


def full_precision(function: Callable) -> Callable:
  """Returns a function whose products of float32 numbers are computed in float32 on every platform.

  By default a GPU rounds their factors to TF32, and a TPU to bfloat16. Products of bfloat16 numbers stay as they are.
  Each function that is compiled and multiplies numbers of a model is wrapped so.
  """
  @functools.wraps(function)
  def run(*args: Any, **options: Any) -> Any:
    if platform() == "cpu":  # whose products are in full precision anyway
      return function(*args, **options)
    with jax.default_matmul_precision("highest"):
      return function(*args, **options)

  return run


def choose(config: config_lib.ModelConfig, in_order: bool) -> str:
  """Returns the kernel of a pass: "xla", "splash" or "cudnn", decided while tracing.

  Args:
    config: its `attention` names one, or is "auto".
    in_order: queries and keys are the same tokens, in ascending order.

  Raises:
    ValueError: the kernel that it names does not run on this platform.
  """
  name, where = config.attention, platform()
  if name == "auto":
    if where == "tpu" and in_order and config.head_dim % 8 == 0 and _size("sequence") == 1:
      return "splash"
    fits = config.compute_dtype == "bfloat16" and config.head_dim % 8 == 0 and config.head_dim <= _CUDNN_HEAD_DIM
    return "cudnn" if where == "gpu" and fits and _size("sequence") == 1 and _has_cuda() else "xla"
  if name == "cudnn":
    if where != "gpu" or not _has_cuda():
      raise ValueError(f"model.attention='cudnn' on {where}: cuDNN needs an NVIDIA GPU; use 'auto' or 'xla'")
    if config.compute_dtype != "bfloat16":
      raise ValueError(f"model.attention='cudnn' with model.compute_dtype={config.compute_dtype!r}; use 'bfloat16', "
                       "or model.attention='xla'")
  if name == "splash":
    if where == "gpu":
      raise ValueError("model.attention='splash' on gpu: it is a TPU kernel; use 'auto', 'cudnn' or 'xla'")
    return "splash" if in_order else "xla"
  return name


def xla(q_BTNH: types.Queries, k_BSKH: types.Keys, v_BSKH: types.Keys, mask_BTS: types.AttentionMask,
        bias_BTS: jax.Array | None = None) -> types.Queries:
  """Attends under any mask, logits and softmax in float32; a bias is added to the logits of all heads.

  A query that sees no key gets the mean of the values, never NaN; such queries are
  padding, and the caller drops their results.
  """
  bias_B1TS = None if bias_BTS is None else bias_BTS[:, None]
  return jax.nn.dot_product_attention(
      q_BTNH, k_BSKH, v_BSKH, bias_B1TS, mask=mask_BTS[:, None], implementation="xla")


def splash(q_BTNH: types.Queries, k_BSKH: types.Keys, v_BSKH: types.Keys,
           segment_BS: types.Segments) -> types.Queries:
  """Attends causally within segments; on a CPU interpreted, for tests.

  The sequence is padded to whole blocks by tokens of segment 0. As those of
  segment 0 see each other, no query is without a key (splash's gradient would be
  wrong there), and what they give means nothing: the caller drops it.

  Args:
    segment_BS: of queries and keys; 0 is padding, or a token that is hidden.
  """
  block, length = _blocks(q_BTNH.shape[1])

  def attend(q_BTNH, k_BSKH, v_BSKH, segment_BS):
    q_BTNH = (q_BTNH.astype(jnp.float32) * q_BTNH.shape[-1]**-0.5).astype(q_BTNH.dtype)
    row = _splash(q_BTNH.shape[2], block, length)
    heads_first = (jnp.swapaxes(_pad(x_BTNH, length), 1, 2) for x_BTNH in (q_BTNH, k_BSKH, v_BSKH))
    out_BNTH = jax.vmap(row)(*heads_first, _pad(segment_BS, length))
    return jnp.swapaxes(out_BNTH, 1, 2)[:, :q_BTNH.shape[1]]

  if q_BTNH.dtype != jnp.float32:
    attend = _at_default_precision(attend)
  with jax.named_scope("splash"):
    return _on_each_device(attend, q_BTNH, k_BSKH, v_BSKH, segment_BS)


def cudnn(q_BTNH: types.Queries, k_BSKH: types.Keys, v_BSKH: types.Keys, mask_BTS: types.AttentionMask | None,
          implementation: str = "cudnn") -> types.Queries:
  """Attends under any mask; without one causally by place, which skips the later blocks.

  Odd lengths are padded, as cuDNN's gradient takes even ones.
  """
  def even(x):
    return _pad(x, x.shape[1] + x.shape[1] % 2)

  def attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS):
    seen = dict(is_causal=True)  # padded keys come last
    if mask_BTS is not None:
      seen = dict(mask=jnp.swapaxes(even(jnp.swapaxes(even(mask_BTS), 1, 2)), 1, 2)[:, None])
    out_BTNH = jax.nn.dot_product_attention(
        even(q_BTNH), even(k_BSKH), even(v_BSKH), **seen, implementation=implementation)
    return out_BTNH[:, :q_BTNH.shape[1]]

  with jax.named_scope("cudnn"):
    return _on_each_device(attend, q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def _at_default_precision(attend: Callable) -> Callable:
  """Returns attention whose products, and those of its gradient, do not ask for full precision.

  The compiler of TPU kernels refuses that of bfloat16, where it would change nothing.
  """
  default = functools.partial(jax.default_matmul_precision, None)

  def forward(q_BTNH, k_BSKH, v_BSKH, segment_BS):
    with default():
      return jax.vjp(lambda *qkv: attend(*qkv, segment_BS), q_BTNH, k_BSKH, v_BSKH)

  def backward(pull_back, out_BTNH):
    with default():
      return *pull_back(out_BTNH), None

  def plain(*given):
    with default():
      return attend(*given)

  plain = jax.custom_vjp(plain)
  plain.defvjp(forward, backward)
  return plain


def _blocks(seq_len: int) -> tuple[int, int]:
  """Returns the side of a block, and the length that whole blocks of it cover: the fewest, of equal sides."""
  count = -(-seq_len // _MOST_BLOCK)
  block = -(-seq_len // (count * _LANES)) * _LANES
  return block, count * block


def _pad(x, length: int):
  """Pads the second axis with zeros, up to `length`."""
  return jnp.pad(x, [(0, length - x.shape[1]) if axis == 1 else (0, 0) for axis in range(x.ndim)])


def _splash(num_heads: int, block: int, length: int) -> Callable:
  """Returns the kernel of one row. The import stands here, because it takes time that other kernels do not need."""
  from jax.experimental.pallas.ops.tpu import splash_attention

  sides = splash_attention.BlockSizes(
      block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block)
  mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length))] * num_heads)
  kernel = splash_attention.make_splash_mha(
      mask, block_sizes=sides, head_shards=1, q_seq_shards=1, interpret=platform() != "tpu")
  return lambda q_NTH, k_KSH, v_KSH, segment_S: kernel(
      q_NTH, k_KSH, v_KSH, splash_attention.SegmentIds(q=segment_S, kv=segment_S))


def _on_each_device(attend: Callable, q_BTNH, k_BSKH, v_BSKH, by_row) -> types.Queries:
  """Runs `attend` on the batch rows and heads of each device of the mesh, if there is one."""
  mesh = jax.sharding.get_abstract_mesh()
  free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}
  if all(mesh.shape[name] == 1 for name in free):
    return attend(q_BTNH, k_BSKH, v_BSKH, by_row)
  rows, split = [], 1
  for name in ("data", "fsdp"):
    if name in free and q_BTNH.shape[0] % (split * mesh.shape[name]) == 0:
      rows.append(name)
      split *= mesh.shape[name]
  rows = tuple(rows) or None
  heads = "tensor" if "tensor" in free and k_BSKH.shape[2] % mesh.shape["tensor"] == 0 else None
  spec = P(rows, None, heads, None)
  return jax.shard_map(attend, in_specs=(spec, spec, spec, P(rows)), out_specs=spec, axis_names=free, check_vma=False)(
      q_BTNH, k_BSKH, v_BSKH, by_row)


def _size(axis: str) -> int:
  return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def _has_cuda() -> bool:
  return "cuda" in jax_backend.get_backend().platform_version
