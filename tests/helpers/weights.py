"""Random parameters of a model, as NumPy arrays in its tree.

Drawn so that every layer, norm and router matters: an initialised model has
norms of one and routers near zero, which hide mistakes.
"""

import numpy as np

from mor import config as config_lib
from mor.model import schedule as schedule_lib


def draw(config: config_lib.ModelConfig, seed: int = 1) -> dict:
  """The tree of `mor.model.transformer`, float32."""
  rng = np.random.default_rng(seed)
  d, f, h = config.d_model, config.d_ff, config.head_dim
  heads, kv_heads = config.num_heads, config.num_kv_heads

  def normal(fan_in, *shape):
    return (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)

  def group(n):
    return dict(
        attention_norm=1 + normal(25, n, d), ffw_norm=1 + normal(25, n, d),
        attention=dict(q=normal(d, n, d, heads, h), k=normal(d, n, d, kv_heads, h),
                       v=normal(d, n, d, kv_heads, h), o=normal(heads * h, n, heads, h, d)),
        ffw=dict(gate=normal(d, n, d, f), up=normal(d, n, d, f), down=normal(f, n, f, d)))

  schedule = schedule_lib.make(config)
  sizes = dict(prelude=schedule.prelude, stack=schedule.num_stack_rows, coda=schedule.coda)
  params = {name: group(n) for name, n in sizes.items() if n}
  params |= dict(embedding=normal(1, config.vocab_size, d), final_norm=1 + normal(25, d))
  routers = [] if config.router.name == "fixed" else ["router"]
  routers += ["aux_router"] if config.router.sampling == "aux_router" else []
  expert, steps = config.router.name == "expert_choice", config.num_recursions
  num, outs = (steps, 1) if expert else (1, steps)
  for name in routers:
    width = {"linear": 1, "mlp": 2, "wide_mlp": 4}.get(config.router.arch, 1) * d
    params[name] = dict(out=normal(width, num, width, outs))
    if width > d:
      params[name]["hidden"] = normal(d, num, d, width)
  if not config.tie_embeddings:
    params["head"] = normal(1, config.vocab_size, d)
  wide = dict(q=(d, heads * h), k=(d, kv_heads * h), v=(d, kv_heads * h), o=(heads * h, d), gate=(d, f), up=(d, f),
              down=(f, d))
  for name, rank in config.lora.ranks.items():
    ins, outs = wide[name]
    part = params.setdefault("lora", {}).setdefault("attention" if name in "qkvo" else "ffw", {})
    part[name] = dict(a=normal(ins, steps, schedule.depth, ins, rank),
                      b=normal(rank, steps, schedule.depth, rank, outs))
  return params
