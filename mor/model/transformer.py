"""The model: embed, prelude, recursion, coda, norm, head.

Parameters (float32; n layers stacked on the leading axis, V vocabulary, …):

  embedding [V, D]                final_norm [D]
  prelude | stack | coda          `block.Block`'s, each [n, …]
  router, aux_router              `routers/scores.py`, stacked over steps
  lora                            `lora.py`, stacked over steps and their layers
  head [V, D]                     absent where the head is the embedding

Source: Llama block; MoR paper §2 and Table 5.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor import sharding
from mor import types
from mor.model import block as block_lib
from mor.model import kernels
from mor.model import layers
from mor.model import lora as lora_lib
from mor.model import recursion as recursion_lib
from mor.model import schedule as schedule_lib
from mor.model import stacked
from mor.model.kv import view as kv_view
from mor.model.routers import table as router_table


@struct.dataclass
class Output:
  """Result of a forward pass.

  Attributes:
    hidden_BTD: hidden states after the final norm, compute dtype.
    keep_RBT: True where recursion step r processed the token.
    score_RBT: raw router logits, float32.
    sums: auxiliary losses and statistics, summed over tokens; statistics of a step
      have an axis of steps. `train/loss.py` normalises them.
    exits: hidden states after the layers of the argument `exits`, after the final norm.
    entry_BTD: hidden states that enter the recursion, not normed.
  """

  hidden_BTD: types.Activations
  keep_RBT: jax.Array
  score_RBT: jax.Array
  sums: Mapping[str, jax.Array]
  exits: tuple[types.Activations, ...] = ()
  entry_BTD: types.Activations | None = None


class Transformer(nn.Module):
  """A decoder whose middle runs a shared stack of layers up to R times a token."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, tokens_BT: types.Tokens, segment_BT: types.Segments | None = None, *, routing: str = "select",
               train_step: jax.Array | None = None, bucket: int | None = None,
               key: jax.Array | None = None, exits: tuple[int, ...] = (), drop: float = 0.0) -> Output:
    """Runs the model over whole sequences.

    Args:
      tokens_BT: token ids.
      segment_BT: document of each token, 1, 2, …; 0 is padding, which must follow
        the last token of a batch row if documents see each other. None means one
        document in each batch row.
      routing: "select" is the routing of training (expert-choice sees the whole
        sequence), "decide" is causal.
      train_step: optimizer step, for warm-ups; None once trained.
      bucket: static part of the warm-up at `train_step`, see `routers/base.py`.
      key: random key for random routers and dropped layers.
      exits: numbers of unrolled layers after which to return the hidden states,
        ascending. A plain model takes any, a recursive one the end of any step but
        the last.
      drop: probability that a batch row skips the last layer; smaller at earlier
        layers.
    """
    config = self.config
    tokens_BT = jnp.asarray(tokens_BT)
    drop_UB = _draw_dropped(config.num_layers, tokens_BT.shape[0], drop, key) if drop else None
    segment_BT = jnp.ones_like(tokens_BT) if segment_BT is None else jnp.asarray(segment_BT)
    h_BTD, segment_BT, params, recursion = self._enter(tokens_BT, segment_BT, drop_UB)
    entry_BTD = h_BTD
    with jax.named_scope("recursion"):
      h_BTD, trace = recursion.run(
          params, h_BTD, segment_BT, routing=routing, balance=self._balance(), train_step=train_step, bucket=bucket, key=key,
          exits=exits, drop_UB=drop_UB)
    h_BTD = self._run_edge("coda", h_BTD, segment_BT, drop_UB)
    final_norm_D = self.param("final_norm", nn.initializers.ones_init(), (config.d_model,), jnp.float32)
    if not config.tie_embeddings:
      self.param("head", nn.initializers.normal(config.init_std), (config.vocab_size, config.d_model), jnp.float32)

    def norm(h_BTD):
      return layers.rms_norm(h_BTD, final_norm_D, config.norm_eps)

    return Output(norm(h_BTD), trace.keep_RBT, trace.score_RBT, trace.sums, tuple(norm(h) for h in trace.exits),
                  entry_BTD)

  @nn.compact
  def entry_sums(self, tokens_BT: types.Tokens, segment_BT: types.Segments, *,
                 train_step: jax.Array | None = None) -> Mapping[str, jax.Array]:
    """Returns the sums that the router knows before the recursion runs."""
    h_BTD, segment_BT, params, recursion = self._enter(tokens_BT, segment_BT)
    return recursion.router.enter(params, h_BTD, segment_BT != 0, balance=self._balance(), train_step=train_step).sums

  def _balance(self) -> dict[str, jax.Array]:
    """Returns the state of the router that no gradient reaches."""
    rows = [row for row in router_table.make(self.config).parameters if row.collection == "balance"]
    return {row.path: self.variable("balance", row.path, jnp.zeros, row.shape(self.config)[1], jnp.float32).value
            for row in rows}

  def _enter(self, tokens_BT, segment_BT, drop_UB=None):
    """Runs embedding and prelude, and declares the parameters of the recursion.

    Returns:
      Hidden states, segments that attention keeps apart, parameters of the recursion, and the recursion.
    """
    config = self.config
    if config.cross_documents:  # all documents are one segment
      segment_BT = (segment_BT != 0).astype(segment_BT.dtype)
    init = nn.initializers.normal(config.init_std)
    embedding_VD = self.param("embedding", init, (config.vocab_size, config.d_model), jnp.float32)
    with jax.named_scope("embed"):
      h_BTD = embedding_VD.astype(jnp.dtype(config.compute_dtype))[tokens_BT]
    h_BTD = self._run_edge("prelude", h_BTD, segment_BT, drop_UB)
    recursion = recursion_lib.Recursion(config)
    params = {"stack": self._declare_layers("stack", recursion.schedule.num_stack_rows)}
    for name in jax.eval_shape(recursion.router.init, jax.random.key(0)):
      params[name] = self.param(name, lambda key, name=name: recursion.router.init(key)[name])
    if config.lora.ranks:
      params["lora"] = self.param("lora", lambda key: lora_lib.init(key, config))
    return h_BTD, segment_BT, params, recursion

  def _run_edge(self, group: str, h_BTD, segment_BT, drop_UB=None):
    """Runs the unshared layers of `group`, prelude or coda, over every token."""
    num_layers = getattr(schedule_lib.make(self.config), group)
    if not num_layers:
      return h_BTD
    batch, seq_len = segment_BT.shape
    position_BT = jnp.broadcast_to(jnp.arange(seq_len)[None, :], (batch, seq_len))
    view = kv_view.make_view(
        kernels.choose(self.config, in_order=True), layers.rotation(position_BT, self.config),
        position_BT, segment_BT, position_BT, segment_BT, causal=self.config.cross_documents)
    with jax.named_scope(group):
      drop_LB = jax.tree.map(lambda a: a[:num_layers] if group == "prelude" else a[-num_layers:], drop_UB)
      return stacked.run_layers(
          self.config, self._declare_layers(group, num_layers), h_BTD, view, drop_LB=drop_LB)[0]

  def _declare_layers(self, group: str, num_layers: int) -> dict:
    """Declares the parameters of `num_layers` blocks, and returns them stacked."""
    def init(key):
      block = block_lib.Block(self.config)
      return jax.vmap(lambda k: block.init(k)["params"])(jax.random.split(key, num_layers))
    if self.has_variable("params", group):  # `param` would refuse the part that a device holds
      return self.get_variable("params", group)
    return self.param(group, init)


def _draw_dropped(num_layers: int, batch: int, most: float, key: jax.Array) -> jax.Array:
  """Draws which batch rows `[U, B]` skip an unrolled layer: none the first, each with probability `most` the last.

  Source: LayerSkip, arXiv:2404.16710, equation 1 (exponential in depth, by batch row, unscaled).
  """
  depth_U = jnp.arange(num_layers) / max(num_layers - 1, 1)
  chance_U = most * (jnp.exp(depth_U * jnp.log(2.0)) - 1.0)
  row_B = sharding.first_row(batch) + jnp.arange(batch)

  def draw(row):
    return jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, 1), row), chance_U)

  return jax.vmap(draw, out_axes=1)(row_B)


def whole(config: config_lib.ModelConfig, params: dict) -> dict:
  """Gathers, inside `sharding.by_rows`, the parameters that a forward pass reads more than once.

  These are the stack of a recursive model and all parameters outside of layers.
  `stacked.py` gathers a layer that runs once when it runs. Outside of
  `sharding.by_rows` the result is `params`.
  """
  layers_once = {"prelude", "coda"} | ({"stack"} if config.num_recursions == 1 else set())
  rows = router_table.make(config).parameters
  return {name: group if name in layers_once else sharding.gather_parameters(group, config.compute_dtype, name, rows)
          for name, group in params.items()}


def head(params: Mapping[str, Any]) -> types.Embedding:
  """Returns the output matrix `[V, D]`, which is the embedding if the model has no head of its own."""
  return params["head"] if "head" in params else params["embedding"]


def unembed(params: dict, hidden_BTD: types.Activations) -> jax.Array:
  """Returns logits `[B, T, V]` in float32; `train/loss.py` computes them in blocks, to save memory."""
  head_VD = head(params).astype(hidden_BTD.dtype)
  return jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
