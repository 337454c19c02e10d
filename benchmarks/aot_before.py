"""Compiles one program of an engine of commit 4652a6b; a process of `aot_decode.py`, in a tree of that commit.

Its layout differs, so nothing of this package is imported but the description of chips.
"""

import argparse
import functools
import importlib.util
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

TICKS = 6  # a dispatch of R = 3
PAGE = 64


def make(args: argparse.Namespace):
  """Returns the function to compile and the shapes of its arguments, slots first donated."""
  from configs import paper  # pylint: disable=g-import-not-at-top
  from mor import config as config_lib  # pylint: disable=g-import-not-at-top
  from mor.inference import decoder as decoder_lib, slots as slots_lib, tick as tick_lib, weights as weights_lib  # pylint: disable=g-import-not-at-top,g-multiple-import
  from mor.model import transformer  # pylint: disable=g-import-not-at-top
  from mor.model.kv import storage  # pylint: disable=g-import-not-at-top
  given = paper.get_config(args.model)
  given.data.seq_len = args.context
  model = config_lib.from_config_dict(given).model
  variables = jax.eval_shape(transformer.Transformer(model).init, jax.random.key(0),
                             jax.ShapeDtypeStruct((1, 1), "int32"))
  pages = -(-args.context // PAGE)
  decoder = decoder_lib.Decoder(model, storage.Paged(PAGE, model.num_kv_heads, model.head_dim, "bfloat16"))
  structures = []

  def leaves(variables):
    weights = weights_lib.prepare(model, variables, "bfloat16")
    slots = slots_lib.make(decoder, weights, args.slots, args.slots * pages * decoder.tables.num_rows,
                           args.slots * pages, pages)
    structures.extend(jax.tree.structure(tree) for tree in (weights, slots))
    return jax.tree.leaves(weights), jax.tree.leaves(slots)

  def tick(weights, slots):
    trees = (jax.tree.unflatten(*one) for one in zip(structures, (weights, slots), strict=True))
    return tick_lib.run(decoder, *trees, num_ticks=TICKS, vocab_size=model.vocab_size, together=False)

  def store(weights, slots, slot, tokens, start, length):
    trees = (jax.tree.unflatten(*one) for one in zip(structures, (weights, slots), strict=True))
    return tick_lib.store(decoder, *trees, slot, tokens, start, length, context=False)

  shapes = jax.eval_shape(leaves, variables)
  if args.program == "tick":
    return tick, shapes
  number = jax.ShapeDtypeStruct((), jnp.int32)
  return store, (*shapes, number, jax.ShapeDtypeStruct((1, 64), jnp.int32), number, number)


def main() -> None:
  """Writes the program's text and memory beside each other, or why it does not compile."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--chips", help="path of mor/aot/chips.py")
  parser.add_argument("--topology")
  parser.add_argument("--model")
  parser.add_argument("--program", choices=("tick", "prefill"))
  parser.add_argument("--slots", type=int)
  parser.add_argument("--context", type=int)
  parser.add_argument("--out", help="path of the text and of the record, without a suffix")
  args = parser.parse_args()
  sys.path.insert(0, ".")
  spec = importlib.util.spec_from_file_location("chips", args.chips)
  chips = importlib.util.module_from_spec(spec)
  sys.modules["chips"] = chips
  spec.loader.exec_module(chips)
  device = chips.devices(args.topology)[0]
  setattr(jax, "default_backend", functools.partial(getattr, device, "platform"))  # that commit asks it for its tiles
  function, shapes = make(args)
  mesh = jax.sharding.Mesh(np.array([device]), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
  one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
  begun = time.perf_counter()
  try:
    with jax.set_mesh(mesh):
      compiled = jax.jit(function, donate_argnums=1).lower(*shapes).compile()
  except jax.errors.JaxRuntimeError as error:
    record = {"error": str(error)}
  else:
    pathlib.Path(f"{args.out}.hlo").write_text(compiled.as_text(), encoding="utf-8")
    memory = compiled.memory_analysis()
    record = {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
  record["seconds"] = time.perf_counter() - begun
  pathlib.Path(f"{args.out}.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
  main()
