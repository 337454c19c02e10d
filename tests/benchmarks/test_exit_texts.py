"""Texts that exits are trained on: which prompts are made of books, and which documents of their answers."""

import json

import pytest

from benchmarks import exit_texts

WORDS = [f"w{i}" for i in range(80)]
BOOK = " ".join(WORDS) + "\n\nToo short.\n\n" + " ".join(reversed(WORDS))


def _read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_of_books_and_documents_of_answers(tmp_path):
  books = tmp_path / "books.jsonl"
  books.write_text("".join(json.dumps({"text": f"{book} {BOOK}"}) + "\n" for book in range(4)))
  exit_texts.main([f"--books={tmp_path}/books*.jsonl", f"--out={tmp_path}/out", "--num=6", "--parts=2", "--most=3",
                   "--characters=50", "--num_tokens=9"])
  assert [row["text"] for row in _read(tmp_path / "out/texts-books.jsonl")] == [f"{i} {BOOK}"[:50] for i in range(3)]
  parts = [_read(tmp_path / f"out/openings-{part}.jsonl") for part in range(2)]
  prompts = parts[0] + parts[1]
  assert [len(part) for part in parts] == [3, 3] and {p["max_tokens"] for p in prompts} == {9}
  assert len({p["seed"] for p in prompts}) == len({p["prompt"] for p in prompts}) == 6
  for prompt in prompts:  # whole words from the start of a long paragraph of one of three books
    assert any(f"{start} {BOOK}".startswith(prompt["prompt"]) for start in range(3)) or (
        " ".join(reversed(WORDS)).startswith(prompt["prompt"]))
    assert 6 <= len(prompt["prompt"].split()) <= 30 and prompt["prompt"].split()[-1] in WORDS
  for part, rows in enumerate(parts):
    answers = [{"prompt": row["prompt"], "text": f" answer {row['seed']}"} for row in rows]
    (tmp_path / f"out/answers-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
  exit_texts.main([f"--answers={tmp_path}/out", f"--out={tmp_path}/out"])
  assert [row["text"] for row in _read(tmp_path / "out/texts-answers.jsonl")] == [
      f"{row['prompt']} answer {row['seed']}" for row in prompts]


def test_greedy_answers_are_two_thirds():
  prompts = exit_texts.openings([BOOK] * 300, num=600, num_tokens=8, seed=1)
  greedy = sum(p["temperature"] == 0.0 for p in prompts)
  assert {p["temperature"] for p in prompts} == {0.0, 0.8} and 340 < greedy < 460  # 400 +- 12


@pytest.mark.parametrize("argv, message", [
    (["--out={0}"], "either --books"),
    (["--out={0}", "--answers={0}"], "no answers"),
    (["--out={0}", "--books={0}/none*"], "no such file"),
])
def test_wrong_requests_are_refused(argv, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    exit_texts.main([word.format(tmp_path) for word in argv])


def test_too_many_prompts_are_refused():
  with pytest.raises(ValueError, match="have 2 long paragraphs"):
    exit_texts.openings([BOOK], num=3, num_tokens=8, seed=0)


def test_a_prompt_without_an_answer_is_refused(tmp_path):
  (tmp_path / "answers-0.jsonl").write_text(json.dumps({"prompt": "a", "error": "too long"}) + "\n")
  with pytest.raises(ValueError, match="without an answer"):
    list(exit_texts.documents(tmp_path))
