"""What the paper's models cost in chips and hours, for launch/README.md.

  python -m benchmarks.launch_costs

rewrites the table between `<!-- costs -->` and `<!-- end -->`. A run of S steps of
the paper's 1024 x 2048 tokens takes

  hours = S * tokens a step * FLOPs a token / (chips * peak * MFU * 3600)

with the FLOPs of forward and backward pass, head included, as `mor/costs.py`
counts them, and the peaks of the table that MFU is measured with.
"""

from collections.abc import Sequence
import pathlib
import re

from benchmarks import harness
from configs import paper
from mor import config as config_lib
from mor import costs
from mor.train import metrics

README = pathlib.Path(__file__).parents[1] / "launch" / "README.md"
MFU = 0.4  # of dense training; an assumption, not a measurement
# Slice, chips, and the device as jax names it. A v5p type counts cores, two a chip.
SLICES = (("v5e-256", 256, "TPU v5e"), ("v5p-64", 32, "TPU v5p"), ("v6e-64", 64, "TPU v6"), ("8 x H100", 8, "H100"))
MARKED = re.compile(r"(<!-- costs -->\n).*?(<!-- end -->)", re.DOTALL)


def hours(total_flops: float, chips: int, device: str, mfu: float = MFU) -> float:
  """Returns the hours of training at that share of the peak."""
  return total_flops / (chips * metrics.peak_flops(device) * mfu * 3600)


def cost(name: str) -> dict[str, float]:
  """Returns parameters, tokens and training FLOPs of a member of configs/paper.py."""
  config = config_lib.from_config_dict(paper.get_config(name))
  tokens = config.train.steps * config.data.batch_size * config.data.seq_len
  return {"parameters": sum(costs.parameter_count(config.model)), "tokens": tokens,
          "flops": tokens * costs.train_flops_per_token(config.model, config.data.seq_len)}


def table(names: Sequence[str]) -> str:
  """Returns the Markdown of a table with a row for each model."""
  head = ["model", "parameters", "tokens", "training FLOPs", *(f"{slice_}, hours" for slice_, _, _ in SLICES)]
  rows = []
  for name in names:
    one = cost(name)
    rows.append([name, f"{one['parameters'] / 1e6:.0f}M", f"{one['tokens'] / 1e9:.1f}B", f"{one['flops']:.2e}",
                 *(f"{hours(one['flops'], chips, device):.3g}" for _, chips, device in SLICES)])
  lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
  peaks = ", ".join(
      f"{slice_} {chips} chips of {metrics.peak_flops(device) / 1e12:.0f}" for slice_, chips, device in SLICES)
  return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "",
                    f"At {MFU:.0%} MFU, which is assumed; bfloat16 TFLOP/s: {peaks}.", ""])


def rewrite(text: str) -> str:
  """Returns the text with its table made anew.

  Raises:
    ValueError: it has no place for one.
  """
  if not MARKED.search(text):
    raise ValueError("no <!-- costs --> with <!-- end --> after it; add both, each on its own line")
  return MARKED.sub(lambda match: match[1] + table(paper.members()) + match[2], text)


def main(argv: list[str]) -> None:
  """Rewrites launch/README.md."""
  harness.Parser(prog="python -m benchmarks.launch_costs", description=__doc__.splitlines()[0]).parse_args(argv)
  README.write_text(rewrite(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
  harness.run(main)
