"""The figure of a study: held-out causal loss against FLOPs, tokens and time.

A line is a member's run to the budget; the dashed end that leaves it is the
cooldown of its run to the shortest member's tokens. Values in the middle of a
line lie on the plateau of the learning rate: only ends compare.
"""

from collections.abc import Callable, Mapping
import io
from typing import Any

from matplotlib import figure

_COLOURS = ("#0f172a", "#94a3b8", "#16a34a", "#86c440", "#2563eb", "#06b6d4", "#ea580c", "#c026d3", "#d4b106",
            "#7c3aed")


def curves(study: Mapping[str, Any]) -> bytes:
  """The figure as PNG."""
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


def _panel(axes, study: Mapping[str, Any], unit: Callable[[Mapping[str, Any]], float | None]) -> None:
  names = list(dict.fromkeys(result["name"] for result in study["results"]))
  ends = [point["nll_causal"] for result in study["results"] for point in result["curve"][-1:]]
  for index, result in enumerate(study["results"]):
    step, member = unit(result), names.index(result["name"])
    if not step:
      continue
    colour = _COLOURS[member % len(_COLOURS)]
    first = result["name"] not in [other["name"] for other in study["results"][:index]]
    _draw(axes, result["curve"], step, color=colour, linestyle="-", label=result["label"] if first else None)
    fork = [point for point in result["curve"] if point["step"] <= (result["fork_step"] or 0)][-1:]
    _draw(axes, fork + [p for p in result["short_curve"] if p not in fork], step, color=colour, linestyle="--")
  if ends:  # what happens before a model has learned the word frequencies is no comparison
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
