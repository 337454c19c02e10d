"""SmolLM2-135M-Instruct, post-trained for early exit: `--config=configs/exit_smollm2.py:MODEL`.

MODEL  full        30 layers, exits after 10 and 20
       r3          10 layers three times, an exit after the first loop

The start is a converted or uptrained run of the same MODEL; see configs/uptrain_smollm2.py:

  M="python -m mor.main --source=gguf:SmolLM2-135M-Instruct.Q4_1.gguf --mode=convert"
  $M --config=configs/uptrain_smollm2.py:full --workdir=runs/smollm2
  $M --config=configs/exit_smollm2.py:full --workdir=runs/smollm2-exit
  python -m mor.main --config=configs/exit_smollm2.py:full --workdir=runs/smollm2-exit

The exit learns the end's distribution (exit.kl=1, detached), at the weight of the end's
own loss: a small budget has to be spent where it is needed.

Decoded text is the model's own, so its answers teach best what will be drafted. The
committed figures are of 1,000 answers of 160 tokens to openings of paragraphs of the books:

  python -m mor.main --mode=generate --workdir=runs/smollm2 --prompt_file=openings.jsonl \\
    --max_tokens=160 --weight_format=bfloat16 --context=256 > runs/generated.jsonl
  … --config.data.source=runs/generated.jsonl --config.data.validation_source= \\
    --config.exit.layers='(10,)' --config.train.steps=96      (56 steps, on the first 320)
  … --mode=convert --source=mor:WORKDIR, then as before with --config.train.steps=192 \\
    --config.optim.learning_rate=4e-4                         (144 steps, on all)
  … --mode=convert --source=mor:WORKDIR, then once more with --config.train.steps=144 \\
    --config.optim.learning_rate=4e-4 --config.data.shuffle_seed=1
  … --mode=convert --source=mor:WORKDIR, then with both exits, --config.train.steps=160 \\
    --config.optim.learning_rate=4e-4 --config.data.shuffle_seed=2

That is 504 steps of 1,024 tokens. The exit after 10 layers agrees with the end on 45, 51, 54 % of the
tokens of held-out answers after 48, 96, 144 steps of the second part, and on 56 and 58 % of answers
to openings of unseen books and speeches after the third and the fourth. The exit after 20 layers
agrees there on 71 % after 40 steps of the fourth part, and on 78 % after all.

Those of r3 are after 56 steps, from a stepwise start, on all answers:

  … --mode=convert --source=mor:runs/smollm2 --config=configs/exit_smollm2.py:r3, then as before with
    --config.train.steps=56 --config.optim.learning_rate=6e-4

Hardware: 2 CPU cores, 128 steps of 4 x 256 tokens, 20 to 30 minutes and 5 GB.
"""

import ml_collections

from configs import uptrain_smollm2

_EXITS = {"full": (10, 20), "r3": (10,)}


def get_config(model: str = "full") -> ml_collections.ConfigDict:
  if model not in _EXITS:
    raise ValueError(f"model {model!r}; use one of {', '.join(_EXITS)}")
  config = uptrain_smollm2.get_config(model)
  config.distill.update(teacher="")
  config.exit.update(layers=_EXITS[model], weighting="constant", coef=1.0, kl=1.0)
  config.optim.update(learning_rate=3e-4, warmup_steps=6)
  config.train.update(steps=128, eval_every=32, checkpoint_every=32, log_every=4, eval_rows=16)
  return config
