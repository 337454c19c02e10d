"""SmolLM2-135M-Instruct, post-trained for early exit: `--config=exit_smollm2:MODEL`.

MODEL  full        30 layers, exits after 10 and 20
       r3          10 layers three times, an exit after the first loop
       full-gpu    30 layers, exits after 5, 10 and 20; the end is taught by the model it was
       r3-gpu      10 layers three times, exits after both inner loops; taught by the 30 layers

An exit learns the end's distribution (exit.kl=1, detached), at the weight of the end's own loss.
The start is converted; see configs/uptrain_smollm2.py:

  M="python -m mor.main --source=gguf:SmolLM2-135M-Instruct.Q4_1.gguf --mode=convert"
  $M --config=uptrain_smollm2:full --workdir=runs/smollm2
  $M --config=exit_smollm2:full --workdir=runs/smollm2-exit
  python -m mor.main --config=exit_smollm2:full --workdir=runs/smollm2-exit

Hardware of full and r3: 2 CPU cores, 128 steps of 4 x 256 tokens, 20 to 30 minutes and 5 GB.

Decoded text is the model's own, so its answers teach best what will be drafted. Those
with -gpu read 20,480 answers of up to 128 tokens, and beginnings of 400 books, 5 M
tokens in all:

  python -m benchmarks.exit_texts --books='data/books/train-*.jsonl.xz' --out=runs/exit-texts \\
    --num=20480 --parts=16
  for i in $(seq 0 15); do python -m mor.main --mode=generate --workdir=runs/smollm2 --batching=none \\
    --context=192 --weight_format=bfloat16 --prompt_file=runs/exit-texts/openings-$i.jsonl \\
    > runs/exit-texts/answers-$i.jsonl; done
  python -m benchmarks.exit_texts --answers=runs/exit-texts --out=runs/exit-texts
  C="--config=exit_smollm2:full-gpu --workdir=runs/smollm2-exit-full"
  python -m mor.main --mode=convert --source=mor:runs/smollm2 $C
  python -m mor.main $C

That is 2,000 steps of 64 x 256 tokens. Of held-out text of both kinds the exits after 5, 10
and 20 layers then agree with the end on 67, 69 and 80 % of the tokens. For r3-gpu the
committed figures are of --config.train.steps=850 --config.optim.learning_rate=1.2e-3: its
exits agree on 92 and 96 %, because the loops after the first add nothing after so few
steps (3.21 nats at the first exit, 3.22 at the end, 2.73 for the 30 layers).

Hardware of full-gpu and r3-gpu: one H200, two minutes for the answers (eight files at
once), five for full-gpu and two for r3-gpu; with less memory, a smaller data.batch_size.
"""

import ml_collections

from mor import experiments

_EXITS = {"full": (10, 20), "r3": (10,)}
_GPU_EXITS = {"full": (5, 10, 20), "r3": (10, 20)}


def get_config(model: str = "full") -> ml_collections.ConfigDict:
  name, gpu = model.removesuffix("-gpu"), model.endswith("-gpu")
  if name not in _EXITS:
    raise ValueError(f"model {model!r}; use one of {', '.join(_EXITS)}, or one of these with -gpu")
  config = experiments.read(f"uptrain_smollm2:{name}")
  config.exit.update(layers=(_GPU_EXITS if gpu else _EXITS)[name], weighting="constant", coef=1.0, kl=1.0)
  if gpu:
    config.model.compute_dtype = "bfloat16"
    config.distill.update(teacher="runs/smollm2", weight=1.0)
    config.data.update(source="runs/exit-texts/texts-*.jsonl", validation_source="", validation_fraction=0.02,
                       max_bytes=0, batch_size=64)
    config.optim.update(learning_rate=8e-4, warmup_steps=100)
    config.train.update(steps=2000, eval_every=500, checkpoint_every=1000, log_every=50, eval_rows=64, loss_block=4096)
  else:
    config.distill.update(teacher="")
    config.optim.update(learning_rate=3e-4, warmup_steps=6)
    config.train.update(steps=128, eval_every=32, checkpoint_every=32, log_every=4, eval_rows=16)
  return config
