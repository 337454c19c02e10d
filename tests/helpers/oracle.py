"""The routed forward in float64 NumPy: slow, simple, and independent of JAX.

Written from the equations, one row, one token and one head at a time, so that
each line can be read against the paper. It shares the config dataclass and the
layout of the parameter tree with the model, and no code.

A row is a dictionary from position to hidden state that holds the non-padding
tokens only. A *store* is a dictionary from position to that token's (key,
value) in one layer; every visibility rule is a rule about which positions a
store holds:

  recursion_wise  the tokens this step processes
  shared          all tokens, as they were at the first use of the layer
  hybrid          the same, overlaid by the tokens this step processes

Limits: arch "random" is not covered, nor schedules (capacity and balance
warm-up), nor bfloat16.

Source: MoR paper (arXiv 2507.10524) §2.1-2.2, eq. 2.1 and 2.2, Table 5.
"""

import dataclasses
import math

import numpy as np

from mor import config as config_lib


@dataclasses.dataclass(frozen=True)
class Result:
  """What the oracle computes; padding holds zeros, and False in the masks.

  Attributes:
    hidden_BTD: after the final norm.
    logits_BTV: next-token logits.
    keep_RBT: processed by step r.
    candidate_RBT: had a router score at step r; elsewhere scores are zero.
    score_RBT: raw logits of the main router (token_choice: of depth r).
    sampling: binary cross-entropy of kept or not, summed over steps.
    balance: balancing loss of token_choice.
    z: mean squared logsumexp of the main router's logits, summed over steps.
  """

  hidden_BTD: np.ndarray
  logits_BTV: np.ndarray
  keep_RBT: np.ndarray
  candidate_RBT: np.ndarray
  score_RBT: np.ndarray
  sampling: float
  balance: float
  z: float


def forward(config: config_lib.ModelConfig, params: dict, tokens_BT, segment_BT=None,
            routing: str = "select", bias_R=None) -> Result:
  """Runs the model that `config` describes, row by row.

  Args:
    config: the model.
    params: parameter tree of `mor.model.transformer`, as arrays.
    tokens_BT: token ids.
    segment_BT: 0 for padding, else the number of the document; None: one each.
    routing: "select" (top-k over the whole row) or "decide" (causal).
    bias_R: bias of loss-free balancing, added for selection only.

  """
  params = _map(lambda leaf: np.asarray(leaf, np.float64), params)
  tokens_BT = np.asarray(tokens_BT)
  segment_BT = np.ones_like(tokens_BT) if segment_BT is None else np.asarray(segment_BT)
  bias_R = np.zeros(config.num_recursions) if bias_R is None else np.asarray(bias_R, np.float64)
  rows = [_Row(config, params, segment_T, routing, bias_R) for segment_T in segment_BT]
  hidden_BTD = np.zeros(tokens_BT.shape + (config.d_model,))
  for row, tokens_T, out_TD in zip(rows, tokens_BT, hidden_BTD):
    for i, vector in row.run(tokens_T).items():
      out_TD[i] = vector
  return Result(
      hidden_BTD=hidden_BTD,
      logits_BTV=hidden_BTD @ params["embedding"].T,
      keep_RBT=np.stack([row.keep_RT for row in rows], axis=1),
      candidate_RBT=np.stack([row.candidate_RT for row in rows], axis=1),
      score_RBT=np.stack([row.score_RT for row in rows], axis=1),
      sampling=_sum_of_means([row.cross_entropies for row in rows]),
      balance=_balance(config, rows),
      z=_sum_of_means([row.squares for row in rows]))


class _Row:
  """One row on its way through the model, and what its routers said."""

  def __init__(self, config, params, segment_T, routing, bias_R):
    self.config, self.params, self.routing, self.bias_R = config, params, routing, bias_R
    self.document = {i: int(s) for i, s in enumerate(segment_T) if s > 0}
    shape = (config.num_recursions, len(segment_T))
    self.keep_RT = np.zeros(shape, bool)
    self.candidate_RT = np.zeros(shape, bool)
    self.score_RT = np.zeros(shape)
    self.cross_entropies = [[] for _ in range(config.num_recursions)]
    self.squares = [[] for _ in range(config.num_recursions)]
    self.depths, self.probabilities = [], []  # token_choice
    self.first = {}  # stack row -> store of its first use

  def run(self, tokens_T):
    x = {i: self.params["embedding"][tokens_T[i]] for i in self.document}
    for weights in _layers(self.params.get("prelude")):
      x = self.layer(weights, x)
    recursion = dict(fixed=self.fixed, expert_choice=self.expert_choice,
                     token_choice=self.token_choice)
    x = recursion[self.config.router.name](x)
    for weights in _layers(self.params.get("coda")):
      x = self.layer(weights, x)
    return {i: _rms_norm(v, self.params["final_norm"], self.config.norm_eps) for i, v in x.items()}

  def fixed(self, x):
    for r in range(self.config.num_recursions):
      x = self.step(r, x, list(x))
    return x

  def expert_choice(self, x):
    router = self.config.router
    x, live = dict(x), list(x)
    for r in range(self.config.num_recursions):
      logit = {i: self.router_logits("router", r, x[i] / router.temperature)[0] for i in live}
      score = {i: router.alpha * _activate(router.activation, logit[i]) for i in live}
      decider = logit
      if router.sampling == "aux_router":
        decider = {i: self.router_logits("aux_router", r, x[i])[0] for i in live}
      if self.routing == "select":
        kept = self.best(r, score)
      else:
        kept = [i for i in live if self.config.capacity[r] == 1 or decider[i] >= 0]
      for i in live:
        self.candidate_RT[r, i], self.score_RT[r, i] = True, logit[i]
        self.squares[r].append(logit[i] ** 2)
        if router.sampling != "none":
          self.cross_entropies[r].append(_cross_entropy(decider[i], i in kept))
      for i, y in self.step(r, x, kept).items():
        x[i] = x[i] + (score[i] * y if router.gating == "weighted" else y)
      live = kept
    return x

  def best(self, r, score):
    """Positions of the highest scores, ascending; of equals the earlier first."""
    count = max(1, int(self.config.capacity[r] * len(self.document))) if self.document else 0
    return sorted(sorted(score, key=lambda i: (-score[i], i))[:count])

  def token_choice(self, x):
    router, last = self.config.router, self.config.num_recursions - 1
    entry, state, out = x, dict(x), {}
    depth, weight = {}, {}
    for i in entry:
      logits_R = self.router_logits("router", 0, entry[i] / router.temperature)
      softmax = router.activation == "softmax"
      p_R = router.alpha * (_softmax(logits_R) if softmax else 1 / (1 + np.exp(-logits_R)))
      depth[i] = int(np.argmax(p_R + self.bias_R))
      weight[i] = p_R[depth[i]]
      self.candidate_RT[:, i], self.score_RT[:, i] = True, logits_R
      self.squares[0].append(math.log(np.exp(logits_R).sum()) ** 2)
      self.depths.append(depth[i])
      self.probabilities.append(p_R)
    for r in range(last + 1):
      for i, y in self.step(r, state, [i for i in state if depth[i] >= r]).items():
        gated = weight[i] * y
        if depth[i] == r:
          out[i] = entry[i] + (y if router.gating == "additive" else gated)
        else:
          state[i] = gated if router.gating == "every_step" else y
    return out

  def step(self, r, x, kept):
    """Runs the layers of step r; returns the outputs of the `kept` tokens."""
    self.keep_RT[r, kept] = True
    # Later steps read the keys that every token, kept or not, has at step 0.
    everybody = r == 0 and self.config.kv_plan != "recursion_wise"
    y = {i: x[i] for i in (x if everybody else kept)}
    for stack_row in _stack_rows(self.config)[r]:
      y = self.layer(_layer(self.params["stack"], stack_row), y, stack_row)
    return {i: y[i] for i in kept}

  def layer(self, weights, x, stack_row=None):
    """One Llama layer over the tokens in `x`; `stack_row` is its shared identity."""
    eps = self.config.norm_eps
    normed = {i: _rms_norm(v, weights["attention_norm"], eps) for i, v in x.items()}
    fresh = {i: self.key_value(weights["attention"], i, v) for i, v in normed.items()}
    store = self.store(fresh, stack_row)
    x = {i: x[i] + self.attend(weights["attention"], i, normed[i], store) for i in x}
    normed = {i: _rms_norm(v, weights["ffw_norm"], eps) for i, v in x.items()}
    return {i: x[i] + _swiglu(weights["ffw"], v) for i, v in normed.items()}

  def store(self, fresh, stack_row):
    """The keys a layer sees, from those of the tokens it processes."""
    if stack_row is None or self.config.kv_plan == "recursion_wise":
      return fresh
    if stack_row not in self.first:
      self.first[stack_row] = fresh
    return {**self.first[stack_row], **(fresh if self.config.kv_plan == "hybrid" else {})}

  def key_value(self, weights, i, v):
    key_KH = np.einsum("D,DKH->KH", v, weights["k"])
    return (np.stack([_rotate(self.normed(weights, "k", k), i, self.config.rope_theta) for k in key_KH]),
            np.einsum("D,DKH->KH", v, weights["v"]))

  def normed(self, weights, name, head_H):
    """A head of queries or keys, normalised where the model says so."""
    return _rms_norm(head_H, weights[f"{name}_norm"], self.config.norm_eps) if self.config.qk_norm else head_H

  def attend(self, weights, i, v, store):
    """Attention of the query at position i over the visible part of a store."""
    crossing = self.config.cross_documents
    visible = [j for j in sorted(store)
               if j <= i and (crossing or self.document[j] == self.document[i])]
    group = self.config.num_heads // self.config.num_kv_heads
    out_D = np.zeros_like(v)
    for n in range(self.config.num_heads):
      query_H = _rotate(self.normed(weights, "q", v @ weights["q"][:, n]), i, self.config.rope_theta)
      key_SH = np.stack([store[j][0][n // group] for j in visible])
      value_SH = np.stack([store[j][1][n // group] for j in visible])
      weight_S = _softmax(key_SH @ query_H / math.sqrt(self.config.head_dim))
      out_D += weight_S @ value_SH @ weights["o"][n]
    return out_D

  def router_logits(self, name, r, v):
    weights, arch = self.params[name], self.config.router.arch
    if arch == "random":
      raise ValueError("router.arch='random' has no logits to reproduce; use another arch")
    if arch != "linear":
      v = np.array([0.5 * a * (1 + math.erf(a / math.sqrt(2))) for a in v @ weights["hidden"][r]])
    return v @ weights["out"][r]


def _stack_rows(config):
  """Parameter set of every inner layer, grouped by step (paper Table 5)."""
  inner = config.num_layers - (2 if config.sharing.startswith("middle") else 0)
  depth = inner // config.num_recursions
  one = {
      "vanilla": lambda l: l,
      "cycle": lambda l: l % depth,
      "sequence": lambda l: l // config.num_recursions,
  }[config.sharing.removeprefix("middle_")]
  return [[one(r * depth + i) for i in range(depth)] for r in range(config.num_recursions)]


def _map(function, tree):
  if isinstance(tree, dict):
    return {name: _map(function, value) for name, value in tree.items()}
  return function(tree)


def _layer(stacked, index):
  return _map(lambda leaf: leaf[index], stacked)


def _layers(stacked):
  return [_layer(stacked, i) for i in range(len(stacked["ffw_norm"]))] if stacked else []


def _rms_norm(v, scale, eps):
  return v / np.sqrt(np.mean(v ** 2) + eps) * scale


def _swiglu(weights, v):
  gate = v @ weights["gate"]
  return (gate / (1 + np.exp(-gate)) * (v @ weights["up"])) @ weights["down"]


def _rotate(v_H, position, theta):
  """Rotary embedding of the pairs (h, h + H/2)."""
  half = len(v_H) // 2
  angle = position * theta ** (-np.arange(half) / half)
  a, b = v_H[:half], v_H[half:]
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin])


def _softmax(v):
  e = np.exp(v - v.max())
  return e / e.sum()


def _activate(name, logit):
  return {"sigmoid": 1 / (1 + math.exp(-logit)), "tanh": math.tanh(logit), "none": logit}[name]


def _cross_entropy(logit, target):
  """-log p(target) of a Bernoulli with the given logit."""
  return math.log1p(math.exp(-logit)) if target else math.log1p(math.exp(logit))


def _sum_of_means(rows):
  """Mean over the tokens of all rows, summed over steps."""
  steps = [[value for row in step for value in row] for step in zip(*rows)]
  return float(sum(np.mean(values) for values in steps if values))


def _balance(config, rows):
  """R * sum over depths of (fraction choosing it) * (mean probability)."""
  if config.router.balancing != "loss":
    return 0.0
  depths = np.concatenate([row.depths for row in rows])
  mean_R = np.mean([p_R for row in rows for p_R in row.probabilities], axis=0)
  fraction_R = np.array([np.mean(depths == d) for d in range(config.num_recursions)])
  return float(config.num_recursions * (fraction_R @ mean_R))
