"""Texts that exits are trained on: what a model answers, and what it learnt from.

  python -m benchmarks.exit_texts --books='data/books/train-0*.jsonl.xz' --out=runs/exit-texts --num=10240 --parts=8
  python -m mor.main --mode=generate --prompt_file=runs/exit-texts/openings-0.jsonl … > runs/exit-texts/answers-0.jsonl
  python -m benchmarks.exit_texts --answers=runs/exit-texts --out=runs/exit-texts

The first writes openings of paragraphs, `parts` files of prompts of which one in three
is to be answered with temperature 0.8 and the others with the likeliest tokens, and the
beginnings of the books. The last joins each prompt and its answer to a document. Both
kinds of documents are for `data.source`: see configs/exit_smollm2.py.
"""

from collections.abc import Iterator
import glob
import json
import pathlib
import sys

import numpy as np

from benchmarks import harness
from mor.data import readers

_WORDS = (6, 30)  # of an opening


def openings(books: list[str], num: int, num_tokens: int, seed: int) -> list[dict[str, object]]:
  """Returns requests: beginnings of long paragraphs."""
  rng = np.random.default_rng(seed)
  paragraphs = [words for book in books for words in map(str.split, book.split("\n\n")) if len(words) >= 2 * _WORDS[1]]
  if num > len(paragraphs):
    raise ValueError(f"--num={num}, and the books have {len(paragraphs)} long paragraphs; use fewer")
  return [{"prompt": " ".join(paragraphs[i][:rng.integers(*_WORDS, endpoint=True)]), "max_tokens": num_tokens,
           "temperature": 0.8 if rng.random() < 1 / 3 else 0.0, "seed": k}
          for k, i in enumerate(rng.choice(len(paragraphs), num, replace=False).tolist())]


def documents(folder: pathlib.Path) -> Iterator[str]:
  """Returns prompts with their answers.

  Raises:
    ValueError: no answers in the folder.
  """
  paths = sorted(folder.glob("answers-*.jsonl"))
  if not paths:
    raise ValueError(f"--answers={folder}: no answers-*.jsonl in it; write them with --mode=generate")
  for path in paths:
    for line in path.read_text(encoding="utf-8").splitlines():
      answer = json.loads(line)
      if "error" in answer:
        raise ValueError(f"{path}: a prompt without an answer ({answer['error']})")
      yield answer["prompt"] + answer["text"]


def main(argv: list[str]) -> None:
  """Writes prompts, or documents."""
  parser = harness.Parser(description=__doc__.partition("\n")[0])
  parser.add_argument("--books", default="", help="glob of files of books")
  parser.add_argument("--answers", default="", help="folder of answers-*.jsonl")
  parser.add_argument("--out", required=True, help="folder")
  parser.add_argument("--num", type=int, default=10240, help="prompts")
  parser.add_argument("--parts", type=int, default=8, help="files of prompts")
  parser.add_argument("--num_tokens", type=int, default=128, help="of an answer")
  parser.add_argument("--most", type=int, default=400, help="books")
  parser.add_argument("--characters", type=int, default=24_000, help="of each book, as documents")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args(argv)
  if bool(args.books) == bool(args.answers):
    raise ValueError("give either --books=GLOB or --answers=FOLDER")
  out = pathlib.Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  if args.answers:
    _write(out / "texts-answers.jsonl", [{"text": text} for text in documents(pathlib.Path(args.answers))])
    return
  paths = sorted(glob.glob(args.books))
  if not paths:
    raise ValueError(f"--books={args.books}: no such file")
  books = [text for path in paths for text in readers.read(pathlib.Path(path), "text")]
  books = books[::max(1, len(books) // args.most)][:args.most]
  prompts = openings(books, args.num, args.num_tokens, args.seed)
  for part in range(args.parts):
    _write(out / f"openings-{part}.jsonl", prompts[part::args.parts])
  _write(out / "texts-books.jsonl", [{"text": book[:args.characters]} for book in books])


def _write(path: pathlib.Path, rows: list[dict[str, object]]) -> None:
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
  print(f"{path}: {len(rows)} lines", file=sys.stderr)


if __name__ == "__main__":
  harness.run(main)
