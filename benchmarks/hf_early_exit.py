"""Early exit as Hugging Face transformers has it: a reference for ours on the same weights.

  peer = EarlyExit(folder)                  of `--mode=export --target=llama`
  peer.generate(prompt, 64)                                     full depth
  peer.generate(prompt, 64, draft=Draft(layer=10, num_tokens=4))

Greedy, one prompt at a time, float32. With `draft` the model's own first layers
write up to `num_tokens` tokens, and one pass of all layers confirms those before the
first that it would not have chosen, and adds one of its own (self-speculative
decoding): the tokens are those of the full depth, but for ties within rounding.

What transformers does at the exit, and where ours differs:

  head    After layer E come the model's own final norm and head, the same as after
          the last layer: `assistant_early_exit` lowers `config.num_hidden_layers` for
          a draft, over which `LlamaModel.forward` loops before `self.norm`. No norm or
          head of an exit's own can be given.
  cache   Drafts have a cache of their own, of E layers. The prompt runs through these
          twice, and the pass that confirms starts from the embeddings: nothing that a
          draft computed is used again.
  stop    A draft stops after `num_tokens` or behind the first token whose probability
          is below `confidence`; this token is drafted, too. 0 turns it off. The
          threshold stays: transformers moves it for drafts of a second model only.
  knobs   `num_assistant_tokens`, its schedule and `assistant_confidence_threshold` are
          read from `model.generation_config`; as arguments of `generate` they are
          silently ignored.

Source: transformers generation/candidate_generator.py (EarlyExitCandidateGenerator),
generation/utils.py (_assisted_decoding), generation/stopping_criteria.py
(ConfidenceCriteria), models/llama/modeling_llama.py.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import importlib.util
import os
import time

_PACKAGES = ("torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Draft:
  """How tokens are drafted.

  Attributes:
    layer: the exit is after so many layers.
    num_tokens: drafted at most before each pass of all layers.
    confidence: a draft goes on behind a token that is at least so probable; 0 is always.
  """

  layer: int
  num_tokens: int = 5
  confidence: float = 0.0


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A generated text and what it took.

  Attributes:
    tokens: new ones, the stop token included.
    seconds: wall time, prompt included.
    deep_passes: through all layers, that of the prompt included.
    draft_passes: through the layers below the exit alone, that of the prompt included.
  """

  tokens: list[int]
  seconds: float
  deep_passes: int
  draft_passes: int

  @property
  def tokens_per_deep_pass(self) -> float:
    """1 at full depth."""
    return len(self.tokens) / self.deep_passes


class EarlyExit:
  """A plain Llama of a folder."""

  def __init__(self, folder: str | os.PathLike, threads: int = 2):
    """Loads the weights as float32.

    Args:
      folder: that transformers loads.
      threads: of torch.

    Raises:
      ValueError: a package is missing, or the folder is of another kind of model.
      OSError: there is no such folder.
    """
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
      raise ValueError(f"early exit of transformers needs {', '.join(missing)}; pip install 'mor[torch]'")
    import torch
    import transformers
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    if kind != "llama":
      raise ValueError(f"{folder} is of model_type {kind!r}; export a plain Llama with --target=llama")
    self._model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    self._threads = threads
    self.num_layers = self._model.config.num_hidden_layers

  def generate(self, prompt: Sequence[int], num_tokens: int, *, draft: Draft | None = None,
               stop_tokens: Sequence[int] = ()) -> Outcome:
    """Returns the most likely next tokens.

    Args:
      prompt: token ids.
      num_tokens: new ones at most.
      draft: None runs the full depth alone.
      stop_tokens: ids that end the text; without any it has `num_tokens` tokens.

    Raises:
      ValueError: no prompt, no token asked for, or a draft that cannot be made.
    """
    import torch
    self._check(prompt, num_tokens, draft)
    torch.set_num_threads(self._threads)
    options = self._options(draft, stop_tokens)
    ids_1T = torch.tensor([[int(token) for token in prompt]])
    with self._passes() as count, torch.inference_mode():
      start = time.perf_counter()
      out_1T = self._model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False,
                                    max_new_tokens=num_tokens, **options)
      seconds = time.perf_counter() - start
    return Outcome(out_1T[0, len(prompt):].tolist(), seconds, count["last"], count["first"] - count["last"])

  def _check(self, prompt: Sequence[int], num_tokens: int, draft: Draft | None) -> None:
    if not len(prompt):
      raise ValueError("the prompt is empty; give at least one token")
    if num_tokens < 1:
      raise ValueError(f"num_tokens={num_tokens}; use at least 1")
    if draft is None:
      return
    if not 1 <= draft.layer < self.num_layers:
      raise ValueError(f"draft.layer={draft.layer} of a model of {self.num_layers} layers; "
                       f"use 1 to {self.num_layers - 1}")
    if draft.num_tokens < 1 or not 0 <= draft.confidence <= 1:
      raise ValueError(f"draft.num_tokens={draft.num_tokens}, draft.confidence={draft.confidence}; "
                       "use at least 1 token, and a confidence in [0, 1]")

  def _options(self, draft: Draft | None, stop_tokens: Sequence[int]) -> dict[str, int]:
    """Sets what is read from the model, and returns what is an argument."""
    import transformers
    stops = [int(token) for token in stop_tokens] or None
    known = transformers.GenerationConfig(eos_token_id=stops, pad_token_id=stops[0] if stops else None)
    self._model.generation_config = known
    if draft is None:
      return {}
    known.num_assistant_tokens, known.num_assistant_tokens_schedule = draft.num_tokens, "constant"
    known.assistant_confidence_threshold = draft.confidence
    return {"assistant_early_exit": draft.layer}  # set on the model, drafts would draft without end

  @contextlib.contextmanager
  def _passes(self) -> Iterator[dict[str, int]]:
    """Counts passes through the first and the last layer, and restores the depth if a draft fails."""
    count, layers = {"first": 0, "last": 0}, self._model.model.layers

    def hook(name):
      def add(*_):
        count[name] += 1
      return add
    handles = [layers[index].register_forward_hook(hook(name)) for name, index in (("first", 0), ("last", -1))]
    try:
      yield count
    finally:
      for handle in handles:
        handle.remove()
      self._model.config.num_hidden_layers = self.num_layers
