"""Losses of predictions: blocked cross-entropy, alone or with a divergence from a teacher.

Every loss is a sum over tokens divided by a count over the *whole* batch, so it does not
depend on the split of the batch into micro-batches or devices:

  nll       sum over targets / number of targets

The same rule holds for the auxiliary losses of the routers (`model/routers/`).
"""

import functools

import jax
import jax.numpy as jnp

from mor import types


def block_len(batch: int, seq_len: int, block: int) -> int:
  """Returns the largest divisor t of `seq_len` with batch * t <= block, at least 1."""
  return max(t for t in range(1, seq_len + 1) if seq_len % t == 0 and (t == 1 or batch * t <= block))


def _blocks(x: jax.Array, length: int) -> jax.Array:
  """Turns [B, T, ...] into [T / t, B, t, ...]: blocks in time, so that rows stay on their device."""
  batch, seq_len = x.shape[:2]
  return jnp.moveaxis(x.reshape(batch, seq_len // length, length, *x.shape[2:]), 1, 0)


def _unblock(x: jax.Array) -> jax.Array:
  """Turns the blocks of `_blocks` into [B, T, ...] again."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _logits(hidden_BTD, head_VD):
  return jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD.astype(hidden_BTD.dtype),
                    preferred_element_type=jnp.float32)


def _nll_and_lse(logits_BTV, target_BT):
  """Returns the negative log-likelihood of the targets, and the logsumexp of the logits."""
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  return lse_BT - jnp.take_along_axis(logits_BTV, target_BT[:, :, None], axis=-1)[:, :, 0], lse_BT


def token_nll(head_VD: types.Embedding, hidden_BTD: types.Activations, target_BT: types.Tokens,
              block: int) -> jax.Array:
  """Returns the negative log-likelihood of each target, float32, from `block` tokens of logits at a time."""
  length = block_len(*target_BT.shape, block)

  def run_block(xs):
    hidden_BTD, target_BT = xs
    return _nll_and_lse(_logits(hidden_BTD, head_VD), target_BT)[0]

  return _unblock(jax.lax.map(run_block, (_blocks(hidden_BTD, length), _blocks(target_BT, length))))


def likeliest(head_VD: types.Embedding, hidden_BTD: types.Activations, block: int) -> types.Tokens:
  """Returns the most likely token at each position, from `block` tokens of logits at a time."""
  length = block_len(*hidden_BTD.shape[:2], block)

  def run_block(hidden_BTD):
    return jnp.argmax(_logits(hidden_BTD, head_VD), axis=-1)

  return _unblock(jax.lax.map(run_block, _blocks(hidden_BTD, length)))


def compare_exit(head_VD: types.Embedding, exit_BTD: types.Activations, hidden_BTD: types.Activations,
                 target_BT: types.Tokens, block: int) -> tuple[jax.Array, jax.Array]:
  """Returns `token_nll` of an exit, and True for each token that exit and last layer agree on.

  They agree if their most likely tokens are equal.
  """
  length = block_len(*target_BT.shape, block)

  def run_block(xs):
    exit_BTD, hidden_BTD, target_BT = xs
    logits_BTV, last_BTV = _logits(exit_BTD, head_VD), _logits(hidden_BTD, head_VD)
    nll_BT, _ = _nll_and_lse(logits_BTV, target_BT)
    return nll_BT, jnp.argmax(logits_BTV, axis=-1) == jnp.argmax(last_BTV, axis=-1)

  blocks = tuple(_blocks(x, length) for x in (exit_BTD, hidden_BTD, target_BT))
  return jax.tree.map(_unblock, jax.lax.map(run_block, blocks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(hidden_BTD: types.Activations, head_VD: types.Embedding, target_BT: types.Tokens,
                  weight_BT: jax.Array, block: int) -> jax.Array:
  """Sums `token_nll` with weights, and computes the gradient in the same pass.

  The differentiated forward pass holds one block of logits, and its residuals are the
  gradients themselves. So it takes three matmuls with the head, not four, and makes no
  `[B, T, V]` array.
  """
  return jnp.sum(token_nll(head_VD, hidden_BTD, target_BT, block) * weight_BT)


def _blocked_gradient(student, others, block, terms):
  """Computes sums over blocks of logits, and their gradient, in one pass.

  Args:
    student: hidden states and head.
    others: arrays `[B, T, …]` that `terms` needs besides the logits.
    block: number of tokens whose logits exist at once.
    terms: function from logits and a block of `others` to a tuple of sums, the gradient
      of the first sum with respect to the logits, and arrays to keep for every token.

  Returns:
    The sums; the gradients with respect to hidden states and head; the arrays to keep.
  """
  hidden_BTD, head_VD = student
  length, dtype = block_len(*hidden_BTD.shape[:2], block), hidden_BTD.dtype

  def body(carry, xs):
    sums, d_head_VD = carry
    hidden, rest = xs
    added, d_logits_BTV, kept = terms(_logits(hidden, head_VD), *rest)
    d_logits_BTV = d_logits_BTV.astype(dtype)
    d_hidden = jnp.einsum("BTV,VD->BTD", d_logits_BTV, head_VD.astype(dtype))
    d_head_VD += jnp.einsum("BTV,BTD->VD", d_logits_BTV, hidden, preferred_element_type=jnp.float32)
    return (tuple(total + term for total, term in zip(sums, added, strict=True)), d_head_VD), (d_hidden, kept)

  xs = jax.tree.map(lambda x: _blocks(x, length), (hidden_BTD, others))
  sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
      lambda hidden, rest: terms(_logits(hidden, head_VD), *rest)[0], *jax.tree.map(lambda x: x[0], xs)))
  with jax.named_scope("loss"):
    (sums, d_head_VD), (d_hidden, kept) = jax.lax.scan(
        body, (sums, jnp.zeros(head_VD.shape, jnp.float32)), xs)
  return sums, (_unblock(d_hidden), d_head_VD.astype(head_VD.dtype)), jax.tree.map(_unblock, kept)


def _one_hot(target_BT, logits_BTV):
  return jax.lax.broadcasted_iota(target_BT.dtype, logits_BTV.shape, 2) == target_BT[:, :, None]


def _cross_entropy_forward(hidden_BTD, head_VD, target_BT, weight_BT, block):
  def terms(logits_BTV, target, weight):
    nll_BT, lse_BT = _nll_and_lse(logits_BTV, target)
    d_logits_BTV = (jnp.exp(logits_BTV - lse_BT[:, :, None]) - _one_hot(target, logits_BTV)) * weight[:, :, None]
    return (jnp.sum(nll_BT * weight),), d_logits_BTV, nll_BT

  (loss,), gradient, nll_BT = _blocked_gradient((hidden_BTD, head_VD), (target_BT, weight_BT), block, terms)
  return loss, (*gradient, nll_BT)


def _cross_entropy_backward(block, residuals, d_loss):
  del block
  d_hidden_BTD, d_head_VD, nll_BT = residuals
  return (d_hidden_BTD * d_loss.astype(d_hidden_BTD.dtype), d_head_VD * d_loss, None, nll_BT * d_loss)


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def distill(student: tuple[jax.Array, jax.Array], teacher: tuple[jax.Array, jax.Array], target_BT: types.Tokens,
            weight_BT: jax.Array, block: int, share: float, temperature: float) -> tuple[jax.Array, ...]:
  """Returns the weighted sums of (1 - share) NLL + share t^2 KL, of the NLL and of the KL.

  KL is the forward divergence KL(softmax(teacher / t) || softmax(student / t)). Only the
  first output has a gradient, with respect to the student alone. It is computed in the
  same pass, as in `cross_entropy`.

  Args:
    student: hidden states and head of the student.
    teacher: hidden states and head of the teacher.
    target_BT: next tokens.
    weight_BT: weight of each position in the sums.
    block: number of tokens whose logits exist at once.
    share: weight of the KL against the NLL.
    temperature: t.

  Source: Hinton et al. 2015; RRT paper §3.2 (online teacher, forward KL).
  """
  return _distill_forward(student, teacher, target_BT, weight_BT, block, share, temperature)[0]


def _distill_forward(student, teacher, target_BT, weight_BT, block, share, temperature):
  def terms(logits_BTV, taught, target, weight):
    nll_BT, lse_BT = _nll_and_lse(logits_BTV, target)
    log_q_BTV = jax.nn.log_softmax(logits_BTV / temperature)
    log_p_BTV = jax.nn.log_softmax(_logits(taught, teacher[1]) / temperature)
    kl_BT = jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
    loss_BT = (1.0 - share) * nll_BT + share * temperature**2 * kl_BT
    d_logits_BTV = ((1.0 - share) * (jnp.exp(logits_BTV - lse_BT[:, :, None]) - _one_hot(target, logits_BTV))
                    + share * temperature * (jnp.exp(log_q_BTV) - jnp.exp(log_p_BTV))) * weight[:, :, None]
    return tuple(jnp.sum(x_BT * weight) for x_BT in (loss_BT, nll_BT, kl_BT)), d_logits_BTV, ()

  sums, gradient, _ = _blocked_gradient(student, (teacher[0], target_BT, weight_BT), block, terms)
  return sums, gradient


def _distill_backward(block, share, temperature, residuals, d_sums):
  del block, share, temperature
  d_hidden_BTD, d_head_VD = residuals
  return (d_hidden_BTD * d_sums[0].astype(d_hidden_BTD.dtype), d_head_VD * d_sums[0]), None, None, None


distill.defvjp(_distill_forward, _distill_backward)
