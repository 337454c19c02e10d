"""One training step: micro-batches, gradients, update, metrics; jitted once."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import optax

from mor import checkpoint
from mor import config as config_lib
from mor import distributed
from mor import sharding
from mor.model import depths
from mor.model import kernels
from mor.model import transformer
from mor.model.routers import base as router_base
from mor.model.routers import table as router_table
from mor.train import exit_losses
from mor.train import loss as loss_lib
from mor.train import optim


LARGEST = 1e5  # absolute value that no parameter reaches in training that works: trained models stay below 1e3


@struct.dataclass
class TrainState:
  """The state that a step changes: arrays, or their shapes or shardings.

  Attributes:
    step: number of finished updates, int32 scalar.
    params: parameters, see `transformer.Transformer`.
    opt_state: state of the optimizer.
    balance: state of the router without a gradient, e.g. a bias.
  """

  step: Any
  params: dict
  opt_state: Any
  balance: dict


def init_state(config: config_lib.Config, mesh: Mesh) -> TrainState:
  """Makes the state at step 0 on its devices; it is a function of `config.seed`."""
  shardings = state_shardings(config, mesh)
  with jax.set_mesh(mesh):
    return jax.jit(lambda: _init(config), out_shardings=shardings)()


def state_shapes(config: config_lib.Config) -> TrainState:
  """Returns the `ShapeDtypeStruct` of every leaf of the state."""
  return jax.eval_shape(lambda: _init(config))


def state_shardings(config: config_lib.Config, mesh: Mesh) -> TrainState:
  """Returns the `NamedSharding` of every leaf of the state."""
  return sharding.tree_shardings(mesh, state_shapes(config), _router_rows(config.model))


def _router_rows(model: config_lib.ModelConfig) -> sharding.Rows:
  return router_table.make(model).parameters


def _init(config: config_lib.Config) -> TrainState:
  tokens_BT = jnp.zeros((1, 2), jnp.int32)
  return start(config, transformer.Transformer(config.model).init(jax.random.key(config.seed), tokens_BT))


def start(config: config_lib.Config, variables: Mapping[str, Any]) -> TrainState:
  """Makes the state at step 0 from given variables."""
  params = variables["params"]
  balance = dict(variables.get("balance", {}))
  return TrainState(jnp.zeros((), jnp.int32), params, optim.make(config).init(params), balance)


def check_state(state: TrainState, step: int) -> None:
  """Refuses a state that has diverged, although the loss of its last step was finite; waits for the state.

  Args:
    state: state after `step`.
    step: number of finished updates.

  Raises:
    FloatingPointError: a value is not finite, or a parameter is beyond `LARGEST`.
  """
  unsound = jax.device_get(_find_unsound(state))
  paths = [jax.tree_util.keystr(path, simple=True, separator="/")
           for path, _ in jax.tree_util.tree_leaves_with_path(state)]
  bad = [path for path, is_bad in zip(paths, unsound, strict=True) if is_bad]
  if bad:
    raise FloatingPointError(
        f"{bad[0]}{f' and {len(bad) - 1} more arrays' if bad[1:] else ''} of the state after step {step} are not finite, "
        f"or beyond {LARGEST:g}, so the state was not saved; lower optim.learning_rate or lengthen optim.warmup_steps, "
        "in another --workdir")


@jax.jit
def _find_unsound(state: TrainState) -> list[jax.Array]:
  """Returns for each array whether it has a value that is not finite, or a parameter that is too large."""
  limits = jax.tree.map(lambda _: jnp.inf, state).replace(params=jax.tree.map(lambda _: LARGEST, state.params))
  return [~jnp.all(jnp.abs(x) < limit) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.zeros((), bool)
          for x, limit in zip(jax.tree.leaves(state), jax.tree.leaves(limits), strict=True)]


@struct.dataclass
class Teacher:
  """The teacher of a distillation: `train_step` runs it on every batch and does not change it."""

  params: dict
  balance: dict
  model: config_lib.ModelConfig = struct.field(pytree_node=False)

  @property
  def num_bytes(self) -> int:
    """Bytes of the parameters, over all devices."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))


def load_teacher(config: config_lib.Config, mesh: Mesh) -> Teacher | None:
  """Loads the newest checkpoint of `distill.teacher`; returns None if the config has no teacher.

  Raises:
    ValueError: there is no checkpoint, or its model has another vocabulary.
    OSError: the checkpoint is damaged.
  """
  workdir = config.distill.teacher
  if not workdir:
    return None
  try:
    theirs, _, variables = checkpoint.load_variables(
        workdir, lambda their, shapes: sharding.tree_shardings(mesh, shapes, _router_rows(their.model)))
  except ValueError as error:
    raise ValueError(f"distill.teacher={workdir!r}: {error}") from error
  if theirs.model.vocab_size != config.model.vocab_size:
    raise ValueError(f"distill.teacher={workdir!r} has model.vocab_size={theirs.model.vocab_size}, this model "
                     f"{config.model.vocab_size}; use a teacher of the same tokenizer")
  return Teacher(variables["params"], variables.get("balance", {}), theirs.model)


def make_train_step(config: config_lib.Config, mesh: Mesh, teacher: Teacher | None = None) -> Callable:
  """Makes `train_step(state, batch, step=None) -> (state, metrics)`, which donates the state.

  The argument `step` is the copy of `state.step` on the host. It chooses the compiled
  program: the static widths of a capacity warm-up, and the number of recursion steps
  where that is drawn (`model/depths.py`). If it is absent, it is read from the device.
  `train_step.must_compile(step)` tells whether the program of a step is not compiled yet.

  Raises:
    ValueError: the number of rows of a micro-batch is not a multiple of the devices.
  """
  rows, parts = config.data.batch_size // config.train.accumulation, sharding.num_row_shards(mesh)
  if rows % parts:
    raise ValueError(f"data.batch_size / train.accumulation = {rows} rows is not a multiple of mesh.data * mesh.fsdp = "
                     f"{parts}; use {rows - rows % parts or parts} or {rows - rows % parts + parts} rows")
  shardings = state_shardings(config, mesh)
  replicated, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P(sharding.ROWS))

  @kernels.full_precision
  def update_and_vote(state, batch, teacher, bucket, recursions=None):
    rows = {name: value for name, value in batch.items() if name != "votes"}
    new_state, metrics = update(at_recursions(config, recursions), mesh, state, rows, teacher, bucket)
    drawn = {} if recursions is None else {"recursions": jnp.asarray(recursions, jnp.float32)}
    stop = {"stop": jnp.any(batch["votes"])} if "votes" in batch else {}  # see train/signals.py
    return new_state, metrics | drawn | stop

  placed = None if jax.process_count() > 1 else by_row  # several processes always place their rows
  jitted = jax.jit(
      update_and_vote, static_argnums=(3, 4), donate_argnums=0,
      in_shardings=(shardings, placed, _teacher_shardings(mesh, teacher)), out_shardings=(shardings, replicated))
  router, ready = router_table.make(config.model), set()
  draws = config.model.recursions_train.draws

  def choose_program(step):
    return (router.bucket(step) if router.num_buckets else None,
            depths.draw(config.model, config.seed, step) if draws else None)

  def train_step(state: TrainState, batch: Mapping[str, jax.Array], step: int | None = None):
    if step is None:
      step = int(state.step) if router.num_buckets or draws else 0
    program = choose_program(step)
    with jax.set_mesh(mesh):
      if program not in ready:
        distributed.compile_together(jitted, state, batch, teacher, *program)
        ready.add(program)
      return jitted(state, batch, teacher, *program)

  def must_compile(step: int) -> bool:
    return choose_program(step) not in ready

  train_step.jitted, train_step.must_compile = jitted, must_compile
  return train_step


def at_recursions(config: config_lib.Config, num_recursions: int | None) -> config_lib.Config:
  """Returns the experiment with a model that runs another number of recursion steps; None changes nothing.

  Raises:
    ValueError: the model, or an exit, belongs to the number of steps that it has.
  """
  if num_recursions is None:
    return config
  return dataclasses.replace(config, model=depths.at(config.model, num_recursions))


def _teacher_shardings(mesh: Mesh, teacher: Teacher | None) -> Teacher | None:
  return None if teacher is None else sharding.tree_shardings(mesh, teacher, _router_rows(teacher.model))


def update(config: config_lib.Config, mesh: Mesh, state: TrainState, batch: Mapping[str, jax.Array],
           teacher: Teacher | None, bucket: int | None) -> tuple[TrainState, dict[str, jax.Array]]:
  """Computes a step: gradients, new state, metrics."""
  router = router_table.make(config.model)
  specs = sharding.row_specs(state.params, router.parameters)
  taught = sharding.row_specs(teacher, _router_rows(teacher.model)) if teacher else None
  differentiate = sharding.by_rows(
      mesh, lambda *given: compute_gradients(config, *given, bucket),
      in_specs=(sharding.row_specs(state.replace(opt_state=()), router.parameters), P(sharding.ROWS), taught),
      out_specs=(P(), P(), specs))
  terms, sums, grads = differentiate(state.replace(opt_state=()), batch, teacher)
  with jax.named_scope("optimizer"):
    updates, opt_state = optim.make(config).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
  balance = router.update(state.balance, sums, state.step)
  new_state = TrainState(state.step + 1, params, opt_state, balance)
  metrics = {
      **terms,
      "grad_norm": optax.tree.norm(grads),
      "learning_rate": jnp.asarray(optim.learning_rate(config)(state.step), jnp.float32),
      **router_metrics(config.model, sums),
  }
  return new_state, metrics


def compute_gradients(config: config_lib.Config, state: TrainState, batch: Mapping[str, jax.Array],
                      teacher: Teacher | None,
                      bucket: int | None) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict]:
  """Computes losses, sums of the router and gradients of a batch, inside `sharding.by_rows`."""
  parts = config.train.accumulation
  targets = sharding.sum_over_devices(jnp.sum(batch["loss_mask_BT"], dtype=jnp.float32))
  grad_fn = jax.value_and_grad(micro_loss, argnums=1, has_aux=True)

  def differentiate(micro, norms, part):
    (_, aux), grads = grad_fn(config, state.params, state, micro, teacher, targets, norms, bucket, part)
    return aux, grads

  if parts == 1:
    (terms, sums), grads = differentiate(batch, None, 0)
  else:
    # Micro-batch a has rows a, a + parts, …, so every device keeps its own rows.
    micros = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), dict(batch))
    norms = _normalizers(config, state, micros)
    first = jax.tree.map(lambda x: x[0], micros)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(differentiate, first, norms, 0))

    def add(total, xs):
      micro, part = xs
      return jax.tree.map(jnp.add, total, differentiate(micro, norms, part)), None

    ((terms, sums), grads), _ = jax.lax.scan(add, zeros, (micros, jnp.arange(parts)))
  return *sharding.sum_over_devices((terms, sums)), sharding.sum_gradients(grads, _router_rows(config.model))


def micro_loss(config: config_lib.Config, params: dict, state: TrainState, batch: Mapping[str, jax.Array],
               teacher: Teacher | None, targets: jax.Array, norms: Mapping[str, jax.Array] | None,
               bucket: int | None, part):
  """Computes the loss of a micro-batch, as its share of the loss of the whole batch.

  Args:
    config: the experiment.
    params: parameters, to differentiate by.
    state: step and balance.
    batch: rows of the micro-batch.
    teacher: model whose predictions are learned, or None.
    targets: number of targets of the whole batch.
    norms: counts of the whole batch; None if the micro-batch is the whole batch.
    bucket: see `Transformer`.
    part: index of the micro-batch.
  """
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), part)
  params = transformer.whole(config.model, params)
  out = transformer.Transformer(config.model).apply(
      {"params": params, "balance": state.balance}, batch["tokens_BT"], batch["segment_BT"], routing="select",
      train_step=state.step, bucket=bucket, key=key, exits=exit_losses.select_layers(config.exit, config.model),
      drop=config.exit.layer_dropout)
  weight_BT = batch["loss_mask_BT"] / jnp.maximum(targets, 1.0)
  student, block = (out.hidden_BTD, transformer.head(params)), config.train.loss_block
  if teacher is None:
    main = nll = loss_lib.cross_entropy(*student, batch["target_BT"], weight_BT, block)
    taught = {}
  else:
    theirs = transformer.whole(teacher.model, teacher.params)
    hidden_BTD = transformer.Transformer(teacher.model).apply(
        {"params": theirs, "balance": teacher.balance}, batch["tokens_BT"], batch["segment_BT"],
        routing="decide").hidden_BTD
    main, nll, kl = loss_lib.distill(student, (hidden_BTD, transformer.head(theirs)), batch["target_BT"],
                                     weight_BT, block, config.distill.weight, config.distill.temperature)
    taught = {"kl": kl}
  if norms is None:
    norms = router_base.norms(sharding.sum_over_devices(jax.lax.stop_gradient(dict(out.sums))))
  router = router_table.make(config.model)
  aux = router.losses(out.sums, norms)
  main, early = exit_losses.add_losses(config, out, main, params, batch["target_BT"], weight_BT, state.step)
  loss = main + router.weigh(aux)
  terms = {"loss": loss, "nll": nll, **taught, **early, **{f"{name}_loss": term for name, term in aux.items()}}
  return loss, (terms, dict(out.sums))


def _normalizers(config, state, micros) -> dict[str, jax.Array]:
  """Counts the whole batch before its micro-batches run, as far as the losses of the router need it."""
  def entry_sums():
    params = transformer.whole(config.model, state.params)

    def one(batch):
      return transformer.Transformer(config.model).apply(
          {"params": params, "balance": state.balance}, batch["tokens_BT"], batch["segment_BT"],
          train_step=state.step, method="entry_sums")
    return jax.tree.map(lambda sums: jnp.sum(sums, axis=0), jax.lax.map(one, micros))

  valid_BT = micros["segment_BT"].reshape(-1, micros["segment_BT"].shape[-1]) != 0
  counts = router_table.make(config.model).counts(valid_BT, state.step, entry_sums)
  return router_base.norms(sharding.sum_over_devices(dict(counts)))


def router_metrics(config: config_lib.ModelConfig, sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns routing statistics of a batch; {} without a router.

  load_r: fraction of tokens that step r (from 1) processes. sampling_accuracy:
  fraction of candidates whose logit predicts the top-k. dead_tokens: fraction of
  positions that no row keeps to the last step. max_vio: largest load over the
  mean load, minus 1. entropy: of the depth distribution, nats. mean_steps: mean
  over the shares of a soft routing, whose loads are those of a hard one.
  """
  if not router_table.make(config).routes:
    return {}
  tokens = jnp.maximum(sums["tokens"], 1.0)
  metrics = {f"load_{r + 1}": sums["kept"][r] / tokens for r in range(config.num_recursions)}
  metrics["dead_tokens"] = jnp.mean(sums["last_T"] == 0, dtype=jnp.float32)
  if "correct" in sums:
    metrics["sampling_accuracy"] = jnp.sum(sums["correct"]) / jnp.maximum(jnp.sum(sums["candidates"]), 1.0)
  if "chosen_R" in sums:
    load_R = sums["chosen_R"] / tokens
    metrics["max_vio"] = jnp.max(load_R) / jnp.maximum(jnp.mean(load_R), 1e-9) - 1.0
  if "entropy" in sums:
    metrics["entropy"] = sums["entropy"] / tokens
  if "share_R" in sums:
    metrics["mean_steps"] = jnp.sum(sums["share_R"]) / tokens
    metrics["entropy"] = jnp.sum(sums["entropy_R"]) / tokens
  return metrics
