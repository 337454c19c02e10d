"""A study: its arithmetic, its forks, its resumption and its report."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from mor import checkpoint
from mor import config as config_lib
from mor import costs
from mor import experiments
from mor import report
from mor import sharding
from mor.study import plan as study_plan
from mor.study import report as study_report
from mor.study import run as study_lib
from mor.train import loop
from mor.train import optim
from tests.helpers import tiny

VANILLA = dict(name="vanilla", label="vanilla", overrides=dict(model=tiny.VANILLA))
MOR = dict(name="mor", label="MoR", overrides=dict(model=dict(sharing="middle_cycle")))


def make_study(**fields):
  return study_plan.from_dict(dict(
      reference="vanilla", members=[VANILLA, MOR], seeds=(0,), final_rows=3, texts={}, text_rows=2,
      blimp="no/such/file", blimp_pairs=2) | fields)


def train_config(steps: int, **optim_fields) -> config_lib.Config:
  return tiny.config(train=dict(steps=steps), optim=dict(schedule="wsd", cooldown_fraction=0.25) | optim_fields)


def test_every_member_gets_the_same_forward_flops():
  base = train_config(400)
  runs = study_plan.make(base, make_study())
  budget = 400 * 4 * 12 * costs.forward_flops_per_token(runs[0].full.model, 12)
  assert runs[0].full.train.steps == 400 < runs[1].full.train.steps
  for run in runs:
    spent = run.full.train.steps * 4 * 12 * costs.forward_flops_per_token(run.full.model, 12)
    assert abs(spent / budget - 1) < 0.5 / 400  # half a step


def test_the_fork_cools_down_to_the_shortest_members_tokens():
  runs = study_plan.make(train_config(400), make_study())
  assert runs[0].short is None
  full, short, fork = runs[1].full, runs[1].short, runs[1].fork
  assert short.train.steps == 400 and full.train.checkpoint_every == fork
  assert fork == 300 + 1  # the first step of a linear cooldown has the peak rate still
  rate, longer = optim.learning_rate(short), optim.learning_rate(full)
  assert all(float(rate(step)) == float(longer(step)) for step in (0, 1, 5, 299, 300))
  assert float(rate(301)) < float(longer(301)) == pytest.approx(1e-2)
  assert float(rate(400)) == 0 and float(rate(399)) == pytest.approx(1e-2 / 100)


@pytest.mark.parametrize("schedule, expected", [("constant", 40), ("cosine", 3)])
def test_other_schedules_share_what_they_have_in_common(schedule, expected):
  a, b = train_config(40, schedule=schedule), train_config(55, schedule=schedule)
  assert study_plan.shared_steps(a, b) == expected


@pytest.mark.parametrize("fields, what", [
    (dict(reference="no"), "reference='no'"), (dict(seeds=()), "seeds"), (dict(seeds=(1, 1)), "seeds"),
    (dict(members=[VANILLA, VANILLA]), "one name"), (dict(blimp_pairs=0), "blimp_pairs=0"), (dict(oops=1), "oops")])
def test_a_wrong_study_is_refused(fields, what):
  with pytest.raises(ValueError, match=what) as caught:
    make_study(**fields)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", [dict(data=dict(seq_len=9)), dict(train=dict(steps=7)), dict(model=dict(oops=1))])
def test_a_wrong_member_is_refused(overrides):
  members = [VANILLA, MOR | dict(overrides=overrides)]
  with pytest.raises(ValueError):
    study_plan.make(train_config(9), make_study(members=members))


def test_a_config_without_a_study_is_named():
  with pytest.raises(ValueError, match="get_study"):
    study_plan.read(experiments.find("base"))


@pytest.mark.parametrize("name", ["study_cpu", "study_gpu"])
def test_study_files(name):
  base = config_lib.from_config_dict(experiments.read(name))
  study = study_plan.read(experiments.find(name))
  runs = {run.member.name: run for run in study_plan.make(base, study)}
  assert len(runs) == 8
  body = {name: costs.parameter_count(run.full.model)[1] for name, run in runs.items()}
  assert body["vanilla_small"] == body["recursive_r3"]
  assert 0 < body["mor_expert_r3"] - body["vanilla_small"] < 0.002 * body["vanilla_small"]  # the routers
  assert {run.full.model.num_layers for run in runs.values()} == {base.model.num_layers, runs["vanilla_small"].full.model.num_layers}
  assert runs["mor_shared_r3"].full.model.kv_plan == "shared"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A study of two tiny members, run once."""
  directory = tmp_path_factory.mktemp("study")
  base = tiny.config(
      tiny.BYTES, model=dict(num_layers=4, num_recursions=2), train=dict(steps=6, eval_every=2, sample_prompt=""),
      data=dict(source=tiny.write_text(directory), cache_dir=str(directory / "cache")),
      optim=dict(cooldown_fraction=0.5))
  (directory / "other.txt").write_text("a union of plain old words")
  pairs = [dict(good="the state", bad="state the", uid="u"), dict(good="we make", bad="make we", uid="v")]
  (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  study = make_study(texts={"wikitext_2": str(directory / "other.txt"), "gone": "no/such/file"},
                     blimp=str(directory / "pairs.jsonl"))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, "finish", lambda *unused: ({}, ""))  # a run's own report, tested elsewhere
    assert study_lib.run(base, study, directory / "work", "the command")
  return base, study, directory / "work"


def test_the_result_says_what_was_done(finished):
  base, study, workdir = finished
  made = json.loads((workdir / "study.json").read_text())
  assert made["complete"] and made["command"] == "the command" and made["missing"] == {"gone": "no/such/file"}
  assert made["device"] and made["compute_dtype"] == "float32" and made["config"] == json.loads(
      json.dumps(config_lib.to_dict(base)))
  vanilla, mor = made["results"]
  assert vanilla["equal_flops"] == vanilla["equal_tokens"] and "nll_oracle" not in vanilla["equal_flops"]["figures"]["val"]
  assert mor["equal_flops"]["steps"] > mor["equal_tokens"]["steps"] == 6
  assert mor["equal_tokens"]["tokens"] == vanilla["equal_tokens"]["tokens"] == 6 * 4 * 12
  for result in made["results"]:
    for end in ("equal_flops", "equal_tokens"):
      figures = result[end]["figures"]
      assert figures["val"]["targets"] == 36 and figures["wikitext_2"]["bytes"] == 24
      assert np.isfinite(figures["val"]["nll_causal"]) and figures["blimp"]["pairs"] == 2
    assert [point["step"] for point in result["curve"]][:3] == [2, 4, 6]
  assert mor["short_curve"][-1]["step"] == 6
  assert sorted(p.name for p in (workdir / "mor-seed0").iterdir()) == ["full", "short"]


def test_the_fork_is_the_run_of_its_length(finished, tmp_path):
  base, study, workdir = finished
  one = study_plan.make(base, study)[1]
  assert 0 < one.fork < 6
  loop.train(one.short, tmp_path)
  states = []
  for directory in (tmp_path, workdir / "mor-seed0/short"):
    with checkpoint.Checkpoints(directory, read_only=True) as checkpoints:
      states.append(loop.restore_or_init(one.short, sharding.make_mesh(base.mesh), checkpoints)[0])
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_finished_member_is_skipped(finished, monkeypatch):
  base, study, workdir = finished
  before = (workdir / "study.json").read_text()
  monkeypatch.setattr(loop, "train", None)  # would fail if called
  assert study_lib.run(base, study, workdir, "the command")
  after = (workdir / "study.json").read_text()
  assert json.loads(after)["results"] == json.loads(before)["results"]


def test_a_stopped_member_goes_on(finished, monkeypatch, tmp_path):
  base, study, workdir = finished
  (tmp_path / "results").mkdir()
  kept = workdir / "results/vanilla-seed0.json"
  (tmp_path / "results" / kept.name).write_text(kept.read_text())
  asked = []

  def stopped(config, directory, *unused):
    asked.append(pathlib.Path(directory).relative_to(tmp_path).as_posix())
    return loop.Outcome(1, None, "stopped")

  monkeypatch.setattr(loop, "train", stopped)
  assert not study_lib.run(base, study, tmp_path, "the command")
  assert asked == ["mor-seed0/full"]
  made = tmp_path / "study.json"
  assert not json.loads(made.read_text())["complete"] and "not complete" in made.with_suffix(".md").read_text()


def test_the_result_of_another_study_is_refused(finished):
  base, study, workdir = finished
  longer = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=9))
  with pytest.raises(ValueError, match="another study"):
    study_lib.run(longer, study, workdir, "the command")


def test_tables_and_figure_come_from_the_json_alone(finished, tmp_path):
  workdir = finished[2]
  copy = tmp_path / "copy.json"
  copy.write_text((workdir / "study.json").read_text())
  assert study_report.main(["--json", str(copy)]) == 0
  assert copy.with_suffix(".md").read_text() == (workdir / "study.md").read_text()
  assert copy.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_tables_state_gaps_spread_and_what_is_missing(finished):
  made = json.loads((finished[2] / "study.json").read_text())
  again = json.loads(json.dumps(made["results"][1])) | {"seed": 1}
  val = again["equal_flops"]["figures"]["val"]
  again["equal_flops"]["figures"]["val"] = val | {"nll_causal": val["nll_causal"] + 2, "nll_oracle": val["nll_oracle"]}
  del made["results"][1]["equal_tokens"]["figures"]["blimp"], again["equal_tokens"]["figures"]["blimp"]
  text = study_report.tables(made | {"results": [*made["results"], again]})
  rows = [line for line in text.splitlines() if line.startswith("| MoR")]
  assert f"{val['nll_causal'] + 1:.4f} ± 1.4142" in rows[0]
  gap = val["nll_causal"] - val["nll_oracle"]
  assert f"{gap + 1:+.4f} ± 1.4142" in rows[0]
  assert rows[1].split("|")[-2].strip() == "–"
  assert "gone (no/such/file is not there)" in text


def test_a_study_of_a_task_has_tables_by_difficulty(finished):
  made = json.loads((finished[2] / "study.json").read_text())
  assert "by difficulty" not in study_report.tables(made)
  figures = [result["equal_tokens"]["figures"] for result in made["results"]]
  for index, one in enumerate(figures):
    one["val"] |= {"accuracy_causal": 0.5, "accuracy_causal_1": 0.875 - index / 4, "accuracy_causal_10": 0.25}
    one["beyond"] = {"accuracy_causal_11": 0.125}
  figures[1]["val"] |= {"depth_causal_0": 1.0, "depth_causal_1": 1.25, "depth_causal_10": 2.5, "correlation_causal": 0.5}
  lines = study_report.tables(made).splitlines()
  at = lines.index("**Equal tokens: answers that are right, %, by difficulty**")
  assert lines[at + 2:at + 6] == ["| model | 1 | 10 | 11 (beyond) |", "| --- | ---: | ---: | ---: |",
                                  "| vanilla | 87.5 | 25.0 | 12.5 |", "| MoR | 62.5 | 25.0 | 12.5 |"]
  at = lines.index("**Equal tokens: mean recursion steps of the tokens that answer, by difficulty**")
  assert lines[at + 2] == "| model | 1 | 10 | correlation |" and lines[at + 5] == "| MoR | 1.25 | 2.50 | +0.50 |"


@pytest.mark.slow
def test_a_task_is_studied(tmp_path):
  base = tiny.config(
      model=dict(num_layers=4, num_recursions=2), train=dict(steps=4), optim=dict(schedule="constant"),
      data=dict(source="task:khop", seq_len=34, task=dict(size=5, hardest=2, questions=4, packed=False)))
  study = make_study(blimp="", final_rows=0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, "finish", lambda *unused: ({}, ""))
    assert study_lib.run(base, study, tmp_path, "the command")
  made = json.loads((tmp_path / "study.json").read_text())
  assert not made["missing"]
  for result in made["results"]:
    figures = result["equal_tokens"]["figures"]
    assert set(figures) == {"val", "beyond"} and "accuracy_causal_2" in figures["val"]
    assert "accuracy_causal_4" in figures["beyond"] and "accuracy_causal_2" not in figures["beyond"]
  assert "| 1 | 2 | 3 (beyond) | 4 (beyond) |" in (tmp_path / "study.md").read_text()


def test_a_damaged_json_is_one_line(tmp_path, capsys):
  (tmp_path / "study.json").write_text("{")
  assert study_report.main(["--json", str(tmp_path / "study.json")]) == 2
  assert capsys.readouterr().err.count("\n") == 1
