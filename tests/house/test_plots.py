"""The report is whole, stands alone, and is the same for the same run."""

import html.parser
import json

import pytest

from mor import plots
from mor import report
from tests.helpers import tiny

ROWS = [{"step": s, "train/nll": 6 - s / 10, "train/load_1": 1.0, "train/load_2": 0.66} for s in range(1, 9)] + [
    {"step": s, "eval/nll_causal": 5.5, "eval/nll_oracle": 5.25, "eval/load_causal_2": 0.5} for s in (4, 8)]
PARTS, DEPTHS = ["One ", "<two> & $3$\n", "x" * 300, "é€"], [1, 2, 3, 0]
SUMMARY = dict(step=8, bpb_causal=1.9125, bpb_oracle=1.85, bpb_xz=1.84, params=17980)


class Checker(html.parser.HTMLParser):
  """Collects text and addresses; fails on tags that do not match."""

  def __init__(self):
    super().__init__()
    self.open, self.text, self.links = [], [], []

  def handle_starttag(self, tag, attrs):
    if tag not in ("meta", "link", "img", "br"):
      self.open.append(tag)
    self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("report")
  path = report.write(workdir, tiny.config(), ROWS, SUMMARY, PARTS, DEPTHS)
  checker = Checker()
  checker.feed(path.read_text())
  assert not checker.open
  return workdir, checker


def test_page_shows_figures_tokens_and_every_field(page):
  _, checker = page
  text = "".join(checker.text)
  for shown in ("1.913", "bits per byte, causal", "17,980", "<two> & $3$", "Mixture-of-Recursions, R=3 expert_choice",
                "model.router.sampling_coef", "optim.learning_rate"):
    assert shown in text
  assert text.count("agreement") == 0  # a figure that a run does not have has no card


def test_page_needs_no_other_file(page):
  _, checker = page
  assert all(link.startswith(("data:", "#")) for link in checker.links)


def test_files(page):
  workdir, _ = page
  assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")
  assert json.loads((workdir / "summary.json").read_text()) == SUMMARY


def test_a_vanilla_run_without_evaluation_has_a_report(tmp_path):
  config = tiny.config(model=tiny.VANILLA)
  path = report.write(tmp_path, config, [{"step": 1, "train/nll": 4.0}], dict(step=1), ["a"], [1])
  assert "<h1>Transformer, D=20" in path.read_text()
  assert "Recursive Transformer, R=3" in report.describe(tiny.config(model=dict(router=tiny.FIXED)).model)


def test_tokens_wrap_whole_and_stop_at_the_last_line():
  runs = plots._layout(["a" * 100, "b" * 30, "c" * 300, *["d" * 90] * 50], [1, 2, 3, *[1] * 50])
  assert runs[:2] == [(0, 0, "a" * 100, 1), (1, 0, "b" * 30, 2)]
  assert [len(text) for _, _, text, depth in runs if depth == 3] == [118, 118, 64]
  assert max(line for line, _, _, _ in runs) == 11


def test_bars_have_a_panel_for_each_title():
  one, two = plots.bars({"speed": {"a": 3.0}}), plots.bars({"speed": {"a": 3.0}, "depth": {"a": 1.5, "b": 2.0}})
  assert one.startswith(b"\x89PNG") and two.startswith(b"\x89PNG") and one != two
