"""A run on a task learns it, is recorded, goes on bitwise, and is judged by difficulty."""

import dataclasses
import json
import sys
from unittest import mock

from absl import flags
from absl.testing import flagsaver
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mor import checkpoint
from mor import main
from mor import report
from mor import run as run_lib
from mor import sharding
from mor.conversion import command
from mor.data import text
from mor.model import transformer
from mor.train import evaluate
from mor.train import loop
from mor.train import metrics
from mor.train import step as step_lib
from mor.train import task_figures
from tests.helpers import tiny

LEVELS, STEPS = 5, 3


def make_config(**overrides):
  """A layer that answers one hop, unpacked or not, in a few steps."""
  return tiny.config(
      dict(model=dict(tiny.VANILLA, num_layers=1, d_model=32, head_dim=8)),
      dict(data=dict(source="task:khop", seq_len=21, batch_size=32, task=dict(size=4, hardest=1, questions=16)),
           optim=dict(learning_rate=1e-2, schedule="constant"),
           train=dict(steps=120, eval_every=120, checkpoint_every=60, log_every=20)), overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run of 120 steps, without a report, and its config."""
  workdir, config = tmp_path_factory.mktemp("task") / "run", make_config()
  loop.train(config, workdir)
  return workdir, config


@pytest.fixture(scope="module")
def counted():
  """Random answers and depths of 6 rows, with padding, and their figures."""
  rng = np.random.default_rng(0)
  segment_BT = np.sort(rng.integers(1, 5, (6, 40)), axis=1) * (np.arange(40) < rng.integers(20, 41, (6, 1)))
  difficulty_BT = rng.integers(0, LEVELS, (6, 40)) * (segment_BT > 0)
  batch = dict(segment_BT=segment_BT, difficulty_BT=difficulty_BT, target_BT=rng.integers(0, 2, (6, 40)))
  likeliest_BT = np.where(rng.random((6, 40)) < 0.8, batch["target_BT"], 1 - batch["target_BT"])
  depth_BT = np.clip(difficulty_BT + rng.integers(-1, 2, (6, 40)), 1, STEPS) * (segment_BT > 0)
  keep_RBT = np.arange(STEPS)[:, None, None] < depth_BT
  sums = task_figures.count(LEVELS, jnp.asarray(likeliest_BT), jnp.asarray(keep_RBT), jax.tree.map(jnp.asarray, batch))
  config = tiny.config(model=dict(num_recursions=STEPS)).model
  found = task_figures.figures(config, "causal", {name: np.asarray(value, np.float64) for name, value in sums.items()})
  return batch, likeliest_BT == batch["target_BT"], depth_BT, found


def test_accuracy_and_depth_by_difficulty(counted):
  batch, right_BT, depth_BT, found = counted
  for level in range(1, LEVELS):
    asked_BT = batch["difficulty_BT"] == level
    assert found[f"accuracy_causal_{level}"] == pytest.approx(right_BT[asked_BT].mean())
    assert found[f"depth_causal_{level}"] == pytest.approx(depth_BT[asked_BT].mean())
  others_BT = (batch["difficulty_BT"] == 0) & (batch["segment_BT"] > 0)
  assert found["depth_causal_0"] == pytest.approx(depth_BT[others_BT].mean()), "padding has no depth"
  assert found["accuracy_causal"] == pytest.approx(right_BT[batch["difficulty_BT"] > 0].mean())


def test_a_problem_is_solved_if_all_its_answers_are_right(counted):
  batch, right_BT, _, found = counted
  solved = {level: [] for level in range(1, LEVELS)}
  for row in range(6):
    for segment in set(batch["segment_BT"][row]) - {0}:
      inside_T = batch["segment_BT"][row] == segment
      difficulty = batch["difficulty_BT"][row][inside_T]
      if difficulty.any():
        solved[difficulty.max()].append(right_BT[row][inside_T][difficulty > 0].all())
  for level, each in solved.items():
    assert found.get(f"solved_causal_{level}") == (pytest.approx(np.mean(each)) if each else None)
  assert 0 < found["solved_causal"] == pytest.approx(np.mean(sum(solved.values(), [])))


def test_correlation_is_spearmans(counted):
  batch, _, depth_BT, found = counted
  asked_BT = batch["difficulty_BT"] > 0
  expected = scipy.stats.spearmanr(batch["difficulty_BT"][asked_BT], depth_BT[asked_BT]).statistic
  assert 0.3 < expected < 0.95 and found["correlation_causal"] == pytest.approx(expected)
  assert task_figures.rank_correlation(np.array([[3.0, 0.0], [2.0, 0.0]])) is None, "a depth that never varies has no rank"


def test_figures_of_a_model_are_those_of_its_logits(trained):
  """From whole logits, with the untrained model, which is wrong often enough."""
  _, config = trained
  mesh, corpus = sharding.make_mesh(config.mesh), text.load(config.data, config.model.vocab_size)
  state = step_lib.init_state(config, mesh)
  batches = list(corpus.validation.in_order(32, 40))

  @jax.jit
  def answer(params, tokens_BT, segment_BT):
    out = transformer.Transformer(config.model).apply({"params": params}, tokens_BT, segment_BT, routing="decide")
    return jnp.argmax(transformer.unembed(params, out.hidden_BTD), axis=-1)

  right = total = 0
  for batch in batches:
    found_BT = np.asarray(answer(state.params, batch["tokens_BT"], batch["segment_BT"]))
    right += (found_BT == batch["target_BT"])[batch["loss_mask_BT"]].sum()
    total += batch["loss_mask_BT"].sum()
  found = evaluate.make(config, mesh, corpus.tokenizer.num_bytes_V)(state.params, state.balance, batches)
  assert found["accuracy_causal"] == found["accuracy_causal_1"] == pytest.approx(right / total)
  assert found["targets"] == total == 40 * 16, "answers alone are targets"
  assert not [name for name in found if "bpb" in name or "depth" in name], "a task is no text; one step is no depth"


def test_a_small_model_learns(trained):
  workdir, _ = trained
  rows = metrics.read(workdir)
  losses = [row["train/nll"] for row in rows if "train/nll" in row]
  held_out, = [row for row in rows if "eval/nll_causal" in row]
  assert losses[0] > 0.5 and losses[-1] < 0.1
  assert held_out["eval/nll_causal"] < 0.1 and held_out["eval/accuracy_causal"] > 0.98, "on rows that it never saw"


def test_eval_prints_figures_by_difficulty(trained, capsys):
  workdir, _ = trained
  argv = ["main", f"--workdir={workdir}", "--mode=eval"]
  with flagsaver.flagsaver(), mock.patch.object(sys, "argv", argv):
    assert main._main(main._parse(argv)) == 0
  for name in [name for name in flags.FLAGS if name.startswith("config.")]:
    delattr(flags.FLAGS, name)
  printed = json.loads(capsys.readouterr().out)
  assert printed["step"] == 120
  assert printed["accuracy"] == {"all": pytest.approx(1, abs=0.02), "1": pytest.approx(1, abs=0.02)}
  assert set(printed["solved"]) == {"all", "1"}
  assert not [name for name in printed if "bpb" in name or name == "beyond"], "packed, no more hops can be asked"


def test_harder_questions_are_asked_at_more_steps():
  config = make_config(model=dict(sharing="cycle", num_layers=2, num_recursions=2), data=dict(
      seq_len=58, batch_size=4, task=dict(size=6, hardest=2, questions=9, packed=False)))
  mesh, corpus = sharding.make_mesh(config.mesh), text.load(config.data, config.model.vocab_size)
  printed = loop.evaluate_corpus(step_lib.at_recursions(config, 5), mesh, step_lib.init_state(config, mesh), corpus)
  assert list(printed["accuracy"]) == ["all", "1", "2"] and list(printed["beyond"]["accuracy"]) == ["all", "3", "4"]
  assert printed["beyond"]["depth"] == {"0": 5, "3": 5, "4": 5}, "of a model that was made for 2"


def test_the_record_names_the_task_and_its_settings(trained):
  workdir, config = trained
  record = run_lib.read(workdir)
  settings = record.data[-1].identity.settings
  assert record.tokenizer.name == "task:khop" and settings["source"] == "task:khop" and settings["task.questions"] == 16
  assert run_lib.load_tokenizer(workdir, config.data).decode([0, 4]) == "a a>a"
  run_lib.load_corpus(workdir, config)


@pytest.mark.parametrize("change, message", [
    (dict(task=dict(questions=15)), "data.task.questions=15 .there 16."),
    (dict(task=dict(size=5)), "data.source='task:khop' .identity .* is not the tokenizer that .* was trained with"),
    (dict(source="sotu", task=dict(size=0, hardest=0, questions=0)), "data.tokenizer='bpe:4096' .not trained. is not"),
    (dict(shuffle_seed=3), "data.shuffle_seed=3 .there 0."),
], ids=str)
def test_another_task_is_refused(trained, change, message):
  workdir, _ = trained
  with pytest.raises(ValueError, match=message):
    run_lib.load_corpus(workdir, make_config(data=change))


def test_a_run_is_converted_for_the_same_task_only(trained, tmp_path):
  workdir, config = trained
  command.convert(config, f"mor:{workdir}", tmp_path / "same")
  record = run_lib.read(tmp_path / "same")
  assert record.tokenizer == run_lib.read(workdir).tokenizer and not record.data
  run_lib.load_corpus(tmp_path / "same", config)
  with pytest.raises(ValueError, match="37 symbols of its own, and the source reads others; convert a run of the same"):
    command.convert(make_config(data=dict(task=dict(size=5, questions=3))), f"mor:{workdir}", tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_a_run_goes_on_with_other_questions_by_consent(trained):
  workdir, _ = trained
  config = make_config(data=dict(task=dict(questions=15)))
  with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
    with pytest.raises(ValueError, match="data.task.questions"):
      checkpoints.check(config, run_lib.free_fields(workdir))
    checkpoints.check(config, run_lib.free_fields(workdir, accept_new_data=True))
  corpus = run_lib.load_corpus(workdir, config, accept_new_data=True)
  assert corpus.identity.settings["task.questions"] == 15


@pytest.mark.slow
def test_a_run_resumes_bitwise_and_reports(trained, tmp_path):
  workdir, config = trained
  loop.train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=60)), tmp_path)
  outcome = loop.train(config, tmp_path, report.finish)
  states = []
  for directory in (workdir, tmp_path):
    with checkpoint.Checkpoints(directory, read_only=True) as checkpoints:
      states.append(loop.restore_or_init(config, sharding.make_mesh(config.mesh), checkpoints)[0].params)
  jax.tree.map(np.testing.assert_array_equal, *states)
  assert "answers that are right" in outcome.text and "a>" in outcome.text and "bits per byte" not in outcome.text
  assert "answers right, causal" in (tmp_path / "report.html").read_text()
