"""Figures of runs and studies; the only file that imports matplotlib.

Functions that draw a training run take the rows of metrics.jsonl (see
`mor/train/metrics.py`). Every function returns an image as bytes or text. No function
opens a window or uses global state.
"""

from collections.abc import Callable, Mapping, Sequence
import io
import logging
from typing import Any

# Before the import, which warns of a home that cannot be written. A glyph that a font misses shows as a box.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

from matplotlib import figure
from matplotlib import patches

from mor import depth as depth_lib

Row = Mapping[str, float]

_BLUE, _ORANGE, _GREY = "#2563eb", "#ea580c", "#94a3b8"
_MEMBER_COLOURS = ("#0f172a", "#94a3b8", "#16a34a", "#86c440", "#2563eb", "#06b6d4", "#ea580c", "#c026d3", "#d4b106",
                   "#7c3aed")
_CHARS, _MOST_LINES = 118, 12  # of the heat map


def curves(rows: Sequence[Row], num_recursions: int) -> str:
  """Draws loss and load over steps, as SVG for a page."""
  fig = figure.Figure(figsize=(11, 3.8), layout="constrained")
  axes = fig.subplots(1, 2)
  _loss(axes[0], rows)
  _load(axes[1], rows, num_recursions)
  out = io.StringIO()
  fig.savefig(out, format="svg", metadata={"Date": None})
  return out.getvalue()[out.getvalue().index("<svg"):]


def overview(rows: Sequence[Row], num_recursions: int, parts: Sequence[str], depths: Sequence[int],
             title: str) -> bytes:
  """Draws loss and load above a text coloured by depth, as PNG."""
  runs = _layout(parts, depths)
  text_height = 0.8 + 0.25 * (1 + max((run[0] for run in runs), default=0))
  fig = figure.Figure(figsize=(11, 4.2 + text_height), layout="constrained")
  grid = fig.add_gridspec(2, 2, height_ratios=(4, text_height))
  _loss(fig.add_subplot(grid[0, 0]), rows)
  _load(fig.add_subplot(grid[0, 1]), rows, num_recursions)
  _heat_map(fig.add_subplot(grid[1, :]), runs, num_recursions)
  fig.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
  out = io.BytesIO()
  fig.savefig(out, format="png", dpi=150)
  return out.getvalue()


def text_by_depth(parts: Sequence[str], depths: Sequence[int], num_recursions: int) -> bytes:
  """Draws a text coloured by depth, as PNG."""
  runs = _layout(parts, depths)
  height = 0.8 + 0.25 * (1 + max((run[0] for run in runs), default=0))
  fig = figure.Figure(figsize=(11, height), layout="constrained")
  _heat_map(fig.subplots(), runs, num_recursions)
  out = io.BytesIO()
  fig.savefig(out, format="png", dpi=150)
  return out.getvalue()


def bars(panels: Mapping[str, Mapping[str, float]]) -> bytes:
  """Draws named values as bars, one panel per title, as PNG."""
  fig = figure.Figure(figsize=(11, 3), layout="constrained")
  for axes, (title, values) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items()):
    drawn = axes.bar(list(values), list(values.values()), color=_BLUE, width=0.7)
    axes.bar_label(drawn, fmt="{:.4g}", fontsize=8, padding=2)
    _style(axes, title, "")
    axes.margins(y=0.12)
  out = io.BytesIO()
  fig.savefig(out, format="png", dpi=150)
  return out.getvalue()


def trade_off(lines: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str) -> bytes:
  """Draws the points of several methods as lines, and marks the best points, as PNG.

  Args:
    lines: points (x, y) by name of the method; larger is better for both.
    x_label: label of the x axis.
    y_label: label of the y axis.
  """
  fig = figure.Figure(figsize=(7.5, 4.2), layout="constrained")
  axes = fig.subplots()
  for (name, points), shade in zip(lines.items(), (_BLUE, _ORANGE, "#16a34a", "#9333ea", _GREY, "#0891b2")):
    axes.plot(*zip(*points), marker="o", linewidth=1.5, color=shade, label=name)
  every = [point for points in lines.values() for point in points]
  best = sorted(p for p in every if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in every))
  axes.plot(*zip(*best), linestyle=":", color="black", linewidth=1.0, label="best of all", zorder=0)
  _style(axes, "", x_label)
  axes.set_ylabel(y_label, fontsize=9)
  out = io.BytesIO()
  fig.savefig(out, format="png", dpi=110)
  return out.getvalue()


def study_curves(study: Mapping[str, Any]) -> bytes:
  """Draws the held-out causal loss of a study against FLOPs, tokens and time, as PNG.

  A line is the run of a member to the budget. The dashed branch is the cooldown of its
  run to the tokens of the shortest member. Only the ends of lines are comparable, because
  the rest of a line lies on the plateau of the learning rate.
  """
  per_step = study["tokens_per_step"]
  panels: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None]], ...] = (  # axis, its units in one step
      ("forward FLOPs", lambda result: per_step * result["forward_flops_per_token"]),
      ("tokens", lambda result: per_step),
      ("training seconds (steps x median step)", lambda result: result["step_seconds"]),
  )
  fig = figure.Figure(figsize=(14, 4.6), layout="constrained")
  all_axes = fig.subplots(1, len(panels), sharey=True)
  for axes, (label, unit) in zip(all_axes, panels):
    _panel(axes, study, unit)
    axes.set_xlabel(label, fontsize=9)
  all_axes[0].set_ylabel("held-out NLL, causal (nats per token)", fontsize=9)
  handles, labels = all_axes[0].get_legend_handles_labels()
  fig.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
  out = io.BytesIO()
  fig.savefig(out, format="png", dpi=130)
  return out.getvalue()


def _series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
  """Returns the steps and the values of a metric."""
  found = [(row["step"], row[name]) for row in rows if name in row]
  return [step for step, _ in found], [value for _, value in found]


def _loss(axes, rows: Sequence[Row]) -> None:
  axes.plot(*_series(rows, "train/nll"), color=_GREY, linewidth=1, label="train")
  for name, tint in (("oracle", _ORANGE), ("causal", _BLUE)):
    steps, values = _series(rows, f"eval/nll_{name}")
    if steps:
      axes.plot(steps, values, "o-", color=tint, markersize=4, label=f"held out, {name}  {values[-1]:.3f}")
  _style(axes, "loss (nats per token)")


def _load(axes, rows: Sequence[Row], num_recursions: int) -> None:
  for r in range(1, num_recursions + 1):
    tint = _line_colour(r, num_recursions)
    steps, values = _series(rows, f"train/load_{r}")
    if steps:
      axes.plot(steps, values, color=tint, linewidth=1.5, label=f"step {r}, training")
    steps, values = _series(rows, f"eval/load_causal_{r}")
    if steps:
      axes.plot(steps, values, "o--", color=tint, markersize=4, linewidth=1, label=f"step {r}, causal")
  axes.set_ylim(-0.03, 1.05)
  _style(axes, "load (fraction of tokens at each recursion step)")


def _style(axes, title: str, x_label: str = "step") -> None:
  axes.set_title(title, loc="left", fontsize=10)
  axes.set_xlabel(x_label, fontsize=9)
  axes.tick_params(labelsize=8)
  axes.grid(color="#e2e8f0", linewidth=0.8)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  if axes.get_legend_handles_labels()[1]:
    axes.legend(fontsize=8, frameon=False, ncols=2 if len(axes.lines) > 3 else 1)


def _line_colour(r: int, num_recursions: int) -> str:
  """Returns the colour of a step as in the text, but a darker one for the palest."""
  return "#d4b106" if depth_lib.shade(r, num_recursions) == 0 else depth_lib.page_colour(r, num_recursions)


def _heat_map(axes, runs: Sequence[tuple[int, int, str, int]], num_recursions: int) -> None:
  """Draws a grid of characters, each on the colour of the depth of its token."""
  bottom = 1 + max((run[0] for run in runs), default=0)
  axes.set_xlim(0, _CHARS)
  axes.set_ylim(bottom + 1.5, -0.2)
  axes.axis("off")
  axes.set_title("held-out text by recursion depth (causal routing)", loc="left", fontsize=10)
  cell = dict(height=0.86, linewidth=0)
  for line, start, text, depth in runs:
    axes.add_patch(patches.Rectangle((start, line + 0.07), len(text), facecolor=depth_lib.page_colour(
        depth, num_recursions), **cell))
    for i, char in enumerate(text):
      axes.text(start + i + 0.5, line + 0.5, char.replace("$", r"\$"), family="monospace", fontsize=8, ha="center",
                va="center", color="#1e293b")
  for r in range(1, num_recursions + 1):
    left = (r - 1) * 16
    axes.add_patch(patches.Rectangle((left, bottom + 0.5), 2, facecolor=depth_lib.page_colour(
        r, num_recursions), **cell))
    axes.text(left + 2.5, bottom + 0.93, f"{r} step{'s' if r > 1 else ''}", fontsize=8, va="center")


def _layout(parts: Sequence[str], depths: Sequence[int]) -> list[tuple[int, int, str, int]]:
  """Returns (line, first column, text, depth) of each token; a long token is cut at the end of a line."""
  runs, line, column = [], 0, 0
  for part, depth in zip(parts, depths):
    text = "".join("⏎" if c == "\n" else c if c.isprintable() else " " for c in part)
    for start in range(0, len(text), _CHARS):
      piece = text[start:start + _CHARS]
      if column + len(piece) > _CHARS:
        line, column = line + 1, 0
      if line == _MOST_LINES:
        return runs
      runs.append((line, column, piece, depth))
      column += len(piece)
  return runs


def _panel(axes, study: Mapping[str, Any], unit: Callable[[Mapping[str, Any]], float | None]) -> None:
  names = list(dict.fromkeys(result["name"] for result in study["results"]))
  ends = [point["nll_causal"] for result in study["results"] for point in result["curve"][-1:]]
  for index, result in enumerate(study["results"]):
    step, member = unit(result), names.index(result["name"])
    if not step:
      continue
    colour = _MEMBER_COLOURS[member % len(_MEMBER_COLOURS)]
    first = result["name"] not in [other["name"] for other in study["results"][:index]]
    _draw(axes, result["curve"], step, color=colour, linestyle="-", label=result["label"] if first else None)
    fork = [point for point in result["curve"] if point["step"] <= (result["fork_step"] or 0)][-1:]
    _draw(axes, fork + [p for p in result["short_curve"] if p not in fork], step, color=colour, linestyle="--")
  if ends:  # the first losses only show how fast a model learns the word frequencies
    axes.set_ylim(min(ends) - 0.1, min(ends) + 1.6)
  axes.tick_params(labelsize=8)
  axes.grid(color="#e2e8f0", linewidth=0.8)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)


def _draw(axes, points: list[Mapping[str, float]], unit: float, **style: Any) -> None:
  if points:
    x, y = [point["step"] * unit for point in points], [point["nll_causal"] for point in points]
    axes.plot(x, y, linewidth=1.4, **style)
    axes.plot(x[-1:], y[-1:], "o", markersize=5, color=style["color"])
