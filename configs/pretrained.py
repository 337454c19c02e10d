"""Any Llama as it is: `--config=pretrained:SOURCE`, SOURCE as in --source.

SOURCE is hf:FOLDER or gguf:FILE, of which only the sizes are read here. The model is
plain; to make it recursive, give for example --config.model.sharing=cycle
--config.model.num_recursions=2 --config.init.method=average --config.model.lora.q=64.

Hardware: what the model needs. Expected: the source's own predictions, until trained.

python -m mor.main --mode=convert --source=SOURCE --config=pretrained:SOURCE \\
  --workdir=WORKDIR --config.data.tokenizer=WORKDIR/tokenizer.json
"""

import dataclasses

import ml_collections

from mor import config as config_lib
from mor.conversion import command


def get_config(spec: str = "") -> ml_collections.ConfigDict:
  config = config_lib.default()
  if spec:
    fields = dataclasses.asdict(command.describe(spec))
    config.model.update(fields)
  config.data.update(seq_len=1024, batch_size=8)
  config.optim.update(learning_rate=2e-4, schedule="cosine")
  return config
