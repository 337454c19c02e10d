"""Random parameters of a model, as NumPy arrays in its tree.

Drawn so that every layer, norm and router matters: an initialised model has
norms of one and routers near zero, which hide mistakes.
"""

import numpy as np

from mor import config as config_lib
from mor import parameters
from mor.model import schedule as schedule_lib
from mor.model.routers import table as router_table


def draw(config: config_lib.ModelConfig, seed: int = 1) -> dict:
  """The tree of `mor.model.transformer`, float32."""
  rng = np.random.default_rng(seed)
  d = config.d_model

  def normal(fan_in, *shape):
    return (rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32)

  def group(n):
    tree = {}
    for row in sorted(parameters.layer(config), key=lambda row: bool(row.ins)):  # norms first
      ins, outs = row.shape(config)
      parameters.put(tree, row.path, normal(np.prod(ins), n, *ins, *outs) if ins else 1 + normal(25, n, *outs))
    return tree

  schedule = schedule_lib.make(config)
  sizes = dict(prelude=schedule.prelude, stack=schedule.num_stack_rows, coda=schedule.coda)
  params = {name: group(n) for name, n in sizes.items() if n}
  params |= dict(embedding=normal(1, config.vocab_size, d), final_norm=1 + normal(25, d))
  steps = config.num_recursions
  for row in router_table.make(config).parameters:
    if row.collection == "params":
      ins, outs = row.shape(config)
      params.setdefault(row.group, {})[row.name] = normal(np.prod(ins), row.count, *ins, *outs)
  if not config.tie_embeddings:
    params["head"] = normal(1, config.vocab_size, d)
  for row in parameters.PROJECTIONS:
    if row.name in config.lora.ranks:
      (ins, outs), rank = row.matrix(config), config.lora.ranks[row.name]
      parameters.put(params, f"lora/{row.path}", dict(a=normal(ins, steps, schedule.depth, ins, rank),
                                                      b=normal(rank, steps, schedule.depth, rank, outs)))
  return params
