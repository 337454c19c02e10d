"""An adaptive-depth language model for transformers: this file and cache_mor.py, torch only.

  model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

A Llama decoder whose middle is a stack of shared layers that runs up to R times
for a token. Before each step a router decides for each token, from its hidden state
alone, whether the step keeps it. Kept tokens are gathered, run and scattered back, so
a token that left costs no more compute:

  x = state[kept];  y = stack(x);  state[kept] = merge(x, y, gate)

With `execution="masked"`, and under torch.compile and torch.export, every token is run
instead, and kept results are picked (cache_mor.py).

Every step may add low-rank deltas of its own, y = W x + b(a(x)). Routing is causal, as
in inference, so the loss is the language modeling loss alone.

Arrays are named by their axes: B batch rows, T columns of the input, S columns with
the past, M tokens that run (flat), D model width, F inner width, N query heads, K key
heads, H head width.

Source: arXiv 2507.10524 (MoR), arXiv 2410.20672 (low-rank deltas), transformers models/llama.
"""

import dataclasses

import torch
from torch import nn
import torch.nn.functional as F
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .cache_mor import EXECUTIONS, MorCache

WIDTHS = {"linear": 0, "mlp": 2, "wide_mlp": 4}  # hidden width of a router / model width
ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda x: x, "softmax": lambda x: x.softmax(-1)}


class MorConfig(PreTrainedConfig):
  """Sizes, named as those of Llama, and the fields of recursion; `num_hidden_layers` counts unrolled layers.

  Attributes:
    sharing: vanilla, cycle, sequence, or middle_*, whose first and last layers are unshared.
    num_recursions: number R of steps.
    kv_plan: recursion_wise (a step sees the keys of its own tokens), shared (the keys
      of the first step) or hybrid (the keys of the first step, overlaid by its own).
    lora: rank of the delta of each projection, by name, e.g. {"q_proj": 8}.
    qk_norm: True norms each head of queries and keys before it rotates, as Qwen3 does.
    rotary_scaling: the four fields of transformers' rope_type "llama3", or None.
    router: name (fixed, expert_choice, token_choice), arch, activation, alpha,
      temperature, capacity, gating, sampling and balancing; the others serve training.
    execution: "gathered", or "masked", which runs every token; see cache_mor.py.
  """

  model_type = "mor"
  keys_to_ignore_at_inference = ["past_key_values", "depths"]
  # Defaults of fields that config.json leaves out.
  vocab_size, hidden_size, intermediate_size, num_hidden_layers = 32000, 512, 1536, 8
  num_attention_heads, num_key_value_heads, head_dim, max_position_embeddings = 8, 8, 64, 2048
  rope_theta, rms_norm_eps, initializer_range, use_cache, tie_word_embeddings = 10000.0, 1e-5, 0.02, True, True
  sharing, num_recursions, kv_plan, lora, router = "vanilla", 1, "recursion_wise", {}, {"name": "fixed"}
  rotary_scaling, qk_norm, execution = None, False, "gathered"

  def edge(self):
    """Returns the number of unshared layers at each end."""
    return 1 if self.sharing.startswith("middle_") else 0

  def steps(self):
    """Returns the layers of each step: stack index, slot (see `MorCache`) to write, and slot to read besides."""
    edge, inner = self.edge(), self.num_hidden_layers - 2 * self.edge()
    depth = inner // self.num_recursions
    rows = [i // self.num_recursions if self.sharing.endswith("sequence") else i % depth for i in range(inner)]
    first = [rows.index(row) for row in rows]
    own = [None if self.kv_plan == "shared" and f != i else edge + i for i, f in enumerate(first)]
    base = [None if self.kv_plan == "recursion_wise" or f == i else edge + f for i, f in enumerate(first)]
    layers = list(zip(rows, own, base))
    return [layers[r * depth:(r + 1) * depth] for r in range(self.num_recursions)]

  def widths(self):
    """Returns the numbers of inputs and outputs of the projections of a layer."""
    d, f = self.hidden_size, self.intermediate_size
    q, k = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
    return {"self_attn": {"q_proj": (d, q), "k_proj": (d, k), "v_proj": (d, k), "o_proj": (q, d)},
            "mlp": {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}}


@dataclasses.dataclass
class MorModelOutput(ModelOutput):
  """Result of `MorModel`.

  Attributes:
    last_hidden_state: normed, [B, T, D].
    depths: number of steps of each token, 0 on padding, [B, T].
    hidden_states: on request, the embedded tokens, the state behind the first unshared
      layer if there is one, behind each step, and last the normed state.
  """

  last_hidden_state: torch.Tensor | None = None
  past_key_values: Cache | None = None
  depths: torch.Tensor | None = None
  hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclasses.dataclass
class MorOutput(ModelOutput):
  """Result of `MorForCausalLM`; see `MorModelOutput`."""

  loss: torch.Tensor | None = None
  logits: torch.Tensor | None = None
  past_key_values: Cache | None = None
  depths: torch.Tensor | None = None
  hidden_states: tuple[torch.Tensor, ...] | None = None


def frequencies(config, device):
  """Returns rotary frequencies [H / 2]; the scaling of Llama 3 keeps high ones and divides low ones."""
  half, scaling = config.head_dim // 2, config.rotary_scaling
  frequency_H = config.rope_theta ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
  if scaling:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns_H = scaling["original_max_position_embeddings"] * frequency_H / (2 * torch.pi)
    kept_H = ((turns_H - low) / (high - low)).clamp(0, 1)
    frequency_H = frequency_H * (kept_H + (1 - kept_H) / scaling["factor"])
  return frequency_H


def rotate(x_MNH, rotation_M1H):
  """Applies rotary embedding in the half-split layout, in float32."""
  (cos, sin), (low, high) = rotation_M1H, x_MNH.float().chunk(2, -1)
  return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x_MNH.dtype)


def linear(num_in, num_out):
  """Makes a projection without bias."""
  return nn.Linear(num_in, num_out, bias=False)


class MorDeltas(nn.Module):
  """Deltas b(a(x)) that one step adds to the projections of one layer, if they have a rank.

  No module here is called as a projection is, because PEFT adapts modules by name.
  """

  def __init__(self, config):
    super().__init__()
    for part, widths in config.widths().items():
      ranks = {name: config.lora[name] for name in widths if config.lora.get(name)}
      self.add_module(part, nn.ModuleDict({
          **{f"{name}_a": linear(widths[name][0], rank) for name, rank in ranks.items()},
          **{f"{name}_b": linear(rank, widths[name][1]) for name, rank in ranks.items()}}))


class MorLayer(GradientCheckpointingLayer):
  """A layer: x + attention(norm(x)), then x + swiglu(norm(x)); many unrolled layers may share it."""

  def __init__(self, config):
    super().__init__()
    self.head_dim = config.head_dim
    self.input_layernorm, self.post_attention_layernorm = (
        nn.RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2))
    for part, widths in config.widths().items():
      self.add_module(part, nn.ModuleDict({name: linear(*width) for name, width in widths.items()}))
    if config.qk_norm:
      self.self_attn.update({name: nn.RMSNorm(config.head_dim, config.rms_norm_eps) for name in ("q_norm", "k_norm")})

  def forward(self, x_MD, view, own, base=None, deltas=None):
    def project(part, name, x):
      y, delta = getattr(self, part)[name](x), getattr(deltas, part, {})
      return y + delta[f"{name}_b"](delta[f"{name}_a"](x)) if f"{name}_a" in delta else y

    def heads(name):
      x_MNH = project("self_attn", f"{name}_proj", normed_MD).unflatten(-1, (-1, self.head_dim))
      if f"{name}_norm" in self.self_attn:
        x_MNH = self.self_attn[f"{name}_norm"](x_MNH)
      return x_MNH if name == "v" else rotate(x_MNH, view.rotation_M1H)

    normed_MD = self.input_layernorm(x_MD)
    if own is not None:
      view.write(own, heads("k"), heads("v"))
    out_MNH = view.attend(heads("q"), own, base)
    x_MD = x_MD + project("self_attn", "o_proj", out_MNH.flatten(1))
    normed_MD = self.post_attention_layernorm(x_MD)
    act_MF = F.silu(project("mlp", "gate_proj", normed_MD)) * project("mlp", "up_proj", normed_MD)
    return x_MD + project("mlp", "down_proj", act_MF)


class MorScore(nn.Module):
  """Score network of a router, in float32 for a model of any type."""

  def __init__(self, config, num_outputs):
    super().__init__()
    width = WIDTHS[config.router["arch"]] * config.hidden_size
    self.hidden = linear(config.hidden_size, width) if width else None
    self.out = linear(width or config.hidden_size, num_outputs)

  def forward(self, h_BTD):
    with torch.autocast(h_BTD.device.type, enabled=False):
      x = h_BTD.float()
      x = x if self.hidden is None else F.gelu(F.linear(x, self.hidden.weight.float()))
      return F.linear(x, self.out.weight.float())


class MorPreTrainedModel(PreTrainedModel):
  """What models of a `MorConfig` have in common."""

  config_class, base_model_prefix, _supports_sdpa = MorConfig, "model", True
  supports_gradient_checkpointing = True
  _no_split_modules = ["MorModel"]
  _keep_in_fp32_modules_strict = ["router", "balance_bias"]  # aux_router too

  def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **options):
    if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True):
      raise ValueError("use_reentrant=True loses gradients of keys that later steps read; give "
                       "gradient_checkpointing_kwargs={'use_reentrant': False}")
    super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)


class MorModel(MorPreTrainedModel):
  """The layers and routers, without a head. Columns where `attention_mask` is 0 never run and are never seen."""

  def __init__(self, config):
    super().__init__(config)
    router, steps = config.router, config.steps()

    def repeat(num, kind, *given):
      return nn.ModuleList(kind(config, *given) for _ in range(num))

    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    self.prelude, self.coda = repeat(config.edge(), MorLayer), repeat(config.edge(), MorLayer)
    self.stack = repeat(1 + max(row for step in steps for row, _, _ in step), MorLayer)
    self.lora = nn.ModuleList(nn.ModuleList(MorDeltas(config) for _ in step) for step in steps)
    num, outs = {"fixed": (0, 0), "expert_choice": (len(steps), 1), "token_choice": (1, len(steps))}[router["name"]]
    self.router = repeat(num, MorScore, outs)
    self.aux_router = repeat(num, MorScore, outs) if router.get("sampling") == "aux_router" else None
    if router.get("balancing") == "loss_free":
      self.register_buffer("balance_bias", torch.zeros(len(steps)))
    self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
    self.gradient_checkpointing = False
    self.post_init()

  @can_return_tuple
  def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
              use_cache=None, output_hidden_states=None, output_attentions=None, **unused):
    """Runs the model, with the arguments of any decoder of transformers; returns a `MorModelOutput`."""
    use_cache = self._check(input_ids, inputs_embeds, past_key_values, use_cache, output_attentions)
    h_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    cache = MorCache(self.config) if past_key_values is None else past_key_values
    start, (batch, width) = cache.get_seq_length(), h_BTD.shape[:2]
    if attention_mask is None:
      attention_mask = torch.ones(batch, width, dtype=torch.bool, device=h_BTD.device)
      attention_mask = attention_mask if start == 0 else torch.cat([cache.valid_BS, attention_mask], 1)
    if attention_mask.shape != (batch, start + width):
      raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; give [rows, past + new columns], "
                       f"here {(batch, start + width)}")
    cache.valid_BS = attention_mask.bool()
    if position_ids is None:
      position_ids = (cache.valid_BS.cumsum(1) - 1)[:, start:]
    angle_BTH = position_ids.expand(batch, -1)[..., None] * frequencies(self.config, h_BTD.device)
    states, depth_BT = self._run(h_BTD, start, (angle_BTH.cos(), angle_BTH.sin()), cache)
    wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
    return MorModelOutput(last_hidden_state=states[-1], past_key_values=cache if use_cache else None, depths=depth_BT,
                          hidden_states=tuple(states) if wanted else None)

  def _check(self, input_ids, inputs_embeds, past_key_values, use_cache, output_attentions):
    """Raises ValueError for what `forward` cannot do; returns whether it returns its cache."""
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError("give input_ids or inputs_embeds, one of them")
    if self.config.execution not in EXECUTIONS:
      raise ValueError(f"config.execution={self.config.execution!r}; use one of {', '.join(EXECUTIONS)}")
    if self.config.output_attentions if output_attentions is None else output_attentions:
      raise ValueError("output_attentions=True: attention weights are never formed; read `depths` of the output")
    if not isinstance(past_key_values, (MorCache, type(None))):
      raise ValueError(f"past_key_values is a {type(past_key_values).__name__}; give a MorCache, or None to make one")
    again = self.training and self.gradient_checkpointing
    if again and past_key_values is not None:
      raise ValueError("gradient checkpointing runs whole texts; give no past_key_values, or call model.eval()")
    if use_cache and torch.compiler.is_exporting():
      raise ValueError("use_cache=True: torch.export cannot return a MorCache; give use_cache=False")
    if use_cache is None:
      use_cache = self.config.use_cache and not torch.compiler.is_exporting()
    return use_cache and not again

  def _run(self, h_BTD, start, rotation_BTH, cache):
    """Returns the states that `MorModelOutput` lists, and the depths [B, T]."""
    compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
    execution = "masked" if compiling else self.config.execution
    valid_BT = cache.valid_BS[:, start:]

    def run(state_BTD, run_BT, calls, keep_BT=None, merge=None):
      """Runs layers on the tokens of `run_BT`; with `merge`, only tokens of `keep_BT` change."""
      if execution == "gathered" and not run_BT.any():
        return state_BTD
      view = EXECUTIONS[execution](run_BT, start, cache.valid_BS, rotation_BTH)
      x_MD = y_MD = view.take(state_BTD)
      for layer, *places in calls:
        y_MD = layer(y_MD, view, *places)
      if merge is not None:
        y_MD = torch.where(view.take(keep_BT)[:, None], merge(x_MD, y_MD, view.take), x_MD)
      return view.put(state_BTD, y_MD)

    def slot(index):
      return None if index is None else cache.slots[index]

    states = [h_BTD]
    if self.prelude:
      states.append(run(h_BTD, valid_BT, zip(self.prelude, cache.slots)))
    entry_BTD = states[-1]
    alive_BT, depth_BT = valid_BT, torch.zeros_like(valid_BT, dtype=torch.long)
    chosen = self._choose(entry_BTD) if self.config.router["name"] == "token_choice" else None
    for step, layers in enumerate(self.config.steps()):
      calls = [(self.stack[row], slot(own), slot(base), lora)
               for (row, own, base), lora in zip(layers, self.lora[step])]
      alive_BT, merge = self._route(step, states[-1], alive_BT, entry_BTD, chosen)
      everyone = step == 0 and self.config.kv_plan != "recursion_wise"  # later steps read all keys of the first
      states.append(run(states[-1], valid_BT if everyone else alive_BT, calls, alive_BT, merge))
      depth_BT = depth_BT + alive_BT
    if self.coda:
      last_BTD = run(states[-1], valid_BT, zip(self.coda, cache.slots[len(cache.slots) - len(self.coda):]))
      return [*states, self.norm(last_BTD)], depth_BT
    return [*states[:-1], self.norm(states[-1])], depth_BT

  def _choose(self, h_BTD):
    """Returns, for token-choice, the last step of every token and its gate."""
    router = self.config.router
    prob_BTR = router["alpha"] * ACTIVATIONS[router["activation"]](self.router[0](h_BTD / router["temperature"]))
    biased_BTR = prob_BTR + self.balance_bias if router["balancing"] == "loss_free" else prob_BTR
    last_BT = biased_BTR.argmax(-1)
    return last_BT, prob_BTR.gather(-1, last_BT[..., None])[..., 0]

  def _route(self, step, state_BTD, alive_BT, entry_BTD, chosen):
    """Returns the tokens that the step keeps, and a function that merges the output y into the state x of a token."""
    router, num_steps = self.config.router, self.config.num_recursions

    def times(gate_BT, x_MD, take):
      return take(gate_BT)[:, None].to(x_MD.dtype) * x_MD

    if router["name"] == "fixed":
      return alive_BT, lambda x, y, take: y
    additive, residual = (router["gating"] == name for name in ("additive", "residual"))
    if router["name"] == "expert_choice":
      logit_BT = self.router[step](state_BTD / router["temperature"])[..., 0]
      predictor_BT = self.aux_router[step](state_BTD)[..., 0] if self.aux_router else logit_BT
      gate_BT = router["alpha"] * ACTIVATIONS[router["activation"]](logit_BT)
      capacity = router["capacity"][step] if router["capacity"] else (num_steps - step) / num_steps
      keep_BT = alive_BT & ((predictor_BT >= 0) | (capacity == 1.0))  # a step of full capacity keeps all live tokens

      def merge(x_MD, y_MD, take):
        change_MD = y_MD - x_MD if residual else y_MD
        return x_MD + (change_MD if additive else times(gate_BT, change_MD, take))

      return keep_BT, merge
    last_BT, gate_BT = chosen
    exit_BT, one_BT = last_BT == step, torch.ones_like(gate_BT)
    gated_BT = torch.ones_like(exit_BT) if router["gating"] == "every_step" else exit_BT & (not additive)
    factor_BT = torch.where(gated_BT, gate_BT, one_BT)
    entry_BT = exit_BT * (one_BT - gate_BT if residual else one_BT)  # factor of the state before the first step
    return alive_BT & (last_BT >= step), (
        lambda x, y, take: times(factor_BT, y, take) + times(entry_BT, take(entry_BTD), take))


class MorForCausalLM(MorPreTrainedModel, GenerationMixin):
  """The model with its head."""

  _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

  def __init__(self, config):
    super().__init__(config)
    self.model = MorModel(config)
    self.lm_head = linear(config.hidden_size, config.vocab_size)
    self.post_init()

  @can_return_tuple
  def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
              labels=None, use_cache=None, logits_to_keep=0, output_hidden_states=None, output_attentions=None,
              **kwargs):
    """Runs the model, with the arguments of any causal model of transformers; returns a `MorOutput`."""
    out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                     output_hidden_states, output_attentions, return_dict=True)
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = self.lm_head(out.last_hidden_state[:, keep]).float()
    loss = None
    if labels is not None:
      loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
    return MorOutput(loss=loss, logits=logits, past_key_values=out.past_key_values, depths=out.depths,
                     hidden_states=out.hidden_states)

  def _prepare_cache_for_generation(self, generation_config, model_kwargs, *unused):
    if generation_config.cache_implementation not in (None, "dynamic"):
      raise ValueError(f"cache_implementation={generation_config.cache_implementation!r}; give None, for a MorCache")
    if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
      model_kwargs["past_key_values"] = MorCache(self.config)
