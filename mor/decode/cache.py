"""Where a decoder's keys and values are: free pages, and page tables over a storage's buffers.

Sequences take pages when an entry needs one and give them back when their request
ends, inside jitted programs, so that the host never has to know how long a row is.
A row of the tables belongs to a recursion step (see `model/kv/plans.py`): with
recursion-wise and hybrid plans every step has one, with a shared plan step 0 alone.
Prelude and coda (the *edges*) store every token, in pages of their own. Entries
ascend by position, so a decoded token sees its rows' entries and needs no mask.
"""

import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor.decode import storage as storage_lib
from mor.model import schedule as schedule_lib
from mor.model.kv import plans as kv_plans


@struct.dataclass
class FreePages:
  """Stack of a pool's free pages on the device: the first `num` of `page_P` are free."""

  page_P: jax.Array
  num: jax.Array


def make_free(num_pages: int) -> FreePages:
  """Returns a pool whose pages are all free; the lowest number is taken first."""
  return FreePages(jnp.arange(num_pages, dtype=jnp.int32)[::-1], jnp.int32(num_pages))


def reserve_pages(free: FreePages, page_BP: jax.Array, length_B: jax.Array, count_B: jax.Array,
                  page_size: int) -> tuple[FreePages, jax.Array, jax.Array]:
  """Takes the pages that `count_B` more entries need.

  A row gets all that it needs or nothing; rows are served in order.

  Args:
    free: the pool's free pages.
    page_BP: pages of each row.
    length_B: entries in each row, whose pages it has.
    count_B: entries to make room for.
    page_size: entries in a page.

  Returns:
    The pages still free, `page_BP` with the new pages, and True for the rows that
    have room now.
  """
  return take_pages(free, page_BP, _between(page_BP.shape[1], length_B, length_B + count_B, page_size))


def take_pages(free: FreePages, page_BP: jax.Array, new_BP: jax.Array) -> tuple[FreePages, jax.Array, jax.Array]:
  """Takes a page for every True of `new_BP`; returns what `reserve_pages` does."""
  rank_BP = jnp.cumsum(new_BP.reshape(-1)).reshape(new_BP.shape) - 1
  last_B = jnp.max(jnp.where(new_BP, rank_BP, -1), axis=1)
  ok_B = last_B < free.num
  new_BP &= ok_B[:, None]
  taken_BP = free.page_P.at[free.num - 1 - rank_BP].get(mode="clip")
  left = free.num - jnp.sum(new_BP, dtype=jnp.int32)
  return FreePages(free.page_P, left), jnp.where(new_BP, taken_BP, page_BP), ok_B


def release_pages(free: FreePages, page_BP: jax.Array, length_B: jax.Array, page_size: int,
                  kept_B: jax.Array | int = 0) -> FreePages:
  """Gives back the pages of rows with `length_B` entries, of which the first `kept_B` stay."""
  used_BP = _between(page_BP.shape[1], jnp.broadcast_to(kept_B, length_B.shape), length_B, page_size)
  rank_BP = jnp.cumsum(used_BP.reshape(-1)).reshape(used_BP.shape) - 1
  target_BP = jnp.where(used_BP, free.num + rank_BP, free.page_P.shape[0])
  page_P = free.page_P.at[target_BP.reshape(-1)].set(page_BP.reshape(-1), mode="drop")
  return FreePages(page_P, free.num + jnp.sum(used_BP, dtype=jnp.int32))


def _between(num_pages: int, low_B: jax.Array, high_B: jax.Array, page_size: int) -> jax.Array:
  """Returns True for the pages `[B, P]` that entries `high_B` need and entries `low_B` do not."""
  low_B1, high_B1 = (((entries_B + page_size - 1) // page_size)[:, None] for entries_B in (low_B, high_B))
  column_1P = jnp.arange(num_pages)[None, :]
  return (column_1P >= low_B1) & (column_1P < high_B1)


@struct.dataclass
class Cache:
  """Buffers of all layers, and where each of B sequences finds its entries.

  Attributes:
    edge: buffers of the prelude's and the coda's layers.
    stack: buffers of a step's layers.
    edge_page_BP, edge_length_B: each sequence's row in the edges, where entry and
      position agree.
    page_BRP, length_BR: its rows in the stack, one for each storing step.
    hidden_BRS: base entries that a step has overlaid (hybrid), else of size 0.
    free, edge_free: pages that nobody uses.
  """

  edge: tuple[Any, ...]
  stack: tuple[Any, ...]
  edge_page_BP: jax.Array
  edge_length_B: jax.Array
  page_BRP: jax.Array
  length_BR: jax.Array
  hidden_BRS: jax.Array
  free: FreePages
  edge_free: FreePages


@struct.dataclass
class Tokens:
  """M tokens of a pass: one of each sequence, in order, then perhaps more of them.

  Attributes:
    slot_M: the sequence of each.
    position_M: ascending among those of a sequence.
    step_M: recursion step that it runs; the same for all running ones of a sequence.
    run_M: whether it runs at all; the others' results mean nothing.
    alone: whether there are no more, static.
  """

  slot_M: jax.Array
  position_M: jax.Array
  step_M: jax.Array
  run_M: jax.Array
  alone: bool = struct.field(pytree_node=False, default=False)

  def before(self, on_M: jax.Array) -> jax.Array:
    """Counts the tokens of the same sequence that are `on` and come before each token."""
    if self.alone:
      return jnp.zeros_like(self.position_M)
    same_MM = self.slot_M[:, None] == self.slot_M[None, :]
    earlier_MM = self.position_M[None, :] < self.position_M[:, None]
    return jnp.sum(same_MM & earlier_MM & on_M[None, :], axis=1, dtype=jnp.int32)


def one_each(position_B: jax.Array, step_B: jax.Array, run_B: jax.Array) -> Tokens:
  """Returns one token of every sequence."""
  return Tokens(jnp.arange(position_B.shape[0]), position_B, step_B, run_B, alone=True)


@dataclasses.dataclass(frozen=True)
class Rule:
  """Where layer i of each step stores and reads: rows of the tables, -1 for none."""

  own_R: tuple[int, ...]
  base_R: tuple[int, ...]
  base_buffer_R: tuple[int, ...]


class Tables:
  """Which buffers and rows each step of a model uses, from its schedule and KV plan.

  A plain model with exits after some layers is `cut` there into steps of different
  layers. Steps share their buffers: the i-th layer of each stores in the i-th.
  """

  def __init__(self, model: config_lib.ModelConfig, storage: Any, after: tuple[int, ...] = ()):
    self.storage = storage
    self.schedule = schedule_lib.make(model)
    if after and self.schedule.num_steps == 1:  # each part stores in a row of its own, as it runs at its own time
      self.schedule = self.schedule.cut(after)
      self.plan = kv_plans.recursion_wise(self.schedule)
    else:
      self.plan = kv_plans.make(model.kv_plan, self.schedule)
    self.num_edges = self.schedule.prelude + self.schedule.coda
    self.rules = self._rules()
    self.num_rows = 1 + max(row for rule in self.rules for row in rule.own_R)
    self.overlays = any(own >= 0 and base >= 0 for rule in self.rules for own, base in zip(rule.own_R, rule.base_R))

  def _rules(self) -> tuple[Rule, ...]:
    depth, steps = self.schedule.depth, range(self.schedule.num_steps)
    storing = [r for r in steps if any(own >= 0 for own in self.plan.own[r * depth:(r + 1) * depth])]
    writer = {own: divmod(l, depth) for l, own in enumerate(self.plan.own) if own >= 0}
    rules = []
    for i in range(depth):
      has = [i < len(self.schedule.rows[r]) for r in steps]
      base = [writer.get(self.plan.base[r * depth + i]) for r in steps]
      rules.append(Rule(
          own_R=tuple(storing.index(r) if has[r] and self.plan.own[r * depth + i] >= 0 else -1 for r in steps),
          base_R=tuple(storing.index(b[0]) if b else -1 for b in base),
          base_buffer_R=tuple(b[1] if b else -1 for b in base)))
    return tuple(rules)

  def make_cache(self, num_sequences: int, num_pages: int, num_edge_pages: int, pages_per_row: int) -> Cache:
    """Returns an empty cache; every page number is 0 until a page is reserved."""
    size = pages_per_row * self.storage.page_size
    return Cache(
        edge=tuple(self.storage.make(num_edge_pages) for _ in range(self.num_edges)),
        stack=tuple(self.storage.make(num_pages) for _ in range(self.schedule.depth)),
        edge_page_BP=jnp.zeros((num_sequences, pages_per_row), jnp.int32),
        edge_length_B=jnp.zeros(num_sequences, jnp.int32),
        page_BRP=jnp.zeros((num_sequences, self.num_rows, pages_per_row), jnp.int32),
        length_BR=jnp.zeros((num_sequences, self.num_rows), jnp.int32),
        hidden_BRS=jnp.zeros((num_sequences, self.num_rows, size if self.overlays else 0), bool),
        free=make_free(num_pages),
        edge_free=make_free(num_edge_pages))

  def reserve_edge(self, cache: Cache, run_B: jax.Array) -> tuple[Cache, jax.Array]:
    """Reserves room in the edges for one more token of each sequence of `run_B`; returns True where there is room."""
    if not self.num_edges:
      return cache, run_B
    count_B = run_B.astype(jnp.int32)
    free, page_BP, ok_B = reserve_pages(
        cache.edge_free, cache.edge_page_BP, cache.edge_length_B, count_B, self.storage.page_size)
    ok_B &= run_B
    length_B = cache.edge_length_B + ok_B.astype(jnp.int32)
    return cache.replace(edge_free=free, edge_page_BP=page_BP, edge_length_B=length_B), ok_B

  def reserve_stack(self, cache: Cache, step_B: jax.Array, run_B: jax.Array,
                    count_B: jax.Array | int = 1) -> tuple[Cache, jax.Array]:
    """Reserves room for `count_B` entries of each sequence's step; returns True where there is, or none is stored."""
    own_B, stores_B = self.stores(step_B)
    batch_B = jnp.arange(own_B.shape[0])
    free, page_BP, ok_B = reserve_pages(
        cache.free, cache.page_BRP[batch_B, own_B], cache.length_BR[batch_B, own_B],
        jnp.where(run_B & stores_B, count_B, 0), self.storage.page_size)
    return cache.replace(free=free, page_BRP=cache.page_BRP.at[batch_B, own_B].set(page_BP)), ok_B & run_B

  def reserve_rows(self, cache: Cache, writes_BR: jax.Array, run_B: jax.Array) -> tuple[Cache, jax.Array]:
    """Reserves room for one entry in each KV row of `writes_BR`, all of a sequence's or none; returns True where there is."""
    num, rows, pages = cache.page_BRP.shape
    full_BR = cache.length_BR % self.storage.page_size == 0
    at_BRP = jnp.arange(pages)[None, None, :] == (cache.length_BR // self.storage.page_size)[:, :, None]
    new_BRP = at_BRP & (full_BR & writes_BR & run_B[:, None])[:, :, None]
    free, page_BX, ok_B = take_pages(cache.free, cache.page_BRP.reshape(num, -1), new_BRP.reshape(num, -1))
    return cache.replace(free=free, page_BRP=page_BX.reshape(num, rows, pages)), ok_B & run_B

  def release(self, cache: Cache, done_B: jax.Array) -> Cache:
    """Gives back the pages of the sequences of `done_B`, which are empty then."""
    size, done_B1 = self.storage.page_size, done_B[:, None]
    edge_length_B = jnp.where(done_B, cache.edge_length_B, 0)
    length_BR = jnp.where(done_B1, cache.length_BR, 0)
    flat_MP = cache.page_BRP.reshape(-1, cache.page_BRP.shape[2])
    return cache.replace(
        edge_free=release_pages(cache.edge_free, cache.edge_page_BP, edge_length_B, size),
        free=release_pages(cache.free, flat_MP, length_BR.reshape(-1), size),
        edge_length_B=cache.edge_length_B - edge_length_B,
        length_BR=cache.length_BR - length_BR,
        hidden_BRS=cache.hidden_BRS & ~done_B1[:, :, None])

  def crop(self, cache: Cache, position_B: jax.Array, dropped_BR: jax.Array, crop_B: jax.Array) -> Cache:
    """Forgets the last tokens of the sequences of `crop_B`, and gives back their pages.

    Args:
      cache: of B sequences.
      position_B: of the first token that is forgotten.
      dropped_BR: entries that the forgotten tokens have in each row of the stack.
      crop_B: which sequences.
    """
    size = self.storage.page_size
    edge_length_B = jnp.where(crop_B & (self.num_edges > 0), position_B, cache.edge_length_B)
    length_BR = cache.length_BR - jnp.where(crop_B[:, None], dropped_BR, 0)
    flat_MP = cache.page_BRP.reshape(-1, cache.page_BRP.shape[2])
    position_S = jnp.arange(cache.hidden_BRS.shape[2])
    forgotten_BS = crop_B[:, None] & (position_S[None, :] >= position_B[:, None])
    return cache.replace(
        edge_free=release_pages(cache.edge_free, cache.edge_page_BP, cache.edge_length_B, size, edge_length_B),
        free=release_pages(cache.free, flat_MP, cache.length_BR.reshape(-1), size, length_BR.reshape(-1)),
        edge_length_B=edge_length_B, length_BR=length_BR,
        hidden_BRS=cache.hidden_BRS & ~forgotten_BS[:, None, :])

  def stores(self, step_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the KV row in which each sequence's step stores, and whether it stores at all."""
    own_R = np.max([rule.own_R for rule in self.rules], axis=0)
    own_B = jnp.asarray(own_R, jnp.int32).at[step_B].get(mode="clip")
    return jnp.maximum(own_B, 0), own_B >= 0

  def rows(self, own_R: tuple[int, ...], base_R: tuple[int, ...], cache: Cache, tokens: Tokens,
           index_M: jax.Array) -> tuple[storage_lib.SeenEntries, ...]:
    """Returns what each token sees at its step: the entries of its own KV row, of a base, or of both.

    Of its own row it sees the entries up to its own, `index_M`; of a base, which holds every
    token, those up to its position. Later ones belong to tokens that are ahead of it.
    """
    own_M, base_M = (jnp.asarray(x, jnp.int32).at[tokens.step_M].get(mode="clip") for x in (own_R, base_R))
    both_M = (own_M >= 0) & (base_M >= 0)

    def row(row_M, length_M, on_M, hidden=None):
      return storage_lib.SeenEntries(cache.page_BRP[tokens.slot_M, jnp.maximum(row_M, 0)],
                              jnp.where(on_M & tokens.run_M, length_M, 0), hidden)

    if not self.overlays:
      length_M = jnp.where(own_M >= 0, index_M, tokens.position_M) + 1
      return (row(jnp.maximum(own_M, base_M), length_M, tokens.run_M),)
    hidden_MS = cache.hidden_BRS[tokens.slot_M, jnp.maximum(own_M, 0)] & both_M[:, None]
    first_M = jnp.where(base_M >= 0, tokens.position_M, index_M) + 1
    return (row(jnp.where(base_M >= 0, base_M, own_M), first_M, tokens.run_M, hidden_MS),
            row(own_M, index_M + 1, both_M))

  def place(self, page_BP: jax.Array, index_B: jax.Array, write_B: jax.Array,
            buffer: Any) -> tuple[jax.Array, jax.Array]:
    """Returns page and offset of entry `index_B` of each KV row; past the end where nothing is written."""
    size = self.storage.page_size
    page_B = jnp.take_along_axis(page_BP, (index_B // size)[:, None], axis=1, mode="clip")[:, 0]
    return jnp.where(write_B, page_B, buffer.num_pages), index_B % size
