"""cuDNN's attention against XLA's on an NVIDIA GPU, alone and in whole models.

  python -m tests.check_gpu

Outputs and gradients in bfloat16 must be as near to XLA's in float32 as XLA's own in
bfloat16 are, by the norm of the difference, within a factor of 2. Prints one line a
case; exit status 1 if one fails. Run by hand: the suite runs on CPUs.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mor.model import kernels
from mor.model import transformer
from mor.model.kv import view as kv_view
from tests.helpers import tiny
from tests.helpers import weights

MARGIN = 2.0
SHAPES = ((2, 128, 4, 2, 64), (2, 683, 15, 5, 64), (1, 1365, 9, 3, 64), (3, 77, 4, 4, 16))  # B, T, N, K, H
MODELS = {
    "vanilla": tiny.VANILLA,
    "recursive": dict(sharing="cycle", num_layers=4, num_recursions=2, router=tiny.FIXED),
    "expert_choice": dict(router=dict(name="expert_choice", capacity=(1.0, 0.7, 0.4)), num_layers=5),
    "token_choice": dict(router=tiny.TOKEN_CHOICE),
    "shared": dict(kv_plan="shared", router=dict(name="expert_choice", capacity=(1.0, 0.7, 0.4)), num_layers=5),
}


def distance(ours, theirs) -> float:
  """Norm of the difference over all leaves, relative."""
  pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
  norm = lambda leaves: sum(float(jnp.sum(jnp.square(leaf.astype(jnp.float32)))) for leaf in leaves)**0.5
  return norm([a.astype(jnp.float32) - b.astype(jnp.float32) for a, b in pairs]) / norm([b for _, b in pairs])


def report(name: str, ours, coarse, exact) -> bool:
  """Whether `ours` is about as near to `exact` as `coarse` is; prints both distances."""
  near, allowed = distance(ours, exact), MARGIN * distance(coarse, exact)
  passed = near <= allowed
  print(f"{'ok  ' if passed else 'FAIL'} {name}: {near:.2e}, allowed {allowed:.2e}")
  return passed


def check_attention(shape, documents: int) -> bool:
  """One attention, causal by place or within documents."""
  batch, seq_len, num_heads, num_kv_heads, head_dim = shape
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.normal(size=(batch, seq_len, heads, head_dim)), jnp.bfloat16)
  inputs = draw(num_heads), draw(num_kv_heads), draw(num_kv_heads)
  position_BT = jnp.broadcast_to(jnp.arange(seq_len)[None, :], (batch, seq_len))
  segment_BT = 1 + position_BT * documents // seq_len
  mask_BTS = kv_view.visible(position_BT, segment_BT, position_BT, segment_BT)
  weight_BTNH = jnp.asarray(rng.normal(size=(batch, seq_len, num_heads, head_dim)), jnp.float32)

  def run(attend, dtype):
    def total(*inputs):
      out_BTNH = attend(*inputs)
      return jnp.sum(out_BTNH.astype(jnp.float32) * weight_BTNH), out_BTNH
    grads, out_BTNH = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*(x.astype(dtype) for x in inputs))
    return out_BTNH, grads

  xla = lambda q, k, v: kernels.xla(q, k, v, mask_BTS)
  cudnn = lambda q, k, v: kernels.cudnn(q, k, v, None if documents == 1 else mask_BTS)
  with jax.default_matmul_precision("highest"):
    exact = run(xla, jnp.float32)
  return report(f"attention {shape}, {documents} document(s)", run(cudnn, jnp.bfloat16), run(xla, jnp.bfloat16), exact)


def check_model(name: str, cross_documents: bool) -> bool:
  """A whole model; where rounding routes a token otherwise, it does so to XLA's bfloat16 model too."""
  config = tiny.config(model=dict(head_dim=64, cross_documents=cross_documents) | MODELS[name]).model
  seq_len = 150
  tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (2, seq_len)))
  segment_BT = np.ones((2, seq_len), np.int32)
  segment_BT[1, 60:] = 2
  segment_BT[1, 131:] = 0
  params = jax.tree.map(jnp.asarray, weights.draw(config))

  def run(attention_kernel, dtype):
    model = transformer.Transformer(dataclasses.replace(config, attention=attention_kernel, compute_dtype=dtype))

    def total(params):
      out = model.apply({"params": params}, tokens_BT, jnp.asarray(segment_BT))
      hidden_BTD = jnp.where((segment_BT != 0)[:, :, None], out.hidden_BTD, 0.0)
      return jnp.sum(jnp.sin(hidden_BTD.astype(jnp.float32))), hidden_BTD
    grads, hidden_BTD = jax.jit(jax.grad(total, has_aux=True))(params)
    return hidden_BTD, grads

  with jax.default_matmul_precision("highest"):
    exact = run("xla", "float32")
  return report(f"{name}, cross_documents={cross_documents}", run("cudnn", "bfloat16"), run("xla", "bfloat16"), exact)


def main() -> int:
  if kernels.platform() != "gpu":
    sys.exit("error: no NVIDIA GPU here; the suite's tests run without one")
  passed = [check_attention(shape, documents) for shape in SHAPES for documents in (1, 3)]
  passed += [check_model(name, crossing) for name in MODELS for crossing in (False, True)]
  return 0 if all(passed) else 1


if __name__ == "__main__":
  sys.exit(main())
