"""The end of a run: final figures, a report, and a sample coloured by depth."""

from collections.abc import Callable, Mapping
import os
from typing import Any

import jax
import numpy as np

from mor import config as config_lib
from mor import depth as depth_lib
from mor import distributed
from mor import report
from mor.train import evaluate as evaluate_lib
from mor.train import metrics as metrics_lib
from mor.train import sample as sample_lib

SAMPLE_TEMPERATURE = 0.8


def finish(config: config_lib.Config, workdir: str | os.PathLike, corpus: Any,
           evaluate: Callable[[], dict[str, float]], params: dict, balance: dict) -> tuple[dict[str, float], str]:
  """Writes the report; returns the final figures and the text to print.

  Process 0 does so alone, with the parameters whole in its memory; the others take part
  in the evaluation, hand over their parts, and return the held-out figures and no text.

  Args:
    config: the experiment.
    workdir: of the run.
    corpus: its data.
    evaluate: gives the held-out metrics; called where the run wrote none.
    params: trained.
    balance: token-choice's loss-free bias, or {}.
  """
  rows = metrics_lib.read(workdir) if distributed.main() else []
  held_out = _last_evaluation(rows, config.train.steps)
  if distributed.from_main(held_out is None):  # the metrics of a finished run were removed
    held_out = evaluate()
  params, balance = distributed.gather((params, balance))
  if not distributed.main():
    return held_out or {}, ""
  summary = summarize(config, rows, held_out, corpus.validation_text(), params)
  variables = {"params": params, "balance": balance}
  parts, depths = held_out_depths(config, variables, corpus)
  lines = [figures(summary)]
  if config.train.sample_prompt and config.train.sample_tokens:
    lines += ["", sample(config, variables, corpus.tokenizer, config.train.sample_prompt, config.train.sample_tokens,
                         SAMPLE_TEMPERATURE, config.seed)]
  page = report.write(workdir, config, metrics_lib.read(workdir), summary, parts, depths)
  lines += ["", f"report: {page}"]
  return summary, "\n".join(lines)


def summarize(config: config_lib.Config, rows: list[dict[str, float]], held_out: Mapping[str, float],
              held_out_text: str, params: dict) -> dict[str, float]:
  """The final figures: held-out loss, compressors on the same text, size, speed."""
  rates = {name: [row[f"train/{name}"] for row in rows if f"train/{name}" in row]
           for name in ("tokens_per_second", "mfu")}
  return {
      "step": config.train.steps,
      **held_out,
      **evaluate_lib.compressed_bits_per_byte(held_out_text),
      "params": sum(x.size for x in jax.tree.leaves(params)),
      "train_tokens": config.train.steps * config.data.batch_size * config.data.seq_len,
      **{name: float(np.median(values)) for name, values in rates.items() if values},
  }


def figures(summary: Mapping[str, float]) -> str:
  """Bits per byte, ours beside the compressors'."""
  labels = (("bpb_causal", "causal (honest: what generation can do)"), ("bpb_oracle", "oracle (routed as in training)"),
            ("bpb_gzip", "gzip -9"), ("bpb_xz", "xz -9"))
  rows = [f"  {summary[name]:6.3f}  {label}" for name, label in labels if name in summary]
  read = f"{summary['targets']:,.0f} tokens, {summary['bytes']:,.0f} bytes"
  return "\n".join([f"held-out bits per byte ({read}; compressors: the whole held-out text)", *rows])


def sample(config: config_lib.Config, variables: Mapping[str, Any], tokenizer: Any, prompt: str, max_tokens: int,
           temperature: float, seed: int) -> str:
  """A continuation of `prompt` whose tokens show their depth."""
  ids = sample_lib.generate(config, variables, tokenizer, prompt, max_tokens, temperature, seed)
  depths = depth_lib.depth_of_ids(config.model, variables, ids, config.data.seq_len)
  parts = depth_lib.pieces(tokenizer, ids.tolist())
  return depth_lib.terminal(parts, depths.tolist(), config.model.num_recursions, depth_lib.wanted())


def held_out_depths(config: config_lib.Config, variables: Mapping[str, Any],
                    corpus: Any) -> tuple[list[str], list[int]]:
  """The first held-out row, token by token, and each token's depth."""
  batch = next(iter(corpus.validation.in_order(1)))
  length = int(np.sum(batch["segment_BT"][0] != 0))
  depth_1T = depth_lib.depth(config.model, variables, batch["tokens_BT"], batch["segment_BT"])
  parts = depth_lib.pieces(corpus.tokenizer, batch["tokens_BT"][0, :length].tolist())
  return parts, np.asarray(depth_1T)[0, :length].tolist()


def _last_evaluation(rows: list[dict[str, float]], step: int) -> dict[str, float] | None:
  found = [row for row in rows if row["step"] == step and "eval/nll_causal" in row]
  return {k.removeprefix("eval/"): v for k, v in found[-1].items() if k != "step"} if found else None
