"""The report of a run: report.html (one file, nothing to fetch), report.png, summary.json."""

from collections.abc import Mapping, Sequence
import html
import json
import os
from typing import Any

from etils import epath

from mor import config as config_lib
from mor import depth as depth_lib
from mor import paths
from mor import plots

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1e293b; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin-bottom: 0; }}  h2 {{ font-size: 1.05rem; margin-top: 2rem; }}
.cards {{ display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }}
.card {{ border: 1px solid #e2e8f0; border-radius: .5rem; padding: .6rem .9rem; }}
.card b {{ display: block; font-size: 1.25rem; }}  .card span {{ color: #64748b; font-size: .85rem; }}
.tokens {{ font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; color: #1e293b; }}
.tokens span {{ border-radius: .15rem; }}  svg {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
td {{ padding: .1rem 1.2rem .1rem 0; border-bottom: 1px solid #f1f5f9; vertical-align: top; }}
</style></head><body>
<h1>{title}</h1>
<div class="cards">{cards}</div>
<h2>Loss and load</h2>
{curves}
<h2>Held-out text by recursion depth</h2>
{tokens}
<h2>Configuration</h2>
<table>{fields}</table>
</body></html>
"""

_CARDS = (  # figure of the summary, label, format
    ("bpb_causal", "bits per byte, causal", ".3f"),
    ("bpb_oracle", "bits per byte, oracle", ".3f"),
    ("bpb_xz", "xz -9", ".3f"),
    ("bpb_gzip", "gzip -9", ".3f"),
    ("nll_causal", "nats per token, causal", ".3f"),
    ("agreement", "causal–oracle agreement", ".1%"),
    ("step", "steps", ",.0f"),
    ("train_tokens", "training tokens", ",.0f"),
    ("params", "parameters", ",.0f"),
    ("tokens_per_second", "tokens per second", ",.0f"),
    ("mfu", "MFU", ".1%"),
)


def write(workdir: str | os.PathLike, config: config_lib.Config, rows: Sequence[Mapping[str, float]],
          summary: Mapping[str, float], parts: Sequence[str], depths: Sequence[int]) -> epath.Path:
  """Writes the three files and returns the path of the page.

  Args:
    workdir: where to.
    config: the experiment.
    rows: lines of metrics.jsonl.
    summary: the final figures.
    parts: a held-out text, token by token.
    depths: recursion steps of each token.
  """
  workdir = paths.directory(workdir)
  r, title = config.model.num_recursions, describe(config.model)
  cards = "".join(f'<div class="card"><b>{summary[name]:{form}}</b><span>{label}</span></div>'
                  for name, label, form in _CARDS if name in summary)
  fields = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
                   for k, v in _flatten(config_lib.to_dict(config)))
  page = _PAGE.format(title=html.escape(title), cards=cards, curves=plots.curves(rows, r),
                      tokens=depth_lib.page(parts, depths, r), fields=fields)
  (workdir / "report.png").write_bytes(plots.overview(rows, r, parts, depths, title))
  (workdir / "summary.json").write_text(json.dumps(dict(summary), indent=2) + "\n", encoding="utf-8")
  (workdir / "report.html").write_text(page, encoding="utf-8")
  return workdir / "report.html"


def describe(model: config_lib.ModelConfig) -> str:
  """One line on what a model is."""
  size = f"D={model.d_model}, {model.num_layers} layers unrolled"
  if model.num_recursions == 1:
    return f"Transformer, {size}"
  if model.router.name == "fixed":
    return f"Recursive Transformer, R={model.num_recursions} {model.sharing}, {size}"
  return (f"Mixture-of-Recursions, R={model.num_recursions} {model.router.name}, "
          f"{model.kv_plan} keys, {model.sharing}, {size}")


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  return [pair for k, v in fields.items()
          for pair in (_flatten(v, f"{prefix}{k}.") if isinstance(v, dict) else [(f"{prefix}{k}", v)])]
