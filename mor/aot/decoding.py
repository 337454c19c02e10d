"""The engine's programs compiled for one chip that is not there, and what they do.

Weights, keys and values are bfloat16. A tick's program holds the ticks of a dispatch; its
figures are those of the loop's body (`a_tick`) and of the rest (`beside`). A prefill is
one call of `prefill.store`. Everything is lowered under a mesh of the chip, so that
`kernels.platform()` names its platform, whatever this machine is.

Estimates of a tick, at a position (tokens that every sequence has stored):

  cycles_seconds   TPU: the compiler's cycles / clock. It estimates no Pallas kernel: the
                   entries in use / bandwidth come on top
  bytes            HBM traffic of the operations; of kernels that read the pool, the
                   entries in use
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor.aot import chips
from mor.aot import executed
from mor.aot import hlo
from mor.aot import ideal as ideal_lib
from mor.decode import decoder as decoder_lib
from mor.decode import parts as parts_lib
from mor.decode import prefill as prefill_lib
from mor.decode import slots as slots_lib
from mor.decode import sampling
from mor.decode import storages
from mor.decode import tick as tick_lib
from mor.decode import variant as variant_lib
from mor.decode import weights as weights_lib
from mor.model import transformer

_FORMAT = "bfloat16"


@dataclasses.dataclass(frozen=True)
class DecodingSetup:
  """An engine's sizes, and the chip that it runs on.

  Attributes:
    config: its model, and the context where `context` is None.
    device: of `chips.devices`, or any other.
    num_slots: slots.
    context: positions at most.
    page_size: entries of a page.
    position: tokens that each sequence has stored, for estimates; None is half of the context.
    more: further devices, which share the model with the first one; figures are those of a device.
  """

  config: config_lib.Config
  device: Any
  num_slots: int = 16
  context: int | None = None
  page_size: int = 64
  position: int | None = None
  more: tuple[Any, ...] = ()

  @property
  def pages_per_row(self) -> int:
    return -(-(self.context or self.config.data.seq_len) // self.page_size)

  @property
  def stored(self) -> int:
    """Tokens of each sequence, for estimates."""
    return self.position or (self.context or self.config.data.seq_len) // 2

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    name = "tensor" if self.more else "device"
    return jax.sharding.Mesh(np.array([self.device, *self.more]), (name,), axis_types=(jax.sharding.AxisType.Auto,))

  @property
  def share(self) -> config_lib.ModelConfig:
    """What one device has of the model, the vocabulary as well."""
    num, model = 1 + len(self.more), self.config.model
    return dataclasses.replace(parts_lib.cut(model, num), vocab_size=model.vocab_size // num)

  @functools.cached_property
  def decoder(self) -> decoder_lib.Decoder:
    model = parts_lib.cut(self.config.model, 1 + len(self.more))
    with jax.set_mesh(self.mesh):
      storage = storages.make(None, model.num_kv_heads, model.head_dim, _FORMAT, self.page_size,
                              self.context or self.config.data.seq_len)
    return decoder_lib.Decoder(model, storage)

  @property
  def num_ticks(self) -> int:
    """Ticks of a dispatch."""
    with jax.set_mesh(self.mesh):
      return tick_lib.count_ticks(self.decoder)


@dataclasses.dataclass(frozen=True)
class CompiledText:
  """A compiled program, as far as it is read.

  Attributes:
    text: its instructions.
    arguments, temporaries: bytes.
    pool: bytes of each buffer of keys and values that it works on.
  """

  text: str
  arguments: float
  temporaries: float
  pool: tuple[float, ...]


def compile_tick(setup: DecodingSetup, settings: sampling.Sampling = sampling.Sampling(),
                 logprobs: bool = False) -> CompiledText:
  """Compiles the ticks of a dispatch, for requests of some settings where the host picks the program by them."""
  num_ticks = setup.num_ticks

  def tick(weights, slots):
    variant = variant_lib.pick([settings], logprobs, False)
    return tick_lib.run(setup.decoder, weights, slots, num_ticks=num_ticks,
                        vocab_size=setup.config.model.vocab_size, together=False, variant=variant)

  return _compile(setup, tick)


def compile_prefill(setup: DecodingSetup, num_prompts: int = 1, num_tokens: int = 64) -> CompiledText:
  """Compiles the prefill of the first `num_tokens` tokens of some prompts in one call."""
  def store(weights, slots, slot_G, tokens_GT, start_G, length_G):
    return prefill_lib.store(setup.decoder, weights, slots, slot_G, tokens_GT, start_G, length_G, context_pages=0)

  each = jax.ShapeDtypeStruct((num_prompts,), jnp.int32)
  return _compile(setup, store, each, jax.ShapeDtypeStruct((num_prompts, num_tokens), jnp.int32), each, each)


def _compile(setup: DecodingSetup, function: Callable, *others: jax.ShapeDtypeStruct) -> CompiledText:
  """Compiles a function of weights, slots and others, whose slots are donated."""
  model, decoder, pages = setup.config.model, setup.decoder, setup.pages_per_row
  structures, specs, pool = [], [], []

  def leaves(variables):
    weights = weights_lib.prepare(model, variables, _FORMAT)
    if setup.more:
      weights = parts_lib.arrange(model, weights, 1 + len(setup.more))
    slots = slots_lib.make(decoder, weights, setup.num_slots, setup.num_slots * pages * decoder.tables.num_rows,
                           setup.num_slots * pages, pages)
    structures.extend(jax.tree.structure(tree) for tree in (weights, slots))
    specs.extend((parts_lib.list_specs(weights), parts_lib.list_slots_specs(slots)))
    pool.extend(float(x.size * x.dtype.itemsize) for x in jax.tree.leaves((slots.cache.edge, slots.cache.stack)))
    return jax.tree.leaves(weights), jax.tree.leaves(slots)

  def run(weights, slots, *others):
    return function(*(jax.tree.unflatten(*one) for one in zip(structures, (weights, slots), strict=True)), *others)

  variables = jax.eval_shape(transformer.Transformer(model).init, jax.random.key(0),
                             jax.ShapeDtypeStruct((1, 1), "int32"))
  with jax.set_mesh(setup.mesh):
    shapes = jax.eval_shape(leaves, variables)
    if setup.more:
      split = parts_lib.compile_program(setup.mesh, function, tuple(structures), tuple(specs))
      program = split.lower(*_place_parts(setup.mesh, *shapes, *specs), others, {}).compile()
    else:
      here = jax.sharding.NamedSharding(setup.mesh, jax.sharding.PartitionSpec())
      weights, slots, *rest = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), (*shapes, *others))
      program = jax.jit(run, donate_argnums=1).lower(weights, slots, *rest).compile()
  memory = program.memory_analysis()
  return CompiledText(program.as_text(), memory.argument_size_in_bytes, memory.temp_size_in_bytes, tuple(pool))


def _place_parts(mesh, weights, slots, weights_specs, slots_specs):
  """Returns the shapes of weights, and of slots of which the parts' own arrays stand one after another."""
  def place(shape, leaf, spec):
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

  def join(leaf, spec):
    return (mesh.size * leaf.shape[0], *leaf.shape[1:]) if spec else leaf.shape

  return ([place(leaf.shape, leaf, spec) for leaf, spec in zip(weights, weights_specs)],
          [place(join(leaf, spec), leaf, spec) for leaf, spec in zip(slots, slots_specs)])


def tick_figures(setup: DecodingSetup, compiled: CompiledText,
                 turns: Callable[[hlo.Instruction], float] = lambda loop: 1) -> dict[str, Any]:
  """Returns the figures of a dispatch's ticks; `turns` are the rounds of a loop of unknown length."""
  program, pool = hlo.parse(compiled.text), frozenset(compiled.pool)
  whole = executed.count(program, turns=turns, pool=pool)
  ideal = ideal_lib.tick(setup.share, setup.num_slots, setup.stored)
  loop = executed.find_loop(program)
  a_tick = executed.count(program, loop.called, turns=turns, pool=pool)
  beside = whole.minus(a_tick.times(program.find_trips(loop) or 1))
  return {"devices": 1 + len(setup.more), "collectives": count_collectives(compiled),
          "num_slots": setup.num_slots, "context": setup.pages_per_row * setup.page_size, "position": setup.stored,
          "storage": type(setup.decoder.tables.storage).__name__, "ticks": setup.num_ticks,
          **memory_figures(compiled), "a_tick": dataclasses.asdict(a_tick), "beside": dataclasses.asdict(beside),
          **estimate(setup.device, a_tick, ideal)}


def prefill_figures(setup: DecodingSetup, compiled: CompiledText, num_prompts: int = 1, num_tokens: int = 64) -> dict[str, Any]:
  """Returns the figures of a prefill of some prompts in one call."""
  counted = executed.count(hlo.parse(compiled.text), pool=frozenset(compiled.pool))
  ideal = ideal_lib.prefill(setup.share, num_prompts, num_tokens)
  return {"prompts": num_prompts, "tokens": num_tokens, **memory_figures(compiled), **dataclasses.asdict(counted),
          **estimate(setup.device, counted, ideal)}


def count_collectives(compiled: CompiledText) -> dict[str, dict[str, float]]:
  """Returns number and bytes of the collectives of a program, by kind."""
  found = hlo.measure(compiled.text).collectives
  return {kind: dataclasses.asdict(one) for kind, one in sorted(found.items())}


def memory_figures(compiled: CompiledText) -> dict[str, float]:
  """Returns the bytes of all arguments, of the pool among them, and of temporaries."""
  pool = sum(compiled.pool)
  return {"arguments": compiled.arguments, "pool_bytes": pool, "temporaries": compiled.temporaries,
          "temporaries_of_pool": compiled.temporaries / pool}


def estimate(device: Any, counted: executed.Executed, ideal: ideal_lib.Ideal) -> dict[str, float | None]:
  """Returns what the counted operations move and take, and the ratio to the ideal of a chip with known peaks."""
  moved = counted.bytes + (ideal.entries if counted.pool_reads else 0.0)
  found = {"ideal_bytes": ideal.bytes, "bytes": moved, "bytes_ratio": moved / ideal.bytes}
  try:
    chip = chips.find(device)
  except ValueError:  # a CPU
    return found
  found["ideal_seconds"] = ideal.seconds(chip)
  if device.platform == "tpu":
    seconds = counted.cycles / chips.cycles_per_second(device)
    if counted.pool_reads:
      seconds += ideal.entries / chip.bandwidth
    found |= {"cycles_seconds": seconds, "cycles_ratio": seconds / found["ideal_seconds"]}
  return found
