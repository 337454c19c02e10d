"""Checks the model against reference vectors of the official PyTorch MoR.

  python -m tests.check_official FILE.npz ...

For each file, builds the model it describes, loads its weights, and compares
logits, selected tokens, losses and gradient norms, in float32 at the highest
matmul precision. Prints one JSON line per file; the exit status is 1 if any is
not ok. What a file holds: tests/helpers/official.py.

The cross-entropy of routed kinds is divided by B * T though only B * (T - 1)
tokens have a target, as the official code does; a plain mean for the others.
"""

import argparse
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mor.model import transformer
from mor.model.routers import base as router_base
from mor.model.routers import table as router_table
from mor.train import loss as loss_lib
from tests.helpers import official

LOGITS = 1e-4  # absolute
LOSSES = 1e-5  # relative
NORMS = 1e-4  # relative
_TERMS = {"sampling_loss": "sampling", "balancing_loss": "balance", "router_z_loss": "z"}
_LOSS_BLOCK = 32  # tokens; several blocks in a vector of 48


def check(path: str, compile=jax.jit, read=official.read) -> dict:
  """The report on one file, as `read` reads it, ready for JSON.

  Raises:
    ValueError: the file cannot be read, or an output is not finite.
  """
  vector = read(path)
  with jax.default_matmul_precision("highest"):
    return _check(vector, compile)


def _check(vector: official.Vector, compile) -> dict:
  arrays = vector.arrays
  losses, (logits_BTV, out), grads = _run(vector, compile)
  report = {
      "name": vector.name,
      "max_abs_logit": _distance(logits_BTV, arrays["logits_eval"]),
      "selected_equal": _selected_equal(vector, np.asarray(out.keep_RBT)),
  }
  within = [report["max_abs_logit"] <= LOGITS, report["selected_equal"]]
  if "token_logits" in arrays:
    score_BTR = np.moveaxis(out.score_RBT, 0, -1)
    report["max_abs_token_logit"] = _distance(score_BTR, arrays["token_logits"])
    within.append(report["max_abs_token_logit"] <= LOGITS)
  if "logits_causal" in arrays:
    causal_BTV, causal = _forward(vector, "decide", compile)
    report["max_abs_logit_causal"] = _distance(causal_BTV, arrays["logits_causal"])
    report["active_equal"] = bool(np.array_equal(causal.keep_RBT, arrays["active_causal"]))
    within += [report["max_abs_logit_causal"] <= LOGITS, report["active_equal"]]
  errors = report["relative_errors"] = {}
  for tolerance, values in ((LOSSES, losses), (NORMS, gradient_norms(grads))):
    for name in sorted(set(values) & set(arrays)):
      errors[name] = _relative_error(float(values[name]), float(arrays[name]))
      within.append(errors[name] <= tolerance)
  report["ok"] = all(within)
  return report


def _variables(vector, params):
  balance = {} if vector.bias_R is None else {"balance": {"bias_R": jnp.asarray(vector.bias_R)}}
  return {"params": params, **balance}


def _forward(vector, routing, compile):
  @compile
  def run(params, tokens_BT):
    model = transformer.Transformer(vector.model)
    out = model.apply(_variables(vector, params), tokens_BT, routing=routing)
    return transformer.unembed(params, out.hidden_BTD), out

  return run(*_inputs(vector))


def _run(vector, compile):
  """Losses by the official names, logits, outputs; gradients if the file has norms of them."""
  config = vector.model

  def total_loss(params, tokens_BT):
    out = transformer.Transformer(config).apply(_variables(vector, params), tokens_BT)
    target_BT = jnp.roll(tokens_BT, -1, axis=1)
    has_target_BT = jnp.ones(tokens_BT.shape).at[:, -1].set(0.0)
    count = tokens_BT.size if vector.kind in ("expert", "token") else jnp.sum(has_target_BT)
    nll = loss_lib.cross_entropy(
        out.hidden_BTD, params["embedding"], target_BT, has_target_BT / count, _LOSS_BLOCK)
    router = router_table.make(config)
    terms = router.losses(out.sums, router_base.norms(out.sums))
    total = nll + router.weigh(terms)
    losses = {"lm_loss": nll, "total_loss": total}
    losses |= {theirs: terms.get(ours, 0.0) for theirs, ours in _TERMS.items()}
    if not vector.has_z:
      losses["router_z_loss"] = 0.0
    return total, (losses, (transformer.unembed(params, out.hidden_BTD), out))

  if any(key.startswith("grad_norm") for key in vector.arrays):
    grads, (losses, outputs) = compile(jax.grad(total_loss, has_aux=True))(*_inputs(vector))
  else:
    grads, (_, (losses, outputs)) = {}, compile(total_loss)(*_inputs(vector))
  return losses, outputs, grads


def _inputs(vector):
  tokens_BT = jnp.asarray(vector.arrays["input_ids"], jnp.int32)
  return jax.tree.map(jnp.asarray, vector.params), tokens_BT


def gradient_norms(grads: dict) -> dict[str, float]:
  """L2 norms by the official names; a shared parameter is one leaf, so it counts once."""
  norm = lambda tree: float(np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64))
                                        for leaf in map(np.asarray, jax.tree.leaves(tree)))))
  routers = {name: grads[name] for name in ("router", "aux_router") if name in grads}
  return {"grad_norm_global": norm(grads), "grad_norm_embed": norm(grads.get("embedding")),
          "grad_norm_routers": norm(routers)}


def _selected_equal(vector: official.Vector, keep_RBT: np.ndarray) -> bool:
  """Whether every step processed the tokens that the file says."""
  if vector.kind == "expert":
    return all(np.array_equal([np.flatnonzero(keep_T) for keep_T in keep_BT],
                              vector.arrays[f"selected/{r}"])
               for r, keep_BT in enumerate(keep_RBT))
  if vector.kind == "token":
    depth_BT = _official_depth(vector)
    return all(np.array_equal(keep_BT, depth_BT >= r) for r, keep_BT in enumerate(keep_RBT))
  return bool(keep_RBT.all())


def _official_depth(vector):
  """Depths that follow from the file's router logits."""
  logits_BTR, router = vector.arrays["token_logits"], vector.model.router
  if router.activation == "softmax":
    p_BTR = np.exp(logits_BTR - logits_BTR.max(axis=-1, keepdims=True))
    p_BTR /= p_BTR.sum(axis=-1, keepdims=True)
  else:
    p_BTR = 1 / (1 + np.exp(-logits_BTR))
  bias_R = 0.0 if vector.bias_R is None else vector.bias_R
  return np.argmax(router.alpha * p_BTR + bias_R, axis=-1)


def _distance(actual, expected) -> float:
  actual = np.asarray(actual)
  if actual.shape != expected.shape:
    raise ValueError(f"shape {actual.shape}, the file has {expected.shape}")
  distance = float(np.max(np.abs(actual - expected)))
  if not np.isfinite(distance):
    raise ValueError("an output is not finite")
  return distance


def _relative_error(actual: float, expected: float) -> float:
  """|actual - expected| / |expected|; absolute where zero is expected."""
  return abs(actual - expected) / (abs(expected) or 1.0)


def main(paths: list[str], compile=jax.jit, read=official.read) -> int:
  """Prints the reports; returns the exit status."""
  all_ok = True
  for path in paths:
    try:
      report = check(path, compile, read)
    except Exception as error:  # whatever is wrong with one file, the others are checked
      reason = " ".join(str(error).split()) or type(error).__name__
      report = {"name": path, "ok": False, "reason": reason}
    print(json.dumps(report), flush=True)
    all_ok &= report["ok"]
  return 0 if all_ok else 1


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("files", nargs="+", metavar="FILE.npz")
  sys.exit(main(parser.parse_args().files))
