"""Rewrites the tables of docs/ from the results that were measured.

  python -m benchmarks.tables

Between `<!-- table:NAME -->` and the next `<!-- end -->` stands the table of
`benchmarks/results/NAME.json`, in the form of the benchmark that made it, under
a line that says how. Nothing else changes.
"""

from collections.abc import Callable
import json
import pathlib
import re

from benchmarks import harness as results
from mor.study import report as study_report

MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def train_throughput(record: dict) -> list[list[str]]:
  """Header and rows: time, FLOPs and memory of a step against the first model's."""
  head = ["model", "parameters*", "seconds a step", "time ratio (min–max)", "FLOP ratio: causal, executed",
          "time / FLOP ratio", "peak memory ratio"]
  rows, known = [], "mfu" in record["models"][0]
  for row in record["models"]:
    ratio, seconds = row[f"{record['clock']}_ratio"], row[f"{record['clock']}_seconds"]
    rows.append([
        row["model"],
        f"{row['parameters_non_embedding'] / 1e6:.1f}M",
        f"{seconds['median']:.3g}",
        f"{ratio['median']:.3f} ({ratio['min']:.3f}–{ratio['max']:.3f})",
        f"{row['flops_ratio']:.3f}, {row['flops_executed_ratio']:.3f}",
        f"{row['step_per_flops']:.3f}, {row['step_per_flops_executed']:.3f}",
        f"{row['peak_memory_bytes_ratio']:.3f}",
        *([f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.3f}"] if known else []),
    ])
  if "peer" in record:
    peer, first = record["peer"], record["models"][0]
    rows.append([f"{peer['program']}, PyTorch {peer['torch']}", rows[0][1], f"{peer['wall_seconds']['median']:.3g}",
                 f"{first['tokens_per_second'] / peer['tokens_per_second']:.3f}", "", "",
                 f"{peer['peak_memory_bytes'] / first['peak_memory_bytes']:.3f}" if peer["peak_memory_bytes"] else "",
                 *([f"{peer['tokens_per_second']:,.0f}", f"{peer['mfu']:.3f}"] if known else [])])
  return [head + ["tokens/s", "MFU"] * known, *rows]


def quickstart(record: dict) -> list[list[str]]:
  """Header and rows: held-out bits per byte beside the compressors'."""
  labels = dict(bpb_causal="this model, causal routing", bpb_oracle="this model, oracle routing",
                bpb_xz="`xz -9`", bpb_gzip="`gzip -9`")
  rows = [[label, f"{record['summary'][name]:.3f}"] for name, label in labels.items()]
  return [["held-out text", "bits per byte"], *rows]


def decode_throughput(record: dict) -> list[list[str]]:
  """Header and rows: engines or peers by batch, and the gain of depth beside its ceiling."""
  number = lambda spread: f"{spread['median']:.0f} ({spread['min']:.0f}–{spread['max']:.0f})"
  if "peers" in record:
    rows = [[str(batch["batch"]), name, number(rate), f"{rate['median'] / best['median']:.2f}"]
            for batch in record["peers"] for best in [batch["tokens_per_second"][batch["best_peer"]]]
            for name, rate in batch["tokens_per_second"].items()]
    return [["batch", "program", "tokens/s (min–max)", "to the best peer"], *rows]
  rows = []
  for batch in record["batches"]:
    gains = {gain["routed"]: gain for gain in batch["gains"]}
    for row in batch["variants"]:
      gain, metrics = gains.get(row["variant"]), row["metrics"]
      depth = ["", ""]
      if gain:  # the same b in both runs, and each run's own
        depth = [f"{gain['gain']['median']:.3f}", " / ".join(
            f"{gain[name]:.3f} ({gain['gain']['median'] / gain[name]:.3f})" for name in ("ceiling_one_pass", "ceiling"))]
      rows.append([
          str(batch["batch"]), row["variant"], number(row["tokens_per_second"]), f"{metrics['mean_depth']:.2f}",
          f"{metrics['slot_utilisation']:.3f}", *depth])
  return [["batch", "engine", "tokens/s (min–max)", "mean depth", "slots in use", "gain of depth",
           "ceiling (gain / ceiling): one b, two"], *rows]


def formats(record: dict) -> list[list[str]]:
  """Header and rows: quality of the number formats."""
  rows = [[row["weights"], row["keys"], f"{row['nll']:.4f}", f"{row['same_token']:.4f}", f"{row['same_depth']:.4f}"]
          for row in record["formats"]]
  return [["weights", "keys", "nats per token", "same token", "same depth"], *rows]


def throughput_k2(record: dict) -> list[list[str]]:
  """Header and rows: the simulator beside the paper."""
  rows = [[row["name"], f"{row['published']:g}", f"{row['simulated']:.4g}", f"{100 * row['error']:+.2f} %", row["given"]]
          for row in record["rows"]]
  return [["figure", "published", "simulated", "error", "given"], *rows]


def pretrained(record: dict) -> list[list[str]]:
  """Header and rows: loss of a pretrained model made recursive, by method, recursions and rank."""
  ranks = list(record["initialised"][0]["nll"])
  rows = [[f"R = {row['num_recursions']}, {row['method']}", *(f"{row['nll'][rank]:.2f}" for rank in ranks),
           f"{row['full_rank_logits_difference']:.1e}"] for row in record["initialised"]]
  head = ["before training, nats per token", *(f"rank {rank}" for rank in ranks), "full rank's logits − source's"]
  return [head, *rows]


def uptraining(record: dict) -> list[list[str]]:
  """Header and rows: loss before and after, time and memory of a step."""
  rows = [[row["run"], f"{row['parameters'] / 1e6:.0f}M", f"{row['nll_before']:.3f}", f"{row['nll_after']:.3f}",
           f"{row['step_seconds']:.1f}", f"{row['temporary_bytes'] / 2**30:.2f}", f"{row['teacher_bytes'] / 2**30:.2f}"]
          for row in record["runs"]]
  return [["model / initialisation", "parameters", "nats before", "nats after", "seconds a step", "GiB of a step",
           "GiB of the teacher"], *rows]


def early_exit(record: dict) -> list[list[str]]:
  """Header and rows: each kind of request by batch, its speed and its quality."""
  number = lambda value, form=".3f": "" if value is None else format(value, form)
  rates = "wall_tokens_per_second" if record.get("clock") == "wall" else "tokens_per_second"
  rows = []
  for batch in record["batches"]:
    for row in batch["variants"]:
      rate, ratio, scores = row[rates], row["to_full"], row["scores"]
      rows.append([
          str(batch["batch"]), row["variant"], f"{rate['median']:.1f}",
          f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})", number(row["exit_rate"], ".2f"),
          number(row["acceptance"], ".2f"), number(row["confirmed_per_token"], ".2f"), number(row["agreement"]["equal"], ".2f"),
          number(row["nll"], ".2f"), number(scores.get("squad", {}).get("f1")),
          number(scores.get("lambada", {}).get("last_word"))])
  return [["batch", "requests", "tokens/s", "to full (min–max)", "tokens from exits", "drafts confirmed",
           "confirmed a token", "tokens as full's", "nats a token", "SQuAD F1", "LAMBADA"], *rows]


def compile_table(record: dict) -> list[list[str]]:
  """Header and rows: a chip's memory, the collectives and the bound of a step, by model and slice."""
  head = ["model", "slice", "chips", "GiB a chip (of)", "parameter gathers, GiB", "reductions, GiB", "step >=, s",
          "MFU <=", "bound by"]
  rows = []
  for cell in record["cells"]:
    moved = {kind: one["bytes"] / 2**30 for kind, one in cell["step"]["collectives"].items()}
    bound = cell["bound"]
    limit = max(("compute", "memory", "collectives"), key=lambda name: bound[f"{name}_seconds"])
    rows.append([
        cell["model"], cell["slice"], str(cell["chips"]),
        f"{cell['step']['hbm_bytes']['total'] / 2**30:.1f} ({cell['hbm_of_a_chip'] / 2**30:.0f})",
        f"{moved.get('all-gather', 0.0):.1f}",
        f"{moved.get('reduce-scatter', 0.0) + moved.get('all-reduce', 0.0):.1f}",
        f"{bound['step_seconds']:.2f}", f"{bound['mfu']:.2f}", limit])
  return [head, *rows]


FORMS: dict[str, Callable[[dict], list[list[str]]]] = {
    "quickstart": quickstart, "train_throughput": train_throughput, "decode_throughput": decode_throughput,
    "throughput_k2": throughput_k2, "formats": formats, "pretrained": pretrained, "uptraining": uptraining,
    "early_exit": early_exit, "compile_table": compile_table}
NOTES = {
    "quickstart": "{summary[params]:,.0f} parameters, {sizes[steps]} steps of {sizes[batch]} x {sizes[seq_len]} tokens "
                  "({summary[train_tokens]:,.0f} in all), mean depth {mean_depth:.2f} of {sizes[num_recursions]}.",
    "train_throughput": "*without the embedding. Whole steps of {sizes[batch]} x {sizes[seq_len]} tokens, "
                        "{sizes[num_layers]} unrolled layers, D={sizes[d_model]}, V={sizes[vocab_size]}; medians of "
                        "{rounds} rounds in turn, {clock} time, load average {load_average:.1f}.",
    "decode_throughput": "{sizes[shape]} shape, {sizes[mix]} requests, random weights; medians of {sizes[rounds]} rounds "
                         "in turn, {clock} time, load average {load_average:.1f}.",
    "formats": "{sizes[tokens]:,} held-out tokens of the quickstart's model.",
    "pretrained": "{sizes[source]}, {sizes[tokens]:,} tokens of books, on which the model itself is at the full rank's "
                  "loss.",
    "uptraining": "{sizes[steps]} steps of {sizes[batch]} x {sizes[seq_len]} tokens of books, learning rate "
                  "{sizes[learning_rate]}; the model itself is at {source_nll:.3f} on the same {sizes[eval_rows]} rows.",
    "early_exit": "{model}, exits after {sizes[after]}; {sizes[prompt_tokens]} prompt and {sizes[new_tokens]} new tokens, "
                  "medians of {sizes[rounds]} rounds in turn.",
    "compile_table": "Whole steps of the paper's 1,024 x {sizes[seq_len]} tokens, parameters split over the chips of a "
                     "slice, micro-batches of {sizes[rows_of_a_chip]} rows a chip, compiled for TPUs on",
    "throughput_k2": "Relaxed Recursive Transformers, Table K.2; {sizes[requests]} requests.",
}


def rewrite(text: str, directory: pathlib.Path) -> str:
  """The text with every marked table made anew.

  Raises:
    ValueError: a marked table has no result, or no end.
  """
  found = MARKED.findall(text)
  if len(found) != len(re.findall(r"<!-- table:", text)):
    raise ValueError("a <!-- table:NAME --> has no <!-- end --> after it; add one on its own line")
  return MARKED.sub(lambda match: match[1] + table(match[2], directory) + match[3], text)


def table(name: str, directory: pathlib.Path) -> str:
  """Markdown of `NAME.json`: the table, and how it was measured."""
  path = directory / f"{name}.json"
  if not path.is_file():
    raise ValueError(f"table:{name} has no {path}; run its benchmark with --out={path}")
  record = json.loads(path.read_text(encoding="utf-8"))
  if "study" in record:
    return study_report.tables(record)
  benchmark = record["benchmark"]
  head, *rows = FORMS[benchmark](record)
  lines = [head, ["---"] * len(head), *rows]
  made = (f"{record['processor'] if record['device'] == 'cpu' else record['device']}, "
          f"{record['cores_used']} of {record['cores']} cores, {record['dtype']}, JAX {record['jax']}, "
          f"commit {record['commit']}")
  flags = f"XLA_FLAGS={record['xla_flags']} " if "xla_flags" in record else ""
  return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "",
                    f"{NOTES[benchmark].format(**record)} {made}:", f"`{flags}{record['command']}`", ""])


def main(argv: list[str]) -> None:
  """Rewrites the pages of docs/."""
  results.Parser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0]).parse_args(argv)
  for page in sorted((results.ROOT / "docs").glob("*.md")):
    page.write_text(rewrite(page.read_text(encoding="utf-8"), results.DIRECTORY), encoding="utf-8")


if __name__ == "__main__":
  results.run(main)
