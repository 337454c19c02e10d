"""What the number formats of decoding cost in quality, on a trained model.

  python -m benchmarks.formats --workdir=runs/quickstart

Held-out rows are read token by token through the paged cache, first documents only,
in each format of weights and keys. `nll` is in nats per token; `same_token` and
`same_depth` are the fractions of tokens whose most likely successor, and whose
recursion depth, are those of float32.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from mor import run as run_lib
from mor.decode import decoder as decoder_lib
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.serve import generate
from mor.serve import model as model_lib

PAIRS = (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "bfloat16"))  # of weights, of keys


def score(model: model_lib.Model, weight_format: str, kv_format: str, tokens_BT: np.ndarray,
          target_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns NLL of the targets, the most likely tokens and the depths, each `[B, T]`."""
  config, (batch, seq_len), page_size = model.config, tokens_BT.shape, 64
  storage = storage_lib.Paged(page_size, config.num_kv_heads, config.head_dim, kv_format)
  decoder = decoder_lib.Decoder(config, storage)
  pages = -(-seq_len // page_size)

  @jax.jit
  def run(weights, tokens_TB, target_TB):
    cache = decoder.tables.make_cache(batch, batch * decoder.tables.num_rows * pages, batch * pages, pages)

    def turn(cache, inputs):
      token_B, target_B, position = inputs
      position_B = jnp.full(batch, position, jnp.int32)
      cache, logits_BV, depth_B = generate.advance(decoder, weights, cache, token_B, position_B, position_B >= 0)
      log_BV = jax.nn.log_softmax(logits_BV)
      nll_B = -jnp.take_along_axis(log_BV, target_B[:, None], axis=1)[:, 0]
      return cache, (nll_B, jnp.argmax(logits_BV, axis=1), depth_B)

    return jax.lax.scan(turn, cache, (tokens_TB, target_TB, jnp.arange(seq_len)))[1]

  out = run(weights_lib.prepare(config, model.variables, weight_format), jnp.asarray(tokens_BT.T),
            jnp.asarray(target_BT.T))
  return tuple(np.asarray(x).T for x in out)


def main(argv: list[str]) -> None:
  """Scores and writes the record."""
  parser = harness.Parser(prog="python -m benchmarks.formats", description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", required=True, help="a trained run")
  parser.add_argument("--rows", type=int, default=24, help="held-out rows")
  parser.add_argument("--out", default="", help="JSON file; default standard output")
  args = parser.parse_args(argv)
  if args.rows < 1:
    raise ValueError(f"--rows={args.rows}; use 1 or more")
  model, config = model_lib.open_run(args.workdir)
  batch = next(iter(run_lib.load_corpus(args.workdir, config).validation.in_order(args.rows)))
  tokens_BT, target_BT, first_BT = batch["tokens_BT"], batch["target_BT"], batch["segment_BT"] == 1
  rows, right = [], None
  for weight_format, kv_format in PAIRS:
    nll_BT, token_BT, depth_BT = score(model, weight_format, kv_format, tokens_BT, target_BT)
    right = right or (token_BT, depth_BT)
    rows.append({"weights": weight_format, "keys": kv_format, "nll": float(nll_BT[first_BT].mean()),
                 "same_token": float((token_BT == right[0])[first_BT].mean()),
                 "same_depth": float((depth_BT == right[1])[first_BT].mean())})
  sizes = {"rows": len(tokens_BT), "seq_len": tokens_BT.shape[1], "tokens": int(first_BT.sum())}
  harness.write(harness.header("formats", argv, "float32", sizes) | {"formats": rows}, args.out)


NOTE = (
    "{sizes[tokens]:,} held-out tokens of the quickstart's model.")


def table(record: dict) -> list[list[str]]:
  """Returns header and rows: quality of the number formats."""
  rows = [[row["weights"], row["keys"], f"{row['nll']:.4f}", f"{row['same_token']:.4f}", f"{row['same_depth']:.4f}"]
          for row in record["formats"]]
  return [["weights", "keys", "nats per token", "same token", "same depth"], *rows]


if __name__ == "__main__":
  harness.run(main)
