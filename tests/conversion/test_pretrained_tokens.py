"""A converted model is asked as its makers ask it, and convert refuses what generate could not use."""

import json

import numpy as np
import pytest

import mor
from mor.conversion import command
from mor.conversion import layout
from tests.helpers import checkpoints
from tests.helpers import tiny
from tests.helpers import vocabularies
from tests.helpers import weights

BOS, EOS, EOT = 256, 257, 258  # of `vocabularies.llama3`
TEXTS = ["the state of it", "<|eot_id|>the<|begin_of_text|> in", " a", "日本"]


def folder(path, tokenizer=None, vocab_size=263, files=(), **config):
  """A Llama with a tokenizer, and JSON files beside it."""
  model = checkpoints.llama(vocab_size=vocab_size, num_layers=1)
  checkpoints.hf_folder(path, model, **config)
  if tokenizer is not None:
    tokenizer.save(str(path / "tokenizer.json"))
  for name, content in dict(files).items():
    (path / f"{name}.json").write_text(json.dumps(content))
  return f"hf:{path}"


def convert(spec, workdir, tokenizer=None, **changes):
  model = command.describe(spec)
  sizes = {name: getattr(model, name) for name in ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "d_ff")}
  data = dict(tokenizer=str(tokenizer or workdir / "tokenizer.json"))
  command.convert(tiny.config(dict(model=tiny.VANILLA | sizes | dict(rope_theta=300.0, norm_eps=1e-3)),
                              data=data, **changes), spec, workdir)
  return mor.load(workdir)


def refuses(spec, workdir, message, **given):
  """Converting is one line that says so, and writes nothing."""
  with pytest.raises(ValueError, match=message) as caught:
    convert(spec, workdir, **given)
  assert "\n" not in str(caught.value) and not workdir.exists()


def test_a_llama_3_is_asked_as_its_makers_ask(tmp_path):
  """Its tokens have none of the usual names; so transformers has the same ids."""
  import transformers
  files = dict(tokenizer_config=dict(eos_token="<|eot_id|>", bos_token="<|begin_of_text|>"),
               generation_config=dict(eos_token_id=[EOS, EOT]))
  spec = folder(tmp_path / "hf", vocabularies.llama3(), files=files, bos_token_id=BOS, eos_token_id=EOS)
  model = convert(spec, tmp_path / "run")
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
  for text in TEXTS:
    request = model.request(text, max_tokens=3)
    assert list(request.prompt) == theirs(text).input_ids, text
    assert set(request.stop_tokens) == {EOS, EOT}
  assert model.tokenizer.eos_id == EOT
  completion = model.generate([TEXTS[0]], temperature=0.0, max_tokens=30, context=48)[0]
  assert completion.finish == "length" or completion.tokens[-1] in (EOS, EOT)


@pytest.mark.parametrize("kind", vocabularies.KINDS)
def test_sentencepiece_models_are_asked_as_their_makers_ask(kind, tmp_path):
  theirs = vocabularies.sentencepiece(kind)
  spec = folder(tmp_path / "hf", theirs, vocab_size=400, eos_token_id=2)
  model = convert(spec, tmp_path / "run")
  for text in (*TEXTS, "</s>the  <s> in", "a" + " " * 9):
    assert list(model.request(text).prompt) == theirs.encode(text).ids, text
  assert model.request("a").stop_tokens == (2,)


def test_all_stops_of_the_files_end_a_text(tmp_path):
  spec = folder(tmp_path / "hf", checkpoints.tokenizer(), vocab_size=400, eos_token_id=397,
                files=dict(generation_config=dict(eos_token_id=[397, 398])))
  model = convert(spec, tmp_path / "run")
  assert set(model.request("a").stop_tokens) == {397, 398, 0}


def test_without_an_end_of_a_text_nothing_is_written(tmp_path):
  spec = folder(tmp_path / "hf", vocabularies.llama3(), eos_token_id=None)
  refuses(spec, tmp_path / "run", "the source's tokenizer: no end-of-text token")
  spec = folder(tmp_path / "other", vocabularies.llama3(), eos_token_id=262)
  refuses(spec, tmp_path / "run", "the source's tokenizer: no end-of-text token")


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_of_another_kind_is_refused(name, tmp_path):
  spec = folder(tmp_path / "hf")
  (tmp_path / "hf" / name).write_bytes(b"x")
  refuses(spec, tmp_path / "run", f"has {name} and no tokenizer.json, .*AutoTokenizer.from_pretrained")
  (tmp_path / "hf" / name).unlink()
  refuses(spec, tmp_path / "run", "the source has none; give the path of its tokenizer.json")


def test_an_added_token_without_a_row_is_never_read_or_drawn(tmp_path, caplog):
  tokenizer = vocabularies.llama3()
  tokenizer.add_special_tokens(["<pad>"])
  spec = folder(tmp_path / "hf", tokenizer, vocab_size=259, eos_token_id=EOS, pad_token_id=259)
  model = convert(spec, tmp_path / "run")
  assert "none for the added tokens '<pad>'" in caplog.text
  assert model.vocab_size == 259 and max(model.request("the<pad>").prompt) < 259
  assert len(model.generate(["the<pad>"], max_tokens=4, stop_tokens=[])[0].tokens) == 4
  spec = folder(tmp_path / "small", vocabularies.llama3(), vocab_size=100, eos_token_id=EOS)
  refuses(spec, tmp_path / "other", "has id 258 and the embedding 100 rows; use the tokenizer that belongs")


def test_an_opening_without_a_row_is_refused(tmp_path):
  spec = folder(tmp_path / "hf", vocabularies.llama3(), vocab_size=256, eos_token_id=5)
  refuses(spec, tmp_path / "run", "begins with the ids .256,., and the embedding has 256 rows")


def test_another_file_of_the_tokenizer_must_end_texts_alike(tmp_path):
  spec = folder(tmp_path / "hf", vocabularies.llama3(), eos_token_id=EOS)
  (tmp_path / "apart").mkdir()
  vocabularies.llama3().save(str(tmp_path / "apart" / "tokenizer.json"))
  given = dict(tokenizer=tmp_path / "apart" / "tokenizer.json")
  (tmp_path / "apart" / "config.json").write_text(json.dumps(dict(eos_token_id=EOT)))
  refuses(spec, tmp_path / "run", "ends a text with another token than the source's", **given)
  (tmp_path / "apart" / "config.json").write_text(json.dumps(dict(eos_token_id=EOS)))
  assert convert(spec, tmp_path / "run", **given).tokenizer.eos_id == EOS


def test_once_trained_a_text_opens_as_documents_do(tmp_path):
  """Also in a run that is made of the trained one."""
  spec = folder(tmp_path / "hf", vocabularies.llama3(), eos_token_id=EOS)
  trained = "tokenizer.json", convert(spec, tmp_path / "run").tokenizer
  about = command._about_run(tmp_path / "run", 5, trained)
  assert about["opening"] == about["stops"] == [EOS] and about["context"] == 77
  assert command._about_run(tmp_path / "run", 5, None) == about
  assert command._about_run(tmp_path / "run", 0, trained)["opening"] == [BOS]
  old = {name: about[name] for name in ("special_ids", "add_bos", "context")}  # of an older version
  (tmp_path / "run" / "pretrained.json").write_text(json.dumps(old))
  assert command._about_run(tmp_path / "run", 5, trained)["opening"] == [EOS]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value, tmp_path):
  model = checkpoints.llama(vocab_size=263, num_layers=2)
  arrays = dict(layout.write({"params": weights.draw(model)}, model, "hf"))
  arrays["model.layers.1.mlp.up_proj.weight"][3, 2] = value
  spec = f"hf:{checkpoints.write_folder(tmp_path / 'hf', checkpoints.hf_config(model), arrays)}"
  refuses(spec, tmp_path / "run", r"tensor 'model.layers.1.mlp.up_proj.weight' has 1 numbers that are not finite, "
          r"the first at \(3, 2\)", tokenizer="bytes")


def test_more_stops_than_a_request_may_have_are_refused(tmp_path):
  spec = folder(tmp_path / "hf", vocabularies.llama3(), eos_token_id=list(range(9)))
  refuses(spec, tmp_path / "run", "names 9 tokens that end a text, and a request may have 8")
