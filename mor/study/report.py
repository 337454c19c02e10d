"""The tables and the figure of a study, made from its study.json alone:

  python -m mor.study.report --json=STUDY.json

writes STUDY.md and STUDY.png beside it. With several seeds, a cell is the mean and, after
±, the standard deviation over the seeds.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import re
import statistics
import sys
from typing import Any

from mor import plots

Result = Mapping[str, Any]
_Cell = Callable[[Result, Mapping[str, Any]], float | None]


def _figure(name: str, key: str, scale: float = 1.0) -> _Cell:
  """Makes a function that reads `figures[name][key]` of an end; None if it was not measured."""
  def read(result: Result, end: Mapping[str, Any]) -> float | None:
    del result
    value = end["figures"].get(name, {}).get(key)
    return None if value is None else value * scale
  return read


def _gap(result: Result, end: Mapping[str, Any]) -> float | None:
  del result
  val = end["figures"]["val"]
  return val["nll_causal"] - val["nll_oracle"] if "nll_oracle" in val else None


_MODEL: tuple[tuple[str, str, _Cell], ...] = (  # heading, format, value
    ("body M", ".2f", lambda result, end: result["params_non_embedding"] / 1e6),
    ("MFLOP/token", ".2f", lambda result, end: result["forward_flops_per_token"] / 1e6),
)
_END: tuple[tuple[str, str, _Cell], ...] = (
    ("steps", ".0f", lambda result, end: end["steps"]),
    ("tokens M", ".2f", lambda result, end: end["tokens"] / 1e6),
    ("NLL causal", ".4f", _figure("val", "nll_causal")),
    ("NLL oracle", ".4f", _figure("val", "nll_oracle")),
    ("causal − oracle", "+.4f", _gap),
    ("bits/byte", ".4f", _figure("val", "bpb_causal")),
    ("WikiText-2 bits/byte", ".4f", _figure("wikitext_2", "bpb_causal")),
    ("BLiMP %", ".1f", _figure("blimp", "accuracy", 100.0)),
)
_TIME: tuple[tuple[str, str, _Cell], ...] = (
    ("s/step", ".3f", lambda result, end: result["step_seconds"]),
    ("training s", ".0f", lambda result, end: result["step_seconds"] and result["step_seconds"] * end["steps"]),
)


def tables(study: Mapping[str, Any]) -> str:
  """Formats both comparisons as Markdown, with their conditions."""
  return "\n".join([
      *_preface(study), "", "**Equal forward FLOPs**", "", *_table(study, "equal_flops", (*_MODEL, *_END, *_TIME)), "",
      "**Equal tokens**", "", *_table(study, "equal_tokens", (*_MODEL, *_END)), "", *_tasks(study), *_loads(study), ""])


def write(directory: str | os.PathLike, study: Mapping[str, Any], name: str = "study") -> None:
  """Writes the JSON, the tables and the figure."""
  directory = pathlib.Path(directory)
  write_json(directory / f"{name}.json", study)
  (directory / f"{name}.md").write_text(tables(study), encoding="utf-8")
  (directory / f"{name}.png").write_bytes(plots.study_curves(study))


def write_json(path: pathlib.Path, fields: Mapping[str, Any]) -> None:
  """Writes a JSON file, all or nothing."""
  path.parent.mkdir(parents=True, exist_ok=True)
  fresh = path.with_suffix(".json.tmp")
  fresh.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
  os.replace(fresh, path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file.

  Raises:
    ValueError: the file is not JSON.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}); remove it to make it again") from error


def _preface(study: Mapping[str, Any]) -> list[str]:
  data, ends = study["config"]["data"], [result["equal_tokens"] for result in study["results"]]
  tokens = ends[0]["figures"]["val"]["targets"]
  lines = [
      f"`{study['command']}`", "",
      f"{study['num_devices']} {study['device']} ({study['num_cpus']} CPUs), {study['compute_dtype']}, commit "
      f"{_short(study['commit'])}; {len(study['study']['seeds'])} seed(s); {data['source']}, {data['tokenizer']}, "
      f"{data['batch_size']} x {data['seq_len']} tokens a step; budget {study['budget_forward_flops']:.3g} forward "
      f"FLOPs, head counted. NLL in nats per token over {tokens:,.0f} held-out tokens.",
  ]
  pairs = [end["figures"]["blimp"] for end in ends if "blimp" in end["figures"]]
  if pairs:
    n = pairs[0]["pairs"]
    lines.append(f"BLiMP: {n} pairs, one standard error is at most {50 / n**0.5:.1f} points; chance is 50 %.")
  lines += [f"Not measured: {name} ({path} is not there)." for name, path in study["missing"].items()]
  return lines if study["complete"] else [*lines, "The study is not complete."]


def _short(commit: str | None) -> str:
  """Returns the first digits of a commit, and the mark of changed code."""
  digits, plus, changes = (commit or "unknown").partition("+")
  return digits[:10] + plus + changes


def _table(study: Mapping[str, Any], end: str, columns: Sequence[tuple[str, str, _Cell]]) -> list[str]:
  heads = ["model", *(heading for heading, _, _ in columns)]
  rows = [[label, *(_cell([read(r, r[end]) for r in results], form) for _, form, read in columns)]
          for label, results in group_by_label(study).items()]
  return [_line(heads), _line(["---"] + ["---:"] * len(columns)), *map(_line, rows)]


def group_by_label(study: Mapping[str, Any]) -> dict[str, list[Result]]:
  """Groups the results by label; a group has one result per seed."""
  groups = {}
  for result in study["results"]:
    groups.setdefault(result["label"], []).append(result)
  return groups


def _cell(values: Sequence[float | None], form: str) -> str:
  if any(value is None for value in values):
    return "–"
  text = format(statistics.mean(values), form)
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  return f"{text} ± {format(spread, form.lstrip('+'))}" if spread else text


def _tasks(study: Mapping[str, Any]) -> list[str]:
  """Formats, of a task, the answers that are right and the depth by difficulty, with causal routing; else nothing."""
  lines = []
  for end, title in (("equal_flops", "Equal forward FLOPs"), ("equal_tokens", "Equal tokens")):
    for kind, heading, form, scale in (("accuracy", "answers that are right, %", ".1f", 100.0),
                                       ("depth", "mean recursion steps of the tokens that answer", ".2f", 1.0)):
      columns = [(f"{level}{'' if name == 'val' else ' (beyond)'}", form, _figure(name, f"{kind}_causal_{level}", scale))
                 for name in ("val", "beyond") for level in _levels(study, end, name, kind)]
      if kind == "depth" and columns:
        columns.append(("correlation", "+.2f", _figure("val", "correlation_causal")))
      if columns:
        lines += [f"**{title}: {heading}, by difficulty**", "", *_table(study, end, columns), ""]
  return lines


def _levels(study: Mapping[str, Any], end: str, name: str, kind: str) -> list[int]:
  """Returns the difficulties for which any result has a figure."""
  keys = {key for result in study["results"] for key in result[end]["figures"].get(name, {})}
  found = (re.fullmatch(rf"{kind}_causal_([1-9]\d*)", key) for key in keys)
  return sorted(int(match.group(1)) for match in found if match)


def _loads(study: Mapping[str, Any]) -> list[str]:
  """Compares the loads that the FLOPs assume with the measured loads."""
  lines = []
  for label, results in group_by_label(study).items():
    val, nominal = results[0]["equal_flops"]["figures"]["val"], results[0]["nominal_load"]
    if "nll_oracle" in val:
      measured = {name: "/".join(f"{val[f'load_{name}_{r + 1}']:.2f}" for r in range(len(nominal)))
                  for name in ("oracle", "causal")}
      lines.append(f"- {label}: load per step {'/'.join(f'{x:.2f}' for x in nominal)} counted, "
                   f"{measured['oracle']} oracle, {measured['causal']} causal")
  return lines


def _line(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str]) -> int:
  """Makes the tables and the figure from a JSON file."""
  parser = argparse.ArgumentParser(prog="python -m mor.study.report")
  parser.add_argument("--json", required=True, type=pathlib.Path, help="study.json of a study")
  path = parser.parse_args(argv).json
  try:
    study = read_json(path)
    path.with_suffix(".md").write_text(tables(study), encoding="utf-8")
    path.with_suffix(".png").write_bytes(plots.study_curves(study))
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
