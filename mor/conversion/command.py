"""`--mode=convert` and `--mode=export`: pretrained models in, Hugging Face folders and GGUF files out.

  model = command.read("hf:models/SmolLM2-135M")
  model = command.read("gguf:SmolLM2-135M-Instruct.Q4_1.gguf")
  model = command.read("official_mor:checkpoint-14161", target=config.model)

A converted workdir holds a checkpoint of step 0, which `--mode=train` with the same
config goes on from, and beside it

  tokenizer.json    the source's tokenizer, which data.tokenizer must name
  pretrained.json   what else the source says of itself:
                      opening         ids that its makers put before a text
                      stops           ids that end one
                      eos_id          id between documents in training
                      context         positions that it was trained for
                      chat_template   Jinja text, or null
                      special_ids, special_tokens, add_bos   what its files say of bos, eos, pad and unk

A converted model that was not trained here is asked with `opening` and `stops`; after
training, a text opens and ends with `eos_id`, as the documents of the training do.
"""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor import checkpoint
from mor import config as config_lib
from mor import costs
from mor import json_file
from mor import lock as lock_lib
from mor import paths
from mor import run as run_lib
from mor.conversion import gguf_export
from mor.conversion import gguf_import
from mor.conversion import hf_export
from mor.conversion import hf_import
from mor.conversion import official_import
from mor.conversion import pretrained
from mor.conversion import recursive_init
from mor.data import tokenizer as tokenizer_lib
from mor.data.tasks import table as task_table
from mor.decode import slots as slots_lib
from mor.train import step as step_lib

_DESCRIBERS = {"hf": hf_import.describe, "gguf": gguf_import.describe}
_READERS = {"hf": hf_import.read, "gguf": gguf_import.read, "official_mor": official_import.read}  # prefix -> reader
TARGETS = {"hf": hf_export.write, "llama": hf_export.write_llama, "gguf": gguf_export.write}


@dataclasses.dataclass(frozen=True, eq=False)
class _Given:
  """What a source gives."""

  model: config_lib.ModelConfig
  variables: Mapping[str, Any]
  tokenizer: str | None
  about: dict[str, Any] | None  # pretrained.json
  trained: tuple[str, tokenizer_lib.Tokenizer] | None = None  # data.tokenizer of a run, and what it is


def read(spec: str, target: config_lib.ModelConfig | None = None) -> pretrained.Source:
  """Reads the pretrained model that `spec` names, whole, before anything is written.

  Args:
    spec: "hf:FOLDER", "gguf:FILE" or "official_mor:FOLDER_OR_FILE".
    target: for official_mor, the config of what its files do not tell; else unused.

  Raises:
    ValueError: the kind is unknown, the model unsupported, or a file lies.
    OSError: a file cannot be read.
  """
  kind, path = _find(spec, _READERS)
  return _READERS[kind](path, *([target] if kind == "official_mor" else []))


def describe(spec: str) -> config_lib.ModelConfig:
  """Returns the model of an "hf:FOLDER" or "gguf:FILE", without its weights; raises as `read` does."""
  kind, path = _find(spec, _DESCRIBERS)
  return _DESCRIBERS[kind](path)


def convert(config: config_lib.Config, spec: str, workdir: str | os.PathLike) -> dict[str, Any]:
  """Writes the first checkpoint of a run from a pretrained model.

  Args:
    config: of the run; `init` says how its shared layers are made.
    spec: "mor:WORKDIR", or what `read` takes.
    workdir: of the run; must hold no checkpoint.

  Returns:
    Parameters and layers, before and after.

  Raises:
    ValueError: something given is wrong or does not fit; nothing is written then.
    OSError: a file cannot be read or written.
  """
  with lock_lib.Lock(paths.local(workdir, "convert"), "converts a model") as lock:
    return _convert(config, spec, workdir, lock)


def _convert(config, spec, workdir, lock):
  """Converts under the lock, which it takes for good when it first writes."""
  directory = paths.local(workdir, "convert")
  _refuse_checkpoint(workdir)
  given = _given(spec, config)
  recursive_init.check(given.model, config.model)
  _check_tokenizer(config, given, directory)
  tokenizer = _find_tokenizer(config, given)
  variables = recursive_init.convert(config.model, config.init, config.seed, given.model, given.variables)
  lock.acquire()
  _refuse_checkpoint(workdir)  # of a process that was here before the lock
  if given.tokenizer is not None:
    paths.write_whole(directory / "tokenizer.json", given.tokenizer)
  if given.about is not None:
    paths.write_whole(directory / "pretrained.json", json.dumps(given.about, indent=1))
  if tokenizer is not None:
    run_lib.keep_tokenizer(workdir, tokenizer_lib.name_of(config.data), tokenizer)
  state = step_lib.start(config, jax.tree.map(jnp.asarray, variables))
  with checkpoint.Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints:
    checkpoints.save(0, state, config)
    checkpoints.wait()

  def count(model: config_lib.ModelConfig) -> dict[str, int]:
    return dict(zip(("embedding_parameters", "other_parameters"), costs.parameter_count(model)))

  return {"source": count(given.model), "model": count(config.model), "workdir": str(workdir)}


def export(workdir: str | os.PathLike, target: str, output: str | os.PathLike, dtype: str) -> dict[str, Any]:
  """Writes a run's newest model as a folder that transformers loads, or a file that llama.cpp loads.

  Args:
    workdir: of the run.
    target: one of TARGETS.
    output: folder to create; of "gguf" the file, NAME.gguf.
    dtype: of the tensors, "float32" or "bfloat16", of "gguf" also "float16".

  Raises:
    ValueError: no checkpoint, or a model, folder or file that cannot be written.
  """
  if target not in TARGETS:
    raise ValueError(f"target={target!r}; use one of {', '.join(TARGETS)}")
  config, step, variables = checkpoint.load_variables(workdir)
  about = checkpoint.load_pretrained(workdir) or {}
  tokenizer = run_lib.load_tokenizer(workdir, config.data)
  TARGETS[target](output, config.model, jax.tree.map(np.asarray, variables), tokenizer=tokenizer.serialized,
                  chat_template=about.get("chat_template"), context=about.get("context") or config.data.seq_len,
                  dtype=dtype, special_ids=_special_ids(about if step == 0 else {}, tokenizer.eos_id))
  return {"step": step, "target": target, "dtype": dtype, "output": str(output)}


def _special_ids(about: Mapping[str, Any], eos_id: int) -> dict[str, Sequence[int]]:
  """Returns the ids with which `generate` opens and ends a text, those of training unless the source has its own."""
  if not about:
    return {name: (eos_id,) for name in ("opening", "bos", "eos", "pad")}
  return {**about["special_ids"], "opening": about["opening"], "eos": tuple(dict.fromkeys((*about["stops"], eos_id)))}


def _find(spec: str, kinds: Collection[str]) -> tuple[str, pathlib.Path]:
  kind, colon, path = spec.partition(":")
  if kind not in kinds or not colon or not path:
    raise ValueError(f"source {spec!r}; use {', '.join(f'{known}:PATH' for known in kinds)}, or mor:WORKDIR to "
                     "convert a run")
  try:
    expanded = pathlib.Path(path).expanduser()
  except RuntimeError as error:  # no such user
    raise ValueError(f"source {spec!r}: {error}; give the whole path") from error
  if not expanded.exists():
    raise FileNotFoundError(f"source {spec!r}: there is no {expanded}")
  return kind, expanded


def _given(spec: str, config: config_lib.Config) -> _Given:
  kind, _, path = spec.partition(":")
  if kind == "mor" and path:
    theirs, step, variables = checkpoint.load_variables(path)
    variables = jax.tree.map(np.asarray, variables)
    _check_finite(path, variables)
    tokenizer, trained = _tokenizer_of_run(path, theirs, tokenizer_lib.name_of(config.data))
    return _Given(theirs.model, variables, tokenizer, _about_run(path, step, trained), trained)
  source = read(spec, config.model)
  about = dict(opening=source.opening, stops=source.stops, eos_id=source.eos_id, context=source.context,
               special_ids=source.special_ids, special_tokens=source.special_tokens, add_bos=source.add_bos,
               chat_template=source.chat_template)
  return _Given(source.model, source.variables, source.tokenizer, about)


def _tokenizer_of_run(workdir: str, theirs: config_lib.Config,
                      name: str) -> tuple[str | None, tuple[str, tokenizer_lib.Tokenizer] | None]:
  """Returns the tokenizer.json of a run, unless its name, which is no path, names it here too, and what its record says."""
  record = run_lib.read(workdir)
  if record is None:
    file = paths.directory(workdir) / "tokenizer.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None, None
  trained = record.tokenizer.name, run_lib.load_tokenizer(workdir, theirs.data)
  if name == trained[0] and not tokenizer_lib.is_file(name):
    return None, trained
  return trained[1].serialized, trained


def _eos_id(given: _Given) -> int | None:
  if given.trained is not None:
    return given.trained[1].eos_id
  return (given.about or {}).get("eos_id")


def _about_run(workdir: str | os.PathLike, step: int,
               trained: tuple[str, tokenizer_lib.Tokenizer] | None) -> dict[str, Any] | None:
  """Returns pretrained.json for a run made of another; once it was trained, texts open and end as its documents do."""
  about = checkpoint.load_pretrained(workdir)
  if about is None or step == 0:
    return about
  eos_id = about.get("eos_id") if trained is None else trained[1].eos_id
  return about if eos_id is None else about | dict(opening=[eos_id], stops=[eos_id], eos_id=eos_id)


def _check_finite(workdir: str | os.PathLike, variables: Mapping[str, Any]) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    if not np.isfinite(leaf).all():
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise ValueError(f"{workdir}: parameter {name!r} has numbers that are not finite; take a checkpoint from before "
                       "they came")


def _refuse_checkpoint(workdir: str | os.PathLike) -> None:
  with checkpoint.Checkpoints(workdir, read_only=True) as existing:
    if existing.latest_step() is not None:
      raise ValueError(f"{existing.directory} holds a checkpoint already; give another --workdir")


def _find_tokenizer(config: config_lib.Config, given: _Given) -> tokenizer_lib.Tokenizer | None:
  """Returns the tokenizer that the run will read text with; None for "bpe:SIZE", which its first start trains."""
  name = tokenizer_lib.name_of(config.data)
  if given.trained is not None and given.trained[0] == name:
    return given.trained[1]
  if given.tokenizer is not None:
    return tokenizer_lib.JsonTokenizer(given.tokenizer, _eos_id(given))
  return None if name.startswith("bpe:") else tokenizer_lib.load(config.data, None)


def _check_tokenizer(config: config_lib.Config, given: _Given, directory: pathlib.Path) -> None:
  """Raises ValueError if the run could not be asked with text, or would read it otherwise than the source does."""
  if task_table.is_task(config.data.source):
    symbols = tokenizer_lib.load(config.data, None)
    if given.trained is None or given.trained[1].identity != symbols.identity:
      raise ValueError(f"data.source={config.data.source!r} has {symbols.vocab_size} symbols of its own, and the source "
                       "reads others; convert a run of the same task and sizes")
    return
  name, ours = config.data.tokenizer, directory / "tokenizer.json"
  is_ours = pathlib.Path(name).expanduser().absolute() == ours.absolute()
  if given.tokenizer is None:
    if is_ours:
      raise ValueError(f"data.tokenizer={name!r} is where a source's tokenizer goes, and the source has none; give the "
                       "path of its tokenizer.json, or put it beside the source")
    return
  try:
    expected = tokenizer_lib.JsonTokenizer(given.tokenizer, _eos_id(given))
  except ValueError as error:
    raise ValueError(f"the source's tokenizer: {error}") from error
  stops = {*(given.about or {}).get("stops", ()), expected.eos_id}
  if len(stops) > slots_lib.STOP_TOKENS:
    raise ValueError(f"the source names {len(stops)} tokens that end a text, and a request may have "
                     f"{slots_lib.STOP_TOKENS}; leave that many in its generation_config.json and config.json")
  if is_ours:
    return
  remedy = f"give --config.data.tokenizer={ours}, where this command writes the source's"
  named = pathlib.Path(name).expanduser()
  if not named.is_file() or json_file.read(named) != json_file.parse(given.tokenizer, "the source's tokenizer"):
    raise ValueError(f"data.tokenizer={name!r} is not the source's tokenizer; {remedy}")
  if tokenizer_lib.load(config.data, None).eos_id != expected.eos_id:
    raise ValueError(f"data.tokenizer={name!r} ends a text with another token than the source's; {remedy}")
