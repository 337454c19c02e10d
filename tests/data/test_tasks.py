"""Every answer of every task is right by a solver of its own, and rows depend on seed, stream and index alone."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest

from mor import config as config_lib
from mor import experiments
from mor.data import text
from mor.data.tasks import corpus as corpus_lib
from mor.data.tasks import table
from tests.helpers import tiny

SEQ_LEN, NUM_HELD_OUT = 80, 128


def solve_khop(words):
  """Follows the facts of a problem in a dictionary; yields place, answer and hops of each question."""
  facts = dict(word.split(">") for word in words if ">" in word)
  if facts:
    questions = [(place, *word.split("^")) for place, word in enumerate(words) if "^" in word]
  else:
    num_facts = 2 * len(set(words) - {"^"})
    facts = dict(zip(words[:num_facts:2], words[1:num_facts:2]))
    questions = []
    for place in range(num_facts, len(words)):
      if words[place] == "^":
        hops = len(list(itertools.takewhile(lambda word: word == "^", reversed(words[:place + 1]))))
        questions.append((place, words[place - hops], hops))
  for place, at, hops in questions:
    for _ in range(int(hops)):
      at = facts[at]
    yield place, at, int(hops)


def solve_s5(words):
  """Sends each element on, permutation by permutation."""
  places = list(range(len(words[0])))
  for place, word in enumerate(words):
    places = [int(word[at]) for at in places]
    yield place, "".join(map(str, places)), place + 1


def solve_mano(words, modulus):
  """Reads the expression from behind with a stack of values and heights."""
  assert words[-1] == "="
  stack = []
  for word in reversed(words[:-1]):
    if word in ("+", "-", "*"):
      (left, height), (right, other) = stack.pop(), stack.pop()
      stack.append((eval(f"{left} {word} {right}"), 1 + max(height, other)))
    else:
      stack.append((int(word), 0))
  (value, height), = stack
  yield len(words) - 1, str(value % modulus), height


def solve_addition(words):
  """Adds the operands as integers; the sum and its end are due digit by digit."""
  question = "".join(words).partition("=")[0]
  operands = question.split("+")
  total = str(sum(int(operand[::-1]) for operand in operands))[::-1]
  assert "".join(words) == f"{question}={total}"
  for index, answer in enumerate([*total, "<end>"]):
    yield len(question) + index, answer, len(operands)


SOLVERS = {"khop": solve_khop, "s5": solve_s5, "mano": solve_mano, "addition": solve_addition}
CASES = {"khop": ("khop", {}), "khop-small": ("khop", dict(size=7, hardest=3, questions=20)),
         "khop-unpacked": ("khop", dict(packed=False)), "khop-named": ("khop", dict(size=30, hardest=2)),
         "khop-single": ("khop", dict(size=24, questions=1, packed=False)),
         "mano": ("mano", {}), "mano-large": ("mano", dict(size=23, hardest=4)), "addition": ("addition", {}),
         "addition-long": ("addition", dict(size=3, hardest=6)), "s5": ("s5", {}),
         "s5-small": ("s5", dict(size=3, hardest=4))}
# SHA-256 of the first batch. A change means that runs go on with other rows: raise `corpus._VERSION` with it.
GOLDEN = {"khop": "157ff75e5546", "khop-small": "f7d9607f0335", "khop-unpacked": "4555ee023c7a",
          "khop-named": "69718b3566e2", "khop-single": "e3d007c5dbc9", "mano": "2a91f6d2adf0",
          "mano-large": "09b6dbce6d9b", "addition": "af993878d6a1", "addition-long": "7556a7996c56",
          "s5": "f98450186d82", "s5-small": "68cb670ae942"}


@pytest.fixture(autouse=True)
def fixture_few_rows(monkeypatch):
  monkeypatch.setattr(corpus_lib, "NUM_HELD_OUT", NUM_HELD_OUT)


def make_config(case, **fields):
  name, task = CASES[case]
  return dataclasses.replace(tiny.config(data=dict(source=f"task:{name}", seq_len=SEQ_LEN, task=task)).data, **fields)


def load(case, **fields):
  return text.load(make_config(case, **fields), 2000)


def solve(case, words):
  """Returns place, answer and difficulty of all questions of a problem."""
  name, fields = CASES[case]
  return list(SOLVERS[name](words, fields.get("size", 7)) if name == "mano" else SOLVERS[name](words))


def problems(case, batches):
  """Yields the words of each problem of some batches, and the place, answer and difficulty of each target."""
  task = table.make(make_config(case))
  names = [*task.symbols, "<unknown>", "<end>"]
  for batch in batches:
    for row in range(len(batch["tokens_BT"])):
      for segment in range(1, batch["segment_BT"][row].max() + 1):
        inside_T = batch["segment_BT"][row] == segment
        tokens, target, difficulty = (batch[name][row][inside_T] for name in ("tokens_BT", "target_BT", "difficulty_BT"))
        assert names[tokens[0]] == "<end>" and difficulty[0] == 0, "a problem opens without an answer"
        words, answers = ([names[index] for index in ids] for ids in (tokens[1:], target[difficulty > 0]))
        yield words, list(zip(np.flatnonzero(difficulty) - 1, answers, difficulty[difficulty > 0].tolist()))


def test_each_task_has_a_solver():
  assert set(SOLVERS) == set(table.TASKS) == {name for name, _ in CASES.values()}


@pytest.mark.parametrize("case", CASES)
def test_every_answer_is_right(case):
  corpus = load(case)
  task = table.make(make_config(case))
  seen = set()
  for words, found in problems(case, corpus.validation.in_order(16, 64)):
    expected = solve(case, words)
    assert found == expected
    seen.update(level for _, _, level in found)
  assert seen == set(task.levels), "every trained difficulty occurs, and no other"
  if corpus.beyond is None:
    assert not task.beyond
    return
  seen = set()
  for words, found in problems(case, corpus.beyond.in_order(16, 64)):
    expected = solve(case, words)
    assert found and set(found) <= set(expected)
    seen.update(level for _, _, level in found)
  assert seen == set(task.beyond), "every greater difficulty occurs, and no trained one"
  assert not seen & set(task.levels)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_a_function_of_the_step(case):
  one, other = load(case).train, load(case).train
  whole = one.batch(5)
  one.batch(0)
  parts = [other.batch(5, rows) for rows in (slice(2, 4), slice(0, 2))]
  for name, value in one.batch(5).items():
    np.testing.assert_array_equal(value, whole[name])
    np.testing.assert_array_equal(np.concatenate([parts[1][name], parts[0][name]]), whole[name], "by two processes")
  assert {name: (value.shape, value.dtype) for name, value in whole.items()} == {
      "tokens_BT": ((4, SEQ_LEN), np.int32), "target_BT": ((4, SEQ_LEN), np.int32),
      "segment_BT": ((4, SEQ_LEN), np.int32), "loss_mask_BT": ((4, SEQ_LEN), bool)}
  found = hashlib.sha256(b"".join(whole[name].astype("<i4").tobytes() for name in sorted(whole))).hexdigest()[:12]
  assert found == GOLDEN[case]


@pytest.mark.parametrize("case", CASES)
def test_no_row_comes_twice_and_held_out_rows_are_new(case):
  def rows(stream):
    return {row.tobytes() for batch in stream for row in batch["tokens_BT"]}

  corpus = load(case)
  train = rows(corpus.train.batch(step) for step in range(16))
  assert len(train) == 64
  held_out = rows(corpus.validation.in_order(16, 64))
  assert len(held_out) == 64 and not train & held_out
  other = load(case, shuffle_seed=1)
  assert not train & rows(other.train.batch(step) for step in range(16)), "another seed makes other training rows"
  assert rows(other.validation.in_order(16, 64)) == held_out, "and is judged on the same held-out rows"


@pytest.mark.parametrize("case", CASES)
def test_rows_are_read_in_order_and_filled(case):
  corpus = load(case)
  batches = list(corpus.validation.in_order(4, 6))
  assert [len(batch["tokens_BT"]) for batch in batches] == [4, 4]
  assert not any(value[2:].any() for value in batches[1].values()), "rows of padding"
  again = next(corpus.validation.in_order(6, 6))
  for name, value in again.items():
    np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches])[:6], value)
  assert sum(len(batch["tokens_BT"]) for batch in corpus.validation.in_order(64)) == NUM_HELD_OUT


@pytest.mark.parametrize("case", CASES)
def test_the_tokenizer_reads_what_it_prints(case):
  corpus = load(case)
  tokenizer, task = corpus.tokenizer, table.make(make_config(case))
  ids = np.arange(len(task.symbols))
  assert tokenizer.decode(ids).split() == list(task.symbols)
  np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(ids)), ids)
  assert tokenizer.eos_id == task.opening == tokenizer.vocab_size - 1
  np.testing.assert_array_equal(tokenizer.encode("<|endoftext|> nonsense"), [len(ids)] * 2)
  assert corpus.validation_text().splitlines()[0] == tokenizer.decode(corpus.validation.problems(0)[0].tokens_T)


@pytest.mark.parametrize("seq_len", [61, 90])
def test_difficulties_do_not_depend_on_the_row_length(seq_len, monkeypatch):
  """Every length has the same odds though problems differ in length; false alarm: 4 standard errors, about 1e-4 a case."""
  monkeypatch.setattr(corpus_lib, "NUM_HELD_OUT", 1024)
  corpus = load("khop-single", seq_len=seq_len)
  hops = np.array([len(found) for _, found in problems("khop-single", corpus.validation.in_order(64))])
  share_K = np.bincount(hops, minlength=5)[1:] / len(hops)
  assert len(hops) > 1000 and np.abs(share_K - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / len(hops))


@pytest.mark.parametrize("name", table.TASKS)
def test_the_quickstart_trains_on_a_task_as_it_is(name):
  fields = experiments.read("quickstart").to_dict()
  fields["data"]["source"] = f"task:{name}"
  config = config_lib.from_dict(fields)
  corpus = text.load(config.data, config.model.vocab_size)
  assert corpus.train.batch(0)["loss_mask_BT"].any(axis=1).all(), "every row asks something"


@pytest.mark.parametrize("fields, message", [
    (dict(source="task:nothing"), "no such task; use one of task:khop, task:mano, task:addition, task:s5"),
    (dict(validation_source="sotu"), "leave it out"),
    (dict(seq_len=20), "shorter than a problem, which may have 21 tokens; use data.seq_len=21"),
    (dict(task=dict(size=2)), "data.task.size=2; use 3 to 128"),
    (dict(task=dict(hardest=12)), "use at most 11"),
    (dict(task=dict(questions=-1)), "use 0 for the default"),
    (dict(source="sotu", task=dict(size=5)), "set data.source=task:NAME"),
])
def test_what_cannot_be_made_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    text.load(tiny.config(data=dict(source="task:khop", seq_len=SEQ_LEN) | fields).data, 2000)


@pytest.mark.parametrize("fields, message", [
    (dict(source="task:s5", task=dict(size=6)), "data.task.size=6; use 3, 4 or 5 elements"),
    (dict(source="task:s5", task=dict(packed=False)), "task:s5, which has no such choice; leave it at True"),
    (dict(source="task:mano", task=dict(questions=3)), "task:mano, which has no such choice; leave it at 0"),
    (dict(source="task:mano", task=dict(hardest=9)), "data.task.hardest=9; use at most 8"),
    (dict(source="task:mano", task=dict(size=1)), "use a modulus of 2 to 1000"),
    (dict(source="task:addition", task=dict(hardest=1)), "use at least 2 operands"),
    (dict(source="task:addition", task=dict(size=10)), "use at most 9 digits"),
])
def test_each_task_refuses_what_it_cannot_make(fields, message):
  with pytest.raises(ValueError, match=message):
    text.load(tiny.config(data=dict(seq_len=SEQ_LEN) | fields).data, 2000)


def test_a_vocabulary_must_fit():
  with pytest.raises(ValueError, match="data.source='task:khop' has 206 symbols, more than model.vocab_size=61; set "
                                       "model.vocab_size=206 or more"):
    text.load(make_config("khop"), 61)
