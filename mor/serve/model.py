"""A trained model ready to be asked: `mor.load(workdir).generate(["Once upon a time"])`."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
from typing import Any

import jax

from mor import checkpoint
from mor import config as config_lib
from mor import run as run_lib
from mor.decode import decoder as decoder_lib
from mor.decode import storage as storage_lib
from mor.decode import weights as weights_lib
from mor.exits import stored as stored_lib
from mor.serve import generate as generate_lib
from mor.serve import request as request_lib
from mor.serve import sizes


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
  """A model and what its tokens mean.

  Attributes:
    config: of the model.
    variables: {"params": …} and, where the model has one, {"balance": …}.
    tokenizer: None where only token ids are used.
    context: positions at most; the row length it was trained with.
    opening: ids before a text; None is the id that opens a document in training.
    stops: ids that end one; None is the same id.
    step: training step of the checkpoint; None where it is unknown.
    stored_exits: exits and threshold of the run, where it was calibrated.
  """

  config: config_lib.ModelConfig
  variables: Mapping[str, Any]
  tokenizer: Any
  context: int
  opening: tuple[int, ...] | None = None
  stops: tuple[int, ...] | None = None
  step: int | None = None
  stored_exits: stored_lib.StoredExits | None = None

  def __repr__(self) -> str:
    model = self.config
    num = sum(x.size for x in jax.tree.leaves(self.variables["params"]))
    return (f"<mor.Model of {num:,} parameters: {model.num_layers} layers, width {model.d_model}, "
            f"{model.num_recursions} recursion steps, router {model.router.name}, context {self.context}, "
            f"step {self.step}>")

  @property
  def vocab_size(self) -> int:
    """Tokens that may be drawn: the tokenizer's, where there is one."""
    return self.tokenizer.vocab_size if self.tokenizer else self.config.vocab_size

  def request(self, prompt: Any, /, **options: Any) -> request_lib.Request:
    """Returns a request of a text or of token ids.

    A text opens a document, as in training, and the token that opens the next one
    ends it. A converted model that was not trained here has its own such tokens, and a
    special token that the text spells is one, as its makers have it.

    Args:
      prompt: text, or token ids: a list, a tuple, or an array of integers with one axis.
      **options: see `Engine.submit`.

    Raises:
      ValueError: an option is unknown or wrong, the prompt is neither text nor ids, or
        it is text and there is no tokenizer.
    """
    if isinstance(prompt, str):
      if self.tokenizer is None:
        raise ValueError("the prompt is text, but the model has no tokenizer; give token ids")
      request_lib.check_text(prompt)
      opening = (self.tokenizer.eos_id,) if self.opening is None else self.opening
      encode = self.tokenizer.encode if self.opening is None else self.tokenizer.encode_special
      prompt = [*opening, *(int(t) for t in encode(prompt))]
    if self.tokenizer is not None:
      options.setdefault("stop_tokens", (self.tokenizer.eos_id,) if self.stops is None else self.stops)
    return request_lib.make(prompt, **options)

  def generate(self, prompts: Any, *, context: int | None = None,
               weight_format: str = "float32", callback: Callable[[int, request_lib.Event], None] | None = None,
               **options: Any) -> list[request_lib.Completion]:
    """Continues prompts in one batch; `Engine` is faster, and takes new ones meanwhile.

    Args:
      prompts: list of texts, or of lists of token ids.
      context: positions at most; None is the model's.
      weight_format: "float32" (exact), "bfloat16" or "int8"; see `weights.py`.
      callback: called with the prompt's number and each `request.Event`.
      **options: see `Engine.submit`.

    Raises:
      ValueError: a prompt or an option is wrong; none is run then.
    """
    request_lib.check_prompts(prompts)
    return self.generate_requests([self.request(prompt, **options) for prompt in prompts], context=context,
                                  weight_format=weight_format, callback=callback)

  def generate_requests(self, requests: Sequence[request_lib.Request], *, context: int | None = None,
                        weight_format: str = "float32",
                        callback: Callable[[int, request_lib.Event], None] | None = None
                        ) -> list[request_lib.Completion]:
    """Continues ready requests as `generate` does."""
    context, = sizes.check_counts(context=self.context if context is None else context)
    storage = storage_lib.Dense(context, self.config.num_kv_heads, self.config.head_dim, "float32")
    return generate_lib.generate(
        decoder_lib.Decoder(self.config, storage), weights_lib.prepare(self.config, self.variables, weight_format),
        requests, context=context, tokenizer=self.tokenizer, vocab_size=self.vocab_size, callback=callback)


def load(workdir: str | os.PathLike) -> Model:
  """Returns the newest checkpoint of a run, with its tokenizer and, if it was calibrated, its exits.

  Raises:
    ValueError: the directory holds no checkpoint, or its record or `exits.json` is damaged.
    OSError: the checkpoint is damaged.
  """
  return dataclasses.replace(open_run(workdir)[0], stored_exits=stored_lib.read(workdir))


def open_run(workdir: str | os.PathLike) -> tuple[Model, config_lib.Config]:
  """Returns what `load` does, without exits, and the config of the run."""
  config, step, variables = checkpoint.load_variables(workdir)
  tokenizer = run_lib.load_tokenizer(workdir, config.data)
  model = Model(config.model, variables, tokenizer, config.data.seq_len, step=step)
  about = checkpoint.load_pretrained(workdir) if step == 0 else None
  if about is None:
    return model, config
  stops = tuple(dict.fromkeys((*about["stops"], tokenizer.eos_id)))
  return dataclasses.replace(model, opening=tuple(about["opening"]), stops=stops), config
