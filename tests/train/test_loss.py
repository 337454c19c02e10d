"""The blocked cross-entropy equals the plain one, and never holds all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mor.train import loss

B, T, D, V = 3, 12, 20, 61


def inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden_BTD = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
  embedding_VD = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
  target_BT = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  weight_BT = jnp.asarray(rng.uniform(size=(B, T)), jnp.float32)
  return hidden_BTD, embedding_VD, target_BT, weight_BT


def plain(hidden_BTD, embedding_VD, target_BT, weight_BT):
  logits_BTV = jnp.einsum("BTD,VD->BTV", hidden_BTD, embedding_VD)
  return jnp.sum(weight_BT * optax.softmax_cross_entropy_with_integer_labels(logits_BTV, target_BT))


@pytest.mark.parametrize("block", [1, 17])
def test_value_and_gradients(block):
  hidden_BTD, embedding_VD, target_BT, weight_BT = inputs()
  expected = jax.value_and_grad(plain, (0, 1, 3))(hidden_BTD, embedding_VD, target_BT, weight_BT)
  actual = jax.value_and_grad(
      lambda h, e, w: 2.0 * loss.cross_entropy(h, e, target_BT, w, block), (0, 1, 2))(
          hidden_BTD, embedding_VD, weight_BT)
  np.testing.assert_allclose(actual[0], 2 * expected[0], rtol=1e-5)
  for a, b in zip(actual[1], expected[1]):
    np.testing.assert_allclose(a, 2 * b, rtol=1e-4, atol=1e-5)
  primal = loss.cross_entropy(hidden_BTD, embedding_VD, target_BT, weight_BT, block)
  np.testing.assert_allclose(primal, expected[0], rtol=1e-5)


def test_bfloat16_gradients_have_the_inputs_types():
  hidden_BTD, embedding_VD, target_BT, weight_BT = inputs(jnp.bfloat16)
  d_hidden, d_embedding = jax.grad(loss.cross_entropy, (0, 1))(hidden_BTD, embedding_VD, target_BT, weight_BT, 9)
  assert d_hidden.dtype == jnp.bfloat16 and d_embedding.dtype == jnp.float32
  expected = jax.grad(plain, 1)(hidden_BTD.astype(jnp.float32), embedding_VD, target_BT, weight_BT)
  np.testing.assert_allclose(d_embedding, expected, atol=5e-2)


def largest(jaxpr) -> int:
  """Elements of the largest array that a program makes, loop bodies included."""
  sizes = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
  for e in jaxpr.eqns:
    sizes += [largest(sub) for sub in subprograms(e.params)]
  return max(sizes, default=0)


def subprograms(params):
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      item = getattr(item, "jaxpr", item)
      if hasattr(item, "eqns"):
        yield item


def test_all_logits_never_exist():
  grad = jax.grad(loss.cross_entropy, (0, 1))
  small = largest(jax.make_jaxpr(lambda *a: grad(*a, 9))(*inputs()).jaxpr)
  assert small < B * T * V
  assert largest(jax.make_jaxpr(lambda *a: grad(*a, 1000))(*inputs()).jaxpr) >= B * T * V


def test_blocks_divide_the_sequence():
  assert loss.block_len(3, 12, 9) == 3
  assert loss.block_len(3, 12, 17) == 4
  assert loss.block_len(3, 12, 1) == 1
  assert loss.block_len(3, 7, 20) == 1


@pytest.mark.parametrize("share, temperature", [(0.3, 2.0), (1.0, 1.0)])
def test_distillation_is_the_weighted_divergence_and_its_gradient(share, temperature):
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  student, teacher = (normal(3, 12, 20), normal(61, 20)), (normal(3, 12, 14), normal(61, 14))
  target_BT = jnp.asarray(rng.integers(0, 61, (3, 12)), jnp.int32)
  weight_BT = jnp.asarray(rng.random((3, 12)), jnp.float32)

  def plain(student, teacher):
    logits, taught = (jnp.einsum("BTD,VD->BTV", *model) for model in (student, teacher))
    nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits), target_BT[:, :, None], axis=2)[:, :, 0]
    log_p, log_q = jax.nn.log_softmax(taught / temperature), jax.nn.log_softmax(logits / temperature)
    kl_BT = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.sum(((1 - share) * nll_BT + share * temperature**2 * kl_BT) * weight_BT)

  blocked = lambda student, teacher: loss.distill(student, teacher, target_BT, weight_BT, 9, share, temperature)[0]
  want, want_grads = jax.value_and_grad(plain)(student, teacher)
  got, got_grads = jax.value_and_grad(blocked)(student, teacher)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for g, w in zip(got_grads, want_grads):
    np.testing.assert_allclose(g, w, atol=1e-5)
  assert not any(np.any(g) for g in jax.grad(blocked, argnums=1)(student, teacher)), "the teacher learned"
