"""The end of a run: its final figures, a sample coloured by depth, and its report.

The report is report.html (one file that loads nothing), report.png and summary.json.
`train.loop.train` takes `finish` as an argument, so training does not import reports.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import html
import json
import os
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from mor import config as config_lib
from mor import depth as depth_lib
from mor import distributed
from mor import paths
from mor import plots
from mor import types
from mor.model import kernels
from mor.model import transformer
from mor.model.routers import table as router_table
from mor.train import evaluate as evaluate_lib
from mor.train import metrics as metrics_lib
from mor.train import task_figures

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
    ("accuracy_causal", "answers right, causal", ".1%"),
    ("accuracy_oracle", "answers right, oracle", ".1%"),
    ("agreement", "causal–oracle agreement", ".1%"),
    ("step", "steps", ",.0f"),
    ("train_tokens", "training tokens", ",.0f"),
    ("params", "parameters", ",.0f"),
    ("tokens_per_second", "tokens per second", ",.0f"),
    ("mfu", "MFU", ".1%"),
)
SAMPLE_TEMPERATURE = 0.8


def finish(config: config_lib.Config, workdir: str | os.PathLike, corpus: Any,
           evaluate: Callable[[], dict[str, float]], params: dict, balance: dict) -> tuple[dict[str, float], str]:
  """Writes the report; returns the final figures and the text to print.

  Process 0 alone writes the report, with whole parameters in its memory. The other
  processes take part in the evaluation, send their shards of the parameters, and return
  the held-out figures and no text.

  Args:
    config: the experiment.
    workdir: run directory.
    corpus: data of the run.
    evaluate: function that returns the held-out metrics; called if the run wrote none.
    params: trained parameters.
    balance: loss-free bias of token-choice, or {}.
  """
  rows = metrics_lib.read(workdir) if distributed.is_main() else []
  held_out = _last_evaluation(rows, config.train.steps)
  if distributed.from_main(held_out is None):  # the metrics of a finished run were removed
    held_out = evaluate()
  params, balance = distributed.gather((params, balance))
  if not distributed.is_main():
    return held_out or {}, ""
  summary = summarize(config, rows, held_out, corpus.validation_text(), params)
  variables = {"params": params, "balance": balance}
  parts, depths = measure_held_out(config, variables, corpus)
  lines = [format_figures(summary)]
  if "accuracy_causal" in summary:  # a task: its questions are no text to be continued
    lines += ["", depth_lib.format_terminal(parts, depths, config.model.num_recursions, depth_lib.wants_colour())]
  elif config.train.sample_prompt and config.train.sample_tokens:
    lines += ["", format_sample(config, variables, corpus.tokenizer, config.train.sample_prompt,
                                config.train.sample_tokens, SAMPLE_TEMPERATURE, config.seed)]
  page = write(workdir, config, metrics_lib.read(workdir), summary, parts, depths)
  lines += ["", f"report: {page}"]
  return summary, "\n".join(lines)


def summarize(config: config_lib.Config, rows: list[dict[str, float]], held_out: Mapping[str, float],
              held_out_text: str, params: dict) -> dict[str, float]:
  """Returns the final figures: held-out loss, compressors on the same text if it is text, size, speed."""
  rates = {name: [row[f"train/{name}"] for row in rows if f"train/{name}" in row]
           for name in ("tokens_per_second", "mfu")}
  return {
      "step": config.train.steps,
      **held_out,
      **(evaluate_lib.compressed_bits_per_byte(held_out_text) if "bytes" in held_out else {}),
      "params": sum(x.size for x in jax.tree.leaves(params)),
      "train_tokens": config.train.steps * config.data.batch_size * config.data.seq_len,
      **{name: float(np.median(values)) for name, values in rates.items() if values},
  }


def format_figures(summary: Mapping[str, float]) -> str:
  """Formats the bits per byte of the model and of the compressors; of a task, the accuracy by difficulty."""
  if "accuracy_causal" in summary:
    lines = [f"  {name}: {task_figures.describe(summary, name)}" for name in ("causal", "oracle")
             if f"accuracy_{name}" in summary]
    return "\n".join([f"held-out answers that are right, and by difficulty ({summary['targets']:,.0f} answers)", *lines])
  labels = (("bpb_causal", "causal (honest: what generation can do)"), ("bpb_oracle", "oracle (routed as in training)"),
            ("bpb_gzip", "gzip -9"), ("bpb_xz", "xz -9"))
  rows = [f"  {summary[name]:6.3f}  {label}" for name, label in labels if name in summary]
  read = f"{summary['targets']:,.0f} tokens, {summary['bytes']:,.0f} bytes"
  return "\n".join([f"held-out bits per byte ({read}; compressors: the whole held-out text)", *rows])


def format_sample(config: config_lib.Config, variables: Mapping[str, Any], tokenizer: Any, prompt: str, max_tokens: int,
                  temperature: float, seed: int) -> str:
  """Continues `prompt`, and formats the text with the depth of each token."""
  ids = generate_ids(config, variables, tokenizer, prompt, max_tokens, temperature, seed)
  depths = depth_lib.measure_ids(config.model, variables, ids, config.data.seq_len)
  parts = depth_lib.split_by_token(tokenizer, ids.tolist())
  return depth_lib.format_terminal(parts, depths.tolist(), config.model.num_recursions, depth_lib.wants_colour())


def measure_held_out(config: config_lib.Config, variables: Mapping[str, Any],
                     corpus: Any) -> tuple[list[str], list[int]]:
  """Returns the text of each token of the first held-out row, and its depth."""
  batch = next(iter(corpus.validation.in_order(1)))
  length = int(np.sum(batch["segment_BT"][0] != 0))
  depth_1T = depth_lib.measure(config.model, variables, batch["tokens_BT"], batch["segment_BT"])
  parts = depth_lib.split_by_token(corpus.tokenizer, batch["tokens_BT"][0, :length].tolist())
  return parts, np.asarray(depth_1T)[0, :length].tolist()


def generate_ids(config: config_lib.Config, variables: Mapping[str, Any], tokenizer: Any, prompt: str, max_tokens: int,
                 temperature: float, seed: int) -> np.ndarray:
  """Continues `prompt` without a cache: one jitted forward pass with causal routing per token.

  The pass reads a buffer of `seq_len` positions. A longer text is continued from its last
  `seq_len` tokens, whose positions restart at 0.

  Args:
    config: the experiment.
    variables: {"params": …} and, where the model has one, {"balance": …}.
    tokenizer: tokenizer of the training data.
    prompt: beginning of a document.
    max_tokens: new tokens at most; the end of the document stops earlier.
    temperature: 0 takes the most likely token.
    seed: seed of the samples.

  Returns:
    Ids of the opening token of a document, the prompt and the new tokens.

  Raises:
    ValueError: `max_tokens` or `temperature` is negative.
  """
  if max_tokens < 0 or temperature < 0:
    raise ValueError(f"max_tokens={max_tokens}, temperature={temperature}; use values >= 0")
  seq_len, key = config.data.seq_len, jax.random.key(seed)
  ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
  for i in range(max_tokens):
    window = ids[-seq_len:]
    tokens_1T = np.zeros((1, seq_len), np.int32)
    tokens_1T[0, :len(window)] = window
    token = int(_next(config.model, tokenizer.vocab_size, variables, jnp.asarray(tokens_1T),
                      jnp.int32(len(window)), jnp.float32(temperature), jax.random.fold_in(key, i)))
    if token == tokenizer.eos_id:
      break
    ids.append(token)
  return np.asarray(ids, np.int32)


def write(workdir: str | os.PathLike, config: config_lib.Config, rows: Sequence[Mapping[str, float]],
          summary: Mapping[str, float], parts: Sequence[str], depths: Sequence[int]) -> epath.Path:
  """Writes the three files and returns the path of the page.

  Args:
    workdir: run directory.
    config: the experiment.
    rows: lines of metrics.jsonl.
    summary: final figures.
    parts: text of each token of a held-out row.
    depths: depth of each token.
  """
  workdir = paths.directory(workdir)
  r, title = config.model.num_recursions, describe(config.model)
  cards = "".join(f'<div class="card"><b>{summary[name]:{form}}</b><span>{label}</span></div>'
                  for name, label, form in _CARDS if name in summary)
  fields = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>"
                   for k, v in _flatten(config_lib.to_dict(config)))
  page = _PAGE.format(title=html.escape(title), cards=cards, curves=plots.curves(rows, r),
                      tokens=depth_lib.format_page(parts, depths, r), fields=fields)
  (workdir / "report.png").write_bytes(plots.overview(rows, r, parts, depths, title))
  (workdir / "summary.json").write_text(json.dumps(dict(summary), indent=2) + "\n", encoding="utf-8")
  (workdir / "report.html").write_text(page, encoding="utf-8")
  return workdir / "report.html"


def describe(model: config_lib.ModelConfig) -> str:
  """Describes a model in one line."""
  size = f"D={model.d_model}, {model.num_layers} layers unrolled"
  if model.num_recursions == 1:
    return f"Transformer, {size}"
  if not router_table.make(model).routes:
    return f"Recursive Transformer, R={model.num_recursions} {model.sharing}, {size}"
  return (f"Mixture-of-Recursions, R={model.num_recursions} {model.router.name}, "
          f"{model.kv_plan} keys, {model.sharing}, {size}")


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  return [pair for k, v in fields.items()
          for pair in (_flatten(v, f"{prefix}{k}.") if isinstance(v, dict) else [(f"{prefix}{k}", v)])]


def _last_evaluation(rows: list[dict[str, float]], step: int) -> dict[str, float] | None:
  found = [row for row in rows if row["step"] == step and "eval/nll_causal" in row]
  return {k.removeprefix("eval/"): v for k, v in found[-1].items() if k != "step"} if found else None


@functools.partial(jax.jit, static_argnums=(0, 1))
@kernels.full_precision
def _next(model: config_lib.ModelConfig, vocab_size: int, variables: Mapping[str, Any], tokens_1T: types.Tokens,
          length: jax.Array, temperature: jax.Array, key: jax.Array) -> jax.Array:
  """Samples the token after the first `length` tokens."""
  segment_1T = (jnp.arange(tokens_1T.shape[1]) < length).astype(jnp.int32)[None]
  out = transformer.Transformer(model).apply(
      variables, tokens_1T, segment_1T, routing="decide", key=jax.random.key(0))
  last_11D = jax.lax.dynamic_slice_in_dim(out.hidden_BTD, length - 1, 1, axis=1)
  logits_V = transformer.unembed(variables["params"], last_11D)[0, 0]
  # The vocabulary of the model may be larger than that of the tokenizer.
  logits_V = jnp.where(jnp.arange(model.vocab_size) < vocab_size, logits_V, -jnp.inf)
  drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)
