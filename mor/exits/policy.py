"""Where a token may leave before the full depth, and what becomes of its deeper keys.

An exit is a boundary between unrolled layers: in a recursive model the end of a step,
in a plain one any layer. Its logits are those of final norm and head on the state
there; the coda belongs to the full depth. A request chooses what an exit means:

  none     nothing: full depth
  trust    the exit's token is the next token
  verify   it is a guess, which the full depth confirms or replaces: the request gets
           what the full depth alone would give it

KV policies, for the deeper layers' entries of tokens that left:

  exact    pending tokens go through the deeper layers together with the next one that
           goes there (synchronized parallel decoding), so their entries are the full
           depth's before anybody reads them. `verify` needs it.
  copied   the layers' own key and value projections of the state at the exit
"""

import dataclasses
from typing import Literal, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from mor import config as config_lib
from mor.exits import confidence
from mor.model import kernels
from mor.model import schedule as schedule_lib
from mor.model.routers import table as router_table

MODES = ("none", "trust", "verify")
POLICIES = ("exact", "copied")
VERIFY_THRESHOLD = 0.5  # of drafts, where neither request nor calibrator says one
_ROWS = {"cpu": 9}  # rows that take as long as reading a pass's weights, by platform: measured (bfloat16, AVX2)
_ACCELERATOR = 256  # … by arithmetic: 240 to 300 FLOPs a byte (TPU v5e, H100)
NO_LOGITS = ("saturation",)  # measures of the state alone


@dataclasses.dataclass(frozen=True)
class Exits:
  """The exits of an engine; static.

  `pending`, `carry`, `worth` and `monitor` have no flag: the first three change the speed
  of `verify` requests and none of their tokens, and `monitor` feeds a calibrator in Python.

  Attributes:
    after: unrolled layers (prelude included) after which a token may exit, ascending.
    measure: name of the confidence in `confidence.MEASURES`.
    pending: tokens of a request that may wait for the deeper layers, at most (S_max).
    carry: pending tokens of all requests that one pass takes along; 0 is `pending` for
      each request, but with many requests `4 * pending` or two for each. The rest waits.
    first: tokens that an exit chooses from, the lowest ids, which a tokenizer of merges
      gives to the most frequent tokens; 0 is the whole vocabulary. An exit reads the
      head that far only; sampled requests with exit="verify" read all of it.
    kv: one of POLICIES.
    monitor: whether to tell, for the last exit of each token, if its likeliest token was
      that of full depth.
    worth: share of exits (trust) below which a request looks for one at every 16th
      token only; None estimates where looking costs more than it saves. 0 always looks.
  """

  after: tuple[int, ...]
  measure: str = "margin"
  pending: int = 7
  carry: int = 0
  first: int = 0
  kv: Literal["exact", "copied"] = "exact"
  monitor: bool = False
  worth: float | None = None

  def __post_init__(self):
    def require(ok, name, remedy):
      if not ok:
        raise ValueError(f"exits.{name}={getattr(self, name)!r}; use {remedy}")

    def integer(x):
      return isinstance(x, int) and not isinstance(x, bool)

    require(isinstance(self.after, tuple) and self.after and all(map(integer, self.after))
            and list(self.after) == sorted(set(self.after)), "after", "a tuple of ascending layers, one at least")
    require(isinstance(self.measure, str) and self.measure in confidence.MEASURES, "measure", f"one of {', '.join(confidence.MEASURES)}")
    require(self.measure != "agreement" or len(self.after) > 1, "after", "two or more for the measure 'agreement'")
    require(integer(self.pending) and self.pending >= 1, "pending", "a count >= 1")
    require(integer(self.carry) and (self.carry == 0 or self.carry >= self.pending), "carry",
            f"0, or a count >= pending={self.pending}")
    require(integer(self.first) and (self.first == 0 or self.first >= 2), "first",
            "0 for the whole vocabulary, or 2 or more")
    require(self.kv in POLICIES, "kv", f"one of {', '.join(POLICIES)}")
    require(isinstance(self.monitor, bool), "monitor", "True or False")
    require(not self.monitor or self.kv == "exact", "monitor", "False, or kv='exact', which runs the full depth")
    number = isinstance(self.worth, (int, float)) and not isinstance(self.worth, bool)
    require(self.worth is None or number and 0 <= self.worth <= 1, "worth", "None, or a share in [0, 1]")

  def check(self, model: config_lib.ModelConfig) -> None:
    """Refuses what a model cannot do.

    Raises:
      ValueError: says what, the value and the remedy.
    """
    if self.first > model.vocab_size:
      raise ValueError(f"exits.first={self.first}: this model has {model.vocab_size} tokens; use fewer, or 0")
    schedule = schedule_lib.make(model)
    plain = schedule.num_steps == 1
    valid = tuple(range(1, model.num_layers)) if plain else schedule.boundaries()
    if not set(self.after) <= set(valid):
      raise ValueError(f"exits.after={self.after}: this model has exits after layers {', '.join(map(str, valid))}")
    if plain and router_table.make(model).routes:
      raise ValueError(f"exits in a model of one step with router.name={model.router.name!r}; use 'fixed', or several "
                       "recursion steps")
    if not plain and not schedule.cyclic:
      raise ValueError(f"exits with sharing={model.sharing!r}; use a cyclic scheme, or a plain model")

  @property
  def places(self) -> int:
    """Pending tokens that a request's ring holds."""
    return self.pending if self.kv == "exact" else 1

  def room(self, num_slots: int) -> int:
    """Returns how many pending tokens one pass takes along."""
    if self.kv != "exact":
      return 0
    return self.carry or min(num_slots * self.pending, max(4 * self.pending, 2 * num_slots))


class ExitCosts(NamedTuple):
  """Costs of decoding with exits, in weights that are multiplied by; a token's share of a pass with one of each slot.

  Attributes:
    full: a token at the full depth.
    turn: a token to its first exit, with its confidence there.
    look: at one exit, its confidence.
    draft: one more pending token, from start to confirmation.
    worth: share of exits at which looking for them pays (trust).
  """

  full: float
  turn: float
  look: float
  draft: float
  worth: float


def estimate_costs(model: config_lib.ModelConfig, exits: Exits, num_slots: int) -> ExitCosts:
  """Estimates costs: a pass takes the time of reading its weights, and as much again for each `_ROWS` rows."""
  layer, head = sum(a * b for a, b in model.projections.values()), model.vocab_size * model.d_model
  shallow, deep = exits.after[0] * layer, (model.num_layers - exits.after[0]) * layer
  look = 0 if exits.measure in NO_LOGITS else (exits.first or model.vocab_size) * model.d_model
  by_row = num_slots / (num_slots + _ROWS.get(kernels.platform(), _ACCELERATOR))  # of a share, one more row
  saved = head + (1.0 - by_row) * deep
  worth = min(look / saved, 0.9) if exits.worth is None else exits.worth
  turn = shallow + look
  return ExitCosts(shallow + deep + head, turn, look, turn + by_row * (deep + head), worth)


@struct.dataclass
class Setup:
  """What a tick with exits needs beside the slots.

  Attributes:
    draft: whether requests to be verified draft at all, if they do not sample.
    exits: of the engine, static.
    steps: steps after which a token may leave, static.
    room: pending tokens that one pass takes along, static.
    costs: costs of looking and drafting, static.
  """

  draft: jax.Array
  exits: Exits = struct.field(pytree_node=False)
  steps: tuple[int, ...] = struct.field(pytree_node=False)
  room: int = struct.field(pytree_node=False)
  costs: ExitCosts = struct.field(pytree_node=False)


def set_up(model: config_lib.ModelConfig, exits: Exits, schedule: schedule_lib.LayerSchedule, num_slots: int) -> Setup:
  """Returns the setup of an engine whose requests may draft.

  Args:
    model: the model's config.
    exits: of the engine.
    schedule: the decoder's, in which a plain model is cut at its exits.
    num_slots: of the engine.
  """
  steps = tuple(1 + schedule.boundaries().index(n) for n in exits.after)
  return Setup(jnp.bool_(True), exits, steps, exits.room(num_slots), estimate_costs(model, exits, num_slots))
