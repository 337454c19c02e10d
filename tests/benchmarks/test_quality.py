"""Scores of generated texts are those worked out by hand."""

import gzip
import json

import pytest

from benchmarks import quality


def write(path, lines):
  with gzip.open(path, "wt", encoding="utf-8") as stream:
    stream.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def folder(tmp_path):
  """Nine questions and five passages; each tells its number."""
  write(tmp_path / "squad_val_1k.jsonl.gz", [
      dict(id=str(i), query=f"Title: T\nBackground: {i} é\nQuestion: Which?\nAnswer:", answers=[f"answer {i}", str(i)])
      for i in range(9)])
  write(tmp_path / "lambada_openai_test.jsonl.gz", [
      dict(ctx=f"passage {i}, they", target=f" word{i}") for i in range(5)])
  return tmp_path


@pytest.mark.parametrize("text, answers, f1, exact", [
    (" The Levi's  Stadium.", ["Levi's Stadium"], 1, 1),  # article, case, spaces, punctuation
    ("Levis stadium", ["Levi's Stadium"], 1, 1),  # punctuation joins what it stood between
    ("Levi s stadium", ["Levi's Stadium"], 2 * 1 / (3 + 2), 0),
    ("in 23 years", ["23 years"], 2 * 2 / (3 + 2), 0),  # precision 2/3, recall 1
    ("in 23 years", ["23", "23 years", "years ago"], 0.8, 0),  # the best answer counts
    ("23", ["23 years", "23"], 1, 1),
    ("the cat the cat", ["cat"], 2 * 1 / (2 + 1), 0),  # a word counts as often as both have it
    ("cat cat dog", ["dog cat cat cat"], 2 * 3 / (3 + 4), 0),  # order does not
    ("theatre", ["atre"], 0, 0),  # articles are whole words
    ("red\u2013the\u2013blue", ["red\u2013 \u2013blue"], 1, 1),  # an article leaves a space
    ("outdoors", ["indoors"], 0, 0),
    ("", ["outdoors"], 0, 0),
    ("A", ["the"], 1, 1),  # nothing is left of either
    ("b", ["a"], 0, 0),
])
def test_squad_metrics(text, answers, f1, exact):
  assert quality.f1(text, answers) == pytest.approx(f1)
  assert quality.exact(text, answers) == exact


@pytest.mark.parametrize("text, right", [
    (" signs", 1), (" signs.", 1), ("signs of it", 1), ("\nsigns", 1), (" signs' end", 1), (" signs\u201d", 1),
    (" signsx", 0), (" signs1", 0), (" signsé", 0), (" sign", 0), (" Signs", 0), (" the signs", 0),
    (" those signs", 0), ("", 0),
])
def test_last_word(text, right):
  assert quality.last_word(text, "signs") == right


def test_scores_are_means_of_a_first_line():
  items = [quality.Item("squad", "?", ("23 years", "23")), quality.Item("squad", "?", ("outdoors",)),
           quality.Item("squad", "?", ("red",))]
  texts = [" 23\nQuestion: 23 years", " outdoors maybe\n", "\nred"]
  assert quality.score(items, texts) == {
      "num": 3, "f1": pytest.approx((1 + 2 / 3 + 0) / 3), "exact": pytest.approx(1 / 3)}
  items = [quality.Item("lambada", "?", (word,)) for word in ("signs", "Shane", "fire", "you")]
  assert quality.score(items, [" signs, and", " shane", " fire\nfire", " the"]) == {"num": 4, "last_word": 0.5}


@pytest.mark.parametrize("items, texts, message", [
    ([], [], "0 tasks"),
    ([quality.Item("squad", "", ("a",)), quality.Item("lambada", "", ("a",))], ["", ""], "2 tasks .lambada, squad"),
    ([quality.Item("squad", "", ("a",))], ["", ""], "2 texts for 1 items"),
])
def test_what_cannot_be_scored(items, texts, message):
  with pytest.raises(ValueError, match=message):
    quality.score(items, texts)


def test_squad_items(folder):
  zero = quality.squad(folder, 9, seed=3, shots=0)
  assert sorted(item.answers for item in zero) == [(f"answer {i}", str(i)) for i in range(9)]
  for item in zero:
    prompt = f"Title: T\nBackground: {item.answers[1]} é\nQuestion: Which?\nAnswer:"
    assert item == quality.Item("squad", prompt, item.answers)
  one = quality.squad(folder, 8, seed=3)
  shown = zero[-1]  # not among the items
  assert [item.answers for item in one] == [item.answers for item in zero[:-1]]
  assert all(item.prompt == f"{shown.prompt} {shown.answers[0]}\n\n{plain.prompt}" for item, plain in zip(one, zero))
  assert quality.squad(folder, 4, seed=3) == one[:4], "fewer items are the first of more"
  assert quality.squad(folder, 8, seed=4) != one


def test_lambada_items(folder):
  items = quality.lambada(folder, 5, seed=0)
  assert sorted((item.prompt, item.answers) for item in items) == [
      (f"passage {i}, they", (f"word{i}",)) for i in range(5)]
  assert quality.score(items, [f" {item.answers[0]}." for item in items]) == {"num": 5, "last_word": 1}
  assert quality.lambada(folder, 3, seed=0) == items[:3]


def test_what_cannot_be_read(folder, tmp_path):
  with pytest.raises(ValueError, match="9 items and 1 shots of the 9 lines .*; use at most 8 items"):
    quality.squad(folder, 9, seed=0)
  with pytest.raises(ValueError, match="num=0"):
    quality.lambada(folder, 0, seed=0)
  with pytest.raises(ValueError, match="no such file; name the folder"):
    quality.lambada(folder / "other", 1, seed=0)
  write(tmp_path / "squad_val_1k.jsonl.gz", [dict(query="?", answers=["a"]), dict(query="?", answers=[])])
  with pytest.raises(ValueError, match="line 2 has no 'answers'"):
    quality.squad(tmp_path, 1, seed=0)


@pytest.mark.parametrize("tokens, reference, equal, prefix", [
    ([[1, 2, 3, 4]], [[1, 2, 3, 4]], 1, 1),
    ([[1, 9, 3, 4]], [[1, 2, 3, 4]], 3 / 4, 1 / 4),
    ([[9, 2, 3, 4]], [[1, 2, 3, 4]], 3 / 4, 0),
    ([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]], 5 / 6, 4 / 6),  # of all tokens, not a mean of means
    ([[1, 2]], [[1, 2, 3, 4]], 2 / 4, 2 / 4),  # one ends earlier
    ([[1, 2, 3, 4]], [[1, 9, 3]], 2 / 4, 1 / 4),
    ([[], [7]], [[1], [7]], 1 / 2, 1 / 2),
])
def test_agreement(tokens, reference, equal, prefix):
  assert quality.agreement(tokens, reference) == {"equal": pytest.approx(equal), "prefix": pytest.approx(prefix)}
  assert quality.agreement(reference, tokens) == quality.agreement(tokens, reference)


def test_what_cannot_be_compared():
  with pytest.raises(ValueError, match="1 texts and 2"):
    quality.agreement([[1]], [[1], [2]])
  with pytest.raises(ValueError, match="no tokens"):
    quality.agreement([[], []], [[], []])
