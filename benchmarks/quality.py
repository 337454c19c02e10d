"""What generated texts are worth: answers to questions, last words, agreement of tokens.

  items = squad(folder, num=100, seed=0)
  score(items, [generate(item.prompt) for item in items])    {"num": 100, "f1": …, "exact": …}

Sets are files of the folder that the caller names, one JSON object a line:

  squad_val_1k.jsonl.gz          query (title, background, question, "Answer:"), answers
  lambada_openai_test.jsonl.gz   ctx (a passage without its last word), target (" word")

Any method of decoding that goes on from a prompt can be scored. An answer ends at
the first line break; for a last word let the method generate a few tokens more than
the word has, since a cut word ("sign" of "signs") may be a right one.

Source: the official evaluation script of SQuAD 2.0 (normalisation, F1, exact match;
without unanswerable questions it is that of 1.1, but for answers of articles and
punctuation alone); the LAMBADA dataset.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import gzip
import json
import os
import pathlib
import re
import string
from typing import Any

import numpy as np

_SQUAD, _LAMBADA = "squad_val_1k.jsonl.gz", "lambada_openai_test.jsonl.gz"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclasses.dataclass(frozen=True)
class Item:
  """A prompt and what may follow it.

  Attributes:
    task: key of `METRICS`.
    prompt: text to go on from; ends without a space.
    answers: any of them is right.
  """

  task: str
  prompt: str
  answers: tuple[str, ...]


def squad(folder: str | os.PathLike, num: int, seed: int, shots: int = 1) -> list[Item]:
  """Questions on a paragraph.

  Args:
    folder: that holds the file.
    num: questions; those of a smaller number are the first of a greater.
    seed: of the choice.
    shots: answered questions before each; the same for all, and none of the items.

  Raises:
    ValueError: no such file, a line of another form, or fewer questions than asked for.
  """
  lines, examples = _draw(folder, _SQUAD, ("query", "answers"), num, seed, shots)
  opening = "".join(f"{line['query']} {line['answers'][0]}\n\n" for line in examples)
  return [Item("squad", opening + line["query"], tuple(line["answers"])) for line in lines]


def lambada(folder: str | os.PathLike, num: int, seed: int) -> list[Item]:
  """Passages whose last word is to be found; arguments and errors as of `squad`."""
  lines, _ = _draw(folder, _LAMBADA, ("ctx", "target"), num, seed, 0)
  return [Item("lambada", line["ctx"], (line["target"].strip(),)) for line in lines]


def f1(text: str, answers: Sequence[str]) -> float:
  """Returns the harmonic mean of precision and recall of words, against the answer it is greatest for."""
  return max(_f1(_words(text), _words(answer)) for answer in answers)


def exact(text: str, answers: Sequence[str]) -> float:
  """Returns 1 if the text is one of the answers, but for case, punctuation, articles and spaces."""
  return float(any(_words(text) == _words(answer) for answer in answers))


def last_word(text: str, word: str) -> float:
  """Returns 1 if the text goes on with the word: in its case, and a whole one.

  Space before it is passed over, since some tokenizers drop it. "mother's" goes on
  with "mother", as it does for a model that is scored by the tokens of the word.
  """
  text = text.lstrip()
  return float(text.startswith(word) and not text[len(word):len(word) + 1].isalnum())


def score(items: Sequence[Item], texts: Sequence[str]) -> dict[str, int | float]:
  """Means of a task's metrics, in [0, 1], and "num", the items that they are of.

  Args:
    items: of one task.
    texts: what was generated after each prompt, without the prompt.

  Raises:
    ValueError: no items, items of several tasks, or another number of texts.
  """
  tasks = sorted({item.task for item in items})
  if len(tasks) != 1:
    raise ValueError(f"items of {len(tasks)} tasks ({', '.join(tasks) or 'none'}); score those of one task at a time")
  if len(texts) != len(items):
    raise ValueError(f"{len(texts)} texts for {len(items)} items; give one for each")
  means = {name: float(np.mean([metric(text, item.answers) for item, text in zip(items, texts)]))
           for name, metric in METRICS[tasks[0]].items()}
  return {"num": len(items), **means}


def agreement(tokens: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> dict[str, float]:
  """Shares of tokens: equal at their place ("equal"), and before the first difference ("prefix").

  Args:
    tokens: of each text.
    reference: of the same texts by another method. Where one ends earlier, the
      places that only the other has are different.

  Raises:
    ValueError: another number of texts, or no token in any.
  """
  if len(tokens) != len(reference):
    raise ValueError(f"{len(tokens)} texts and {len(reference)} to compare them with; give the same ones")
  total = sum(max(len(a), len(b)) for a, b in zip(tokens, reference))
  if not total:
    raise ValueError("there are no tokens to compare; generate at least one")
  same = [np.equal(a[:len(b)], b[:len(a)]) for a, b in zip(tokens, reference)]
  return {"equal": sum(int(np.sum(s)) for s in same) / total,
          "prefix": sum(int(np.sum(np.cumprod(s))) for s in same) / total}


def _draw(folder, file, fields, num, seed, shots) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Returns `num` lines of a file and `shots` others; the seed alone decides the order."""
  if num < 1 or shots < 0:
    raise ValueError(f"num={num}, shots={shots}; use at least 1 item and 0 shots")
  path = pathlib.Path(folder).expanduser() / file
  if not path.is_file():
    raise ValueError(f"{path}: no such file; name the folder that holds it")
  with gzip.open(path, "rt", encoding="utf-8") as stream:
    lines = [json.loads(line) for line in stream if line.strip()]
  for number, line in enumerate(lines, 1):
    if missing := [field for field in fields if not line.get(field)]:
      raise ValueError(f"{path}, line {number} has no {missing[0]!r}; each line needs {' and '.join(fields)}")
  if num + shots > len(lines):
    raise ValueError(f"{num} items and {shots} shots of the {len(lines)} lines of {path}; "
                     f"use at most {max(len(lines) - shots, 0)} items")
  order = np.random.default_rng(seed).permutation(len(lines))
  return [lines[i] for i in order[:num]], [lines[i] for i in order[len(lines) - shots:]]


def _words(text: str) -> list[str]:
  """Returns the words of the normalised text: lower case, then no punctuation, then no articles."""
  return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(words: list[str], answer: list[str]) -> float:
  if not words or not answer:
    return float(words == answer)
  common = sum((collections.Counter(words) & collections.Counter(answer)).values())
  return 2 * common / (len(words) + len(answer))


def _first_line(text: str) -> str:
  return text.partition("\n")[0]


# task -> name -> metric of a generated text and the answers
METRICS: dict[str, dict[str, Callable[[str, Sequence[str]], float]]] = {
    "squad": {"f1": lambda text, answers: f1(_first_line(text), answers),
              "exact": lambda text, answers: exact(_first_line(text), answers)},
    "lambada": {"last_word": lambda text, answers: max(last_word(text, word) for word in answers)},
}
