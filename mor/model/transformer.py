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
  """One forward pass.

  Attributes:
    hidden_BTD: hidden states after the final norm, compute dtype.
    keep_RBT: True where recursion step r processed the token.
    score_RBT: raw router logits, float32.
    sums: auxiliary losses and statistics, summed over tokens; per step where
      they are of a step. `train/loss.py` normalises them.
    exits: hidden states after the layers that were asked for, after the final norm.
  """

  hidden_BTD: types.Activations
  keep_RBT: jax.Array
  score_RBT: jax.Array
  sums: Mapping[str, jax.Array]
  exits: tuple[types.Activations, ...] = ()


class Transformer(nn.Module):
  """A decoder whose middle runs a shared stack of layers up to R times a token."""

  config: config_lib.ModelConfig

  @nn.compact
  def __call__(self, tokens_BT: types.Tokens, segment_BT: types.Segments | None = None, *, routing: str = "select",
               train_step: jax.Array | None = None, bucket: int | None = None,
               key: jax.Array | None = None, exits: tuple[int, ...] = (), drop: float = 0.0) -> Output:
    """Runs the whole sequence.

    Args:
      tokens_BT: token ids.
      segment_BT: document of each token, 1, 2, …; 0 is padding, which follows a
        row's last token where documents see each other. None: one document a row.
      routing: "select" is training's (expert-choice sees the whole sequence),
        "decide" is causal.
      train_step: current step, for warm-ups; None once trained.
      bucket: static part of a warm-up that `train_step` is in, see
        `routers/base.py`.
      key: for random routers and dropped layers.
      exits: unrolled layers after which the states are wanted, ascending: a plain
        model's any, a recursive one's ends of steps but the last.
      drop: probability that a row skips the last layer; the earlier, the less.
    """
    config = self.config
    tokens_BT = jnp.asarray(tokens_BT)
    drop_UB = _dropped(config.num_layers, tokens_BT.shape[0], drop, key) if drop else None
    segment_BT = jnp.ones_like(tokens_BT) if segment_BT is None else jnp.asarray(segment_BT)
    h_BTD, segment_BT, params, recursion = self._enter(tokens_BT, segment_BT, drop_UB)
    with jax.named_scope("recursion"):
      h_BTD, trace = recursion.run(
          params, h_BTD, segment_BT, routing=routing, balance=self._balance(), train_step=train_step, bucket=bucket, key=key,
          exits=exits, drop_UB=drop_UB)
    h_BTD = self._edge("coda", h_BTD, segment_BT, drop_UB)
    final_norm_D = self.param("final_norm", nn.initializers.ones_init(), (config.d_model,), jnp.float32)
    if not config.tie_embeddings:
      self.param("head", nn.initializers.normal(config.init_std), (config.vocab_size, config.d_model), jnp.float32)
    norm = lambda h_BTD: layers.rms_norm(h_BTD, final_norm_D, config.norm_eps)
    return Output(norm(h_BTD), trace.keep_RBT, trace.score_RBT, trace.sums, tuple(norm(h) for h in trace.exits))

  @nn.compact
  def entry_sums(self, tokens_BT: types.Tokens, segment_BT: types.Segments, *,
                 train_step: jax.Array | None = None) -> Mapping[str, jax.Array]:
    """Returns the sums of the router's plan alone, which are known before the recursion runs."""
    h_BTD, segment_BT, params, recursion = self._enter(tokens_BT, segment_BT)
    return recursion.router.enter(params, h_BTD, segment_BT != 0, balance=self._balance(), train_step=train_step).sums

  def _balance(self) -> dict[str, jax.Array]:
    """Returns the state of the router that no gradient reaches."""
    rows = [row for row in router_table.make(self.config).parameters if row.collection == "balance"]
    return {row.path: self.variable("balance", row.path, jnp.zeros, row.shape(self.config)[1], jnp.float32).value
            for row in rows}

  def _enter(self, tokens_BT, segment_BT, drop_UB=None):
    """Embedding and prelude, and the segments that attention keeps apart.

    Also declares the recursion's parameters.
    """
    config = self.config
    if config.cross_documents:  # all but padding is one
      segment_BT = (segment_BT != 0).astype(segment_BT.dtype)
    init = nn.initializers.normal(config.init_std)
    embedding_VD = self.param("embedding", init, (config.vocab_size, config.d_model), jnp.float32)
    with jax.named_scope("embed"):
      h_BTD = embedding_VD.astype(jnp.dtype(config.compute_dtype))[tokens_BT]
    h_BTD = self._edge("prelude", h_BTD, segment_BT, drop_UB)
    recursion = recursion_lib.Recursion(config)
    params = {"stack": self._layers("stack", recursion.schedule.num_stack_rows)}
    for name in jax.eval_shape(recursion.router.init, jax.random.key(0)):
      params[name] = self.param(name, lambda key, name=name: recursion.router.init(key)[name])
    if config.lora.ranks:
      params["lora"] = self.param("lora", lambda key: lora_lib.init(key, config))
    return h_BTD, segment_BT, params, recursion

  def _edge(self, group: str, h_BTD, segment_BT, drop_UB=None):
    """The unshared layers of `group`, over every token."""
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
          self.config, self._layers(group, num_layers), h_BTD, view, drop_LB=drop_LB)[0]

  def _layers(self, group: str, num_layers: int) -> dict:
    """Parameters of `num_layers` blocks, stacked."""
    def init(key):
      block = block_lib.Block(self.config)
      return jax.vmap(lambda k: block.init(k)["params"])(jax.random.split(key, num_layers))
    if self.has_variable("params", group):  # not `param`, which refuses a device's part of them
      return self.get_variable("params", group)
    return self.param(group, init)


def _dropped(num_layers: int, batch: int, most: float, key: jax.Array) -> jax.Array:
  """Rows `[U, B]` that each unrolled layer leaves alone: none the first, a share of `most` the last.

  Source: LayerSkip, arXiv:2404.16710, equation 1 (exponential in depth, by row, unscaled).
  """
  depth_U = jnp.arange(num_layers) / max(num_layers - 1, 1)
  chance_U = most * (jnp.exp(depth_U * jnp.log(2.0)) - 1.0)
  row_B = sharding.first_row(batch) + jnp.arange(batch)
  draw = lambda row: jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, 1), row), chance_U)
  return jax.vmap(draw, out_axes=1)(row_B)


def whole(config: config_lib.ModelConfig, params: dict) -> dict:
  """Inside `sharding.by_rows`, gathers what a step needs more than once.

  That is the stack of a recursive model, for all its recursions, and what is no layer.
  Layers that run once are gathered as they run (`stacked.py`). Elsewhere: `params`.
  """
  layers_once = {"prelude", "coda"} | ({"stack"} if config.num_recursions == 1 else set())
  rows = router_table.make(config).parameters
  return {name: group if name in layers_once else sharding.gather_parameters(group, config.compute_dtype, name, rows)
          for name, group in params.items()}


def head(params: Mapping[str, Any]) -> types.Embedding:
  """The output matrix `[V, D]`: its own, or the embedding."""
  return params["head"] if "head" in params else params["embedding"]


def unembed(params: dict, hidden_BTD: types.Activations) -> jax.Array:
  """Logits `[B, T, V]` in float32. At scale use `train/loss.py`, which blocks them."""
  head_VD = head(params).astype(hidden_BTD.dtype)
  return jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD, preferred_element_type=jnp.float32)
