"""What is restored is bitwise what was saved; a failed save loses nothing, and damage is found."""

import dataclasses
import itertools
import json
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mor import checkpoint
from mor import integrity
from tests.helpers import tiny


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  balance: dict


def make_state(step: int) -> State:
  w_DF = jax.random.normal(jax.random.key(step), (20, 28))
  return State(jnp.int32(step), dict(stack=dict(w=w_DF), head=w_DF[0].astype(jnp.bfloat16)),
               (None, dict(mu=w_DF * 2)), {})


def equal(a, b) -> bool:
  leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
  return len(leaves_a) == len(leaves_b) and all(
      x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(leaves_a, leaves_b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with the checkpoints of steps 2 and 3, of saves 1, 2 and 3."""
  workdir = tmp_path_factory.mktemp("saved")
  config = tiny.config()
  with checkpoint.Checkpoints(workdir, keep=2) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), config)
  return workdir


def test_latest_is_restored_bitwise_and_older_ones_are_dropped(saved):
  with checkpoint.Checkpoints(saved, read_only=True) as checkpoints:
    assert checkpoints.latest_step() == 3
    restored, step = checkpoints.restore(make_state(0))
    assert step == 3 and checkpoints.config() == tiny.config()
  assert isinstance(restored, State)
  assert equal(restored, make_state(3)) and not equal(restored, make_state(2))
  assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["2", "3"]


def test_restores_onto_another_mesh(saved):
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  place = lambda x: jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec("data", "model") if x.ndim == 2 else jax.sharding.PartitionSpec())
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), make_state(0))
  with checkpoint.Checkpoints(saved, read_only=True) as checkpoints:
    restored, _ = checkpoints.restore(target)
  assert equal(restored, make_state(3))
  assert len(restored.params["stack"]["w"].sharding.device_set) == 8


def test_a_donated_state_does_not_change_its_checkpoint(tmp_path):
  config = tiny.config()
  state = jax.block_until_ready(make_state(4))
  kept = jax.tree.map(lambda x: np.array(x, copy=True), state)
  advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(4, state, config)
    for _ in range(20):
      state = advance(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    assert equal(checkpoints.restore(make_state(0))[0], kept)


@pytest.mark.parametrize("change", [
    lambda s: dataclasses.replace(s, params=jax.tree.map(lambda x: x.astype(jnp.float16), s.params)),
    lambda s: dataclasses.replace(s, params=dict(s.params, head=jnp.zeros(7, jnp.bfloat16))),
    lambda s: dataclasses.replace(s, params=dict(s.params, extra=jnp.zeros(7))),
], ids=["type", "shape", "name"])
def test_a_target_of_other_arrays_is_refused(saved, change):
  with checkpoint.Checkpoints(saved, read_only=True) as checkpoints:
    with pytest.raises(ValueError, match="params/.* where this model has"):
      checkpoints.restore(change(make_state(0)))


def test_another_config_is_refused_by_name(saved):
  other = tiny.config(model=dict(d_ff=30), optim=dict(b1=0.8), seed=7)
  with checkpoint.Checkpoints(saved, read_only=True) as checkpoints:
    with pytest.raises(ValueError, match=r"model.d_ff=30 \(there 28\), optim.b1=0.8 .*seed=7 .*--workdir"):
      checkpoints.check(other)
    checkpoints.check(tiny.config())
    checkpoints.check(tiny.config(train=dict(log_every=9, checkpoint_every=8), data=dict(cache_dir="x")))
    checkpoints.check(tiny.config(model=dict(router=dict(halting_threshold=0.9))))
    checkpoints.check(tiny.config(data=dict(source="x")), {"data.source"})
    with pytest.raises(ValueError, match="data.source='x'"):
      checkpoints.check(tiny.config(data=dict(source="x")))


def test_a_constant_rate_may_train_longer(tmp_path):
  constant = dict(optim=dict(schedule="constant"))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(4, make_state(4), tiny.config(constant))
    checkpoints.wait()
    checkpoints.check(tiny.config(constant, train=dict(steps=9)))
    with pytest.raises(ValueError, match="train.steps=3 but .* is at step 4"):
      checkpoints.check(tiny.config(constant, train=dict(steps=3)))


def test_more_steps_go_on_before_the_cooldown(tmp_path, capsys):
  """The rate of wsd falls from step 4 of 5, and from step 8 of 10."""
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_steps=(4,)) as checkpoints:
    for step in range(1, 6):
      checkpoints.save(step, make_state(step), tiny.config())
    checkpoints.wait()
    longer = tiny.config(train=dict(steps=10))
    checkpoints.check(longer)
    with pytest.raises(ValueError, match="train.steps=4 .there 5."):
      checkpoints.check(tiny.config(train=dict(steps=4)))
    checkpoints.rewind(tiny.config())
    assert checkpoints.latest_step() == 5
    checkpoints.rewind(longer)
    restored, step = checkpoints.restore(make_state(0))
    assert step == 4 and equal(restored, make_state(4))
    checkpoints.save(5, make_state(6), longer)
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5", "5.cooldown"]
  assert "5 is of the cooldown to step 5 and kept as 5.cooldown; going on from" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_more_steps_without_such_a_checkpoint_say_which(schedule, tmp_path):
  config = tiny.config(optim=dict(schedule=schedule))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(5, make_state(5), config)
    checkpoints.wait()
    first = {"wsd": 4, "cosine": 2}[schedule]
    with pytest.raises(ValueError, match=rf"train.steps=10 \(there 5\) changes the learning rate from step {first} on, and "
                       rf".* holds no checkpoint of step {first} or before.*train.keep_every"):
      checkpoints.check(tiny.config(optim=dict(schedule=schedule), train=dict(steps=10)))


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(tmp_path, monkeypatch):
  config = tiny.config()
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, make_state(1), config)
  checkpoints.wait()

  async def full(*unused_args, **unused_kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "serialize", full)
  with pytest.raises(OSError, match=r"cannot save to .* \(the checkpoint of step 1 is intact\): no space left on the device; free") as caught:
    checkpoints.save(2, make_state(2), config)
    checkpoints.wait()
  assert "\n" not in str(caught.value)
  monkeypatch.undo()
  with checkpoint.Checkpoints(tmp_path) as reopened:
    assert reopened.latest_step() == 1
    assert equal(reopened.restore(make_state(0))[0], make_state(1))


def test_an_unfinished_save_is_ignored_and_removed(tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1), tiny.config())
  left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
  (left / "state").mkdir(parents=True)
  (left / "state" / "half").write_text("x")
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest_step() == 1
    checkpoints.save(2, make_state(2), tiny.config())
    checkpoints.wait()
    assert equal(checkpoints.restore(make_state(0))[0], make_state(2))
  assert not left.exists()


def damage(directory):
  """Cuts every file of the arrays in half."""
  for path in (directory / "state").rglob("*"):
    if path.is_file():
      os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("read_only", [True, False])
def test_a_damaged_checkpoint_without_one_before_names_its_directory(read_only, tmp_path):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(1), tiny.config())
  damage(tmp_path / "checkpoints" / "1")
  with checkpoint.Checkpoints(tmp_path, read_only=read_only) as checkpoints:
    with pytest.raises(OSError, match="cannot read the checkpoint .*/checkpoints/1: .*remove that directory"):
      checkpoints.restore(make_state(0))
  assert (tmp_path / "checkpoints" / "1").exists()


def partial(directory):
  shutil.rmtree(directory / "state")


def without_meta(directory):
  (directory / "meta" / "metadata").write_text("{")
  shutil.rmtree(directory / "state")


@pytest.mark.parametrize("harm", [damage, partial, without_meta])
def test_training_goes_on_before_damaged_checkpoints(harm, tmp_path, capsys):
  directory = tmp_path / "checkpoints"
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), tiny.config())
  for step in (2, 3):
    harm(directory / str(step))
  with checkpoint.Checkpoints(tmp_path, read_only=True) as reader:
    state, step = reader.restore(make_state(0))
    assert step == 1 and equal(state, make_state(1)) and reader.config() == tiny.config()
    said = capsys.readouterr().err
    assert f"warning: cannot read the checkpoint {directory}/3: " in said and said.count("\n") == 1
    assert said.endswith(f"; reading the one before, {directory}/1\n")
    reader.check(tiny.config())
    with pytest.raises(ValueError, match="another config"):
      reader.check(tiny.config(seed=7))
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    assert equal(checkpoints.restore(make_state(0))[0], make_state(1)) and checkpoints.latest_step() == 1
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if f"{directory}/3 is damaged and kept as 3.damaged" in line and
            line.endswith(f"the one before, {directory}/1")] and len(said) == 2
    checkpoints.save(3, make_state(33), tiny.config())
    checkpoints.wait()
    assert equal(checkpoints.restore(make_state(0))[0], make_state(33))
  assert sorted(path.name for path in directory.iterdir()) == ["1", "2.damaged", "3", "3.damaged"]
  harm(directory / "3")
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert equal(checkpoints.restore(make_state(0))[0], make_state(1))
  assert (directory / "3.damaged-2").is_dir()


def flip(path, bit):
  """Flips one bit of a file, counted from its first byte."""
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A workdir with the checkpoints of steps 1 and 2, which differ in their config, too."""
  workdir = tmp_path_factory.mktemp("two")
  with checkpoint.Checkpoints(workdir, keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(step), tiny.config(train=dict(log_every=step)))
  return workdir


def test_no_flip_of_the_config_is_read_as_another(two):
  path = two / "checkpoints" / "2" / "meta" / "metadata"
  whole = path.read_bytes()
  with checkpoint.Checkpoints(two, read_only=True) as reader:
    for bit in range(0, 8 * len(whole), 307):
      flip(path, bit)
      assert reader.config().train.log_every == 1, f"bit {bit} is not found"
      path.write_bytes(whole)
    assert reader.config().train.log_every == 2


def test_flips_of_any_file_are_found_or_harmless(two, capsys):
  directory = two / "checkpoints" / "2"
  files = sorted(path for path in directory.rglob("*") if path.is_file())
  assert len(files) > 8
  with checkpoint.Checkpoints(two, read_only=True) as reader:
    for path in files:
      whole = path.read_bytes()
      flip(path, 8 * (len(whole) // 2))
      state, step = reader.restore(make_state(0))
      assert equal(state, make_state(step)), path
      assert (step == 2) == (path.parent == directory and path.name in integrity.OF_THE_COMMIT), path
      assert capsys.readouterr().err.count("reading the one before") == (step == 1)
      path.write_bytes(whole)


def test_files_that_come_and_go_are_damage(two, tmp_path):
  shutil.copytree(two, tmp_path / "run")
  directory = tmp_path / "run" / "checkpoints" / "2"
  with checkpoint.Checkpoints(tmp_path / "run", read_only=True) as reader:
    (directory / "state" / "more").write_text("")
    assert reader.restore(make_state(0))[1] == 1
    (directory / "state" / "more").unlink()
    assert reader.restore(make_state(0))[1] == 2
    (directory / "state" / "_sharding").unlink()
    assert reader.restore(make_state(0))[1] == 1


def test_a_checkpoint_without_hashes_is_read_and_told(two, tmp_path, capsys):
  shutil.copytree(two, tmp_path / "run")
  (tmp_path / "run" / "checkpoints" / "2" / integrity.NAME).unlink()
  with checkpoint.Checkpoints(tmp_path / "run", read_only=True) as reader:
    assert reader.restore(make_state(0))[1] == 2
  said = capsys.readouterr().err
  assert "checkpoints/2 was made by a version without hashes" in said and said.count("\n") == 1


def test_a_reader_beside_a_run_reads_the_newest_whole_checkpoint(tmp_path, capsys):
  saved, stop = threading.Event(), threading.Event()

  def save():
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
      for step in itertools.count(1):
        checkpoints.save(step, make_state(step), tiny.config())
        checkpoints.wait()
        saved.set()
        if stop.is_set():
          break

  run = threading.Thread(target=save)
  run.start()
  saved.wait()
  steps = []
  try:
    with checkpoint.Checkpoints(tmp_path, read_only=True) as reader:
      for _ in range(15):
        assert reader.config() == tiny.config()
        state, step = reader.restore(make_state(0))
        assert equal(state, make_state(step))
        steps.append(step)
  finally:
    stop.set()
    run.join()
  assert steps == sorted(steps) and steps[-1] > steps[0]
  assert capsys.readouterr().err == ""


def test_a_reader_that_is_always_late_says_so(two, monkeypatch):
  reader = checkpoint.Checkpoints(two, read_only=True)
  newest = itertools.count(2)
  monkeypatch.setattr(reader, "_steps", lambda: [next(newest)])
  with pytest.raises(OSError, match="replaced each of 20 checkpoints while it was read; raise its train.keep_check"):
    reader.restore(make_state(0))


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"special_ids": [1], "add_bos": true}', "[" * 100_000,
                                     '{"special_ids": {"eos": ["2"]}, "add_bos": true}',
                                     '{"special_ids": {"eos": 2}, "add_bos": true}',
                                     '{"special_ids": {}, "add_bos": true, "opening": [1]}',
                                     '{"special_ids": {}, "add_bos": true, "opening": "12", "stops": [2]}',
                                     '{"special_ids": {}, "add_bos": true, "context": "48"}'])
def test_damaged_facts_about_the_source_are_named(content, tmp_path):
  (tmp_path / "pretrained.json").write_text(content)
  with pytest.raises(ValueError, match=f"{tmp_path}/pretrained.json is damaged"):
    checkpoint.load_pretrained(tmp_path)


@pytest.mark.parametrize("add_bos,opening", [("true", [5]), ("false", [])])
def test_older_facts_about_the_source_say_how_a_text_opens_and_ends(add_bos, opening, tmp_path):
  (tmp_path / "pretrained.json").write_text(
      f'{{"special_ids": {{"bos": [5], "eos": [7, 8]}}, "add_bos": {add_bos}}}')
  about = checkpoint.load_pretrained(tmp_path)
  assert about["opening"] == opening and about["stops"] == [7, 8]


def test_chosen_steps_are_kept_for_ever(tmp_path):
  with checkpoint.Checkpoints(tmp_path, keep=1, keep_every=3) as checkpoints:
    for step in range(1, 8):
      checkpoints.save(step, make_state(step), tiny.config())
  assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "7"]


def test_an_empty_workdir_has_no_checkpoint_and_is_not_created(tmp_path):
  with checkpoint.Checkpoints(tmp_path / "none", read_only=True) as checkpoints:
    assert checkpoints.latest_step() is None
  assert not (tmp_path / "none").exists()


def test_the_config_survives_json():
  config = tiny.config()
  fields = json.loads(json.dumps(checkpoint.config_lib.to_dict(config)))
  assert checkpoint.config_lib.from_dict(fields) == config
