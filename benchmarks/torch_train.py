"""Times training steps of a Llama in PyTorch: what a user would run instead of ours.

  python -m benchmarks.torch_train --num_layers=26 --d_model=2048 …

`LlamaForCausalLM` of transformers, whole under `torch.compile`, PyTorch's own
attention, float32 parameters under autocast to bfloat16, clipping and fused AdamW, on
random tokens that are there already. It writes one JSON object to standard output;
`benchmarks.train --peer=1` runs it, in a process of its own, before our steps.
"""

import json
import logging
import sys
from typing import Any

from benchmarks import harness
from benchmarks import peers

SIZES = ("vocab_size", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "num_layers", "seq_len", "batch")
WARM_UP = 3  # steps that are not counted, the compiling one among them


def parse(argv: list[str]):
  """Reads the options; every size must be given."""
  parser = harness.Parser(prog="python -m benchmarks.torch_train", description=__doc__.splitlines()[0])
  for name in SIZES:
    parser.add_argument(f"--{name}", type=int, required=True)
  parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the computation")
  parser.add_argument("--remat", type=int, default=0, choices=[0, 1], help="1 recomputes every layer's forward")
  parser.add_argument("--rounds", type=int, default=10, help="timed steps")
  return parser.parse_args(argv)


def make_step(args) -> Any:
  """Returns a function that takes one training step and returns its loss."""
  import torch  # pylint: disable=g-import-not-at-top
  import transformers  # pylint: disable=g-import-not-at-top

  device = "cuda" if torch.cuda.is_available() else "cpu"
  torch.manual_seed(0)
  torch.set_float32_matmul_precision("high")
  config = peers.llama_config(args, tie_word_embeddings=True, use_cache=False, max_position_embeddings=args.seq_len)
  with torch.device(device):
    model = transformers.LlamaForCausalLM(config)
    input_BT = torch.randint(args.vocab_size, (args.batch, args.seq_len))
  model.train()
  if args.remat:
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
  optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
  forward = torch.compile(model, dynamic=False) if device == "cuda" else model

  def step():
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype=getattr(torch, args.dtype), enabled=args.dtype != "float32"):
      loss = forward(input_ids=input_BT, labels=input_BT).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach().item()  # waits for the device

  return step


def main(argv: list[str]) -> None:
  """Times the steps and prints what they took."""
  args = parse(argv)
  logging.getLogger("transformers").setLevel(logging.ERROR)
  import torch  # pylint: disable=g-import-not-at-top
  import transformers  # pylint: disable=g-import-not-at-top

  step, losses = make_step(args), []

  def run():
    losses.append(step())
    if torch.cuda.is_available():
      torch.cuda.synchronize()

  program = harness.Program("torch", run)
  harness.take_turns([program], WARM_UP + args.rounds)
  seconds = program.wall
  json.dump({
      "program": "transformers LlamaForCausalLM", "torch": torch.__version__, "transformers": transformers.__version__,
      "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
      "remat": bool(args.remat), "compile_seconds": seconds[0], "seconds": seconds[WARM_UP:], "losses": losses,
      "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
  }, sys.stdout)


if __name__ == "__main__":
  harness.run(main)
