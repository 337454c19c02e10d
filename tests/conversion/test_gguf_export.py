"""GGUF files that we write: our reader and llama.cpp find in them what was written."""

import dataclasses
import json
import logging

import gguf
import ml_dtypes
import numpy as np
import pytest
import tokenizers

from mor import checkpoint
from mor import sharding
from mor.conversion import command
from mor.conversion import gguf_export
from mor.conversion import gguf_tokenizer
from mor.conversion import layout
from mor.conversion import unrolled
from mor.data import tokenizer as tokenizer_lib
from mor.model import layers
from mor.serve import model as model_lib
from mor.train import step as step_lib
from tests.helpers import checkpoints
from tests.helpers import exported
from tests.helpers import tiny
from tests.helpers import weights

FLAT = dict(sharing="cycle", num_layers=6, vocab_size=263, router=tiny.FIXED)
MODELS = {
    "vanilla": tiny.VANILLA | dict(num_layers=3, vocab_size=263),
    "recursive": FLAT | dict(tie_embeddings=False),
    "relaxed": FLAT | dict(lora=exported.RANKS),
    "middle": FLAT | dict(sharing="middle_sequence", num_recursions=2, lora=dict(q=3, down=2)),
    "qk_norm": FLAT | dict(qk_norm=True),
}
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=96)
TEXTS = ["The state of a union, it's WE'LL 1234567 2³\n\n\t of  it  ", "<|im_start|>hé 日本<|endoftext|>é́ ½ 🙂🏽",
         "a" * 40, "   three spaces\r\n\r\nand\ttabs\u00a0\u3000", "I'VE don't x=3.14159;y=[1,22,333,4444]", "مرحبا שלום ไทย",
         "\x00\x01 control \x7f", "it'Sx 'tis''s", "_under__score CamelCase ÀÉ"]
OPENING = {name: (256,) for name in ("opening", "bos", "eos", "pad")}


def bpe(pre="gpt-2", **fields):
  """Byte-level BPE that is split as llama.cpp's `pre`, with added tokens."""
  trained = checkpoints.tokenizer()
  trained.add_tokens(["<tool>"])
  said = json.loads(trained.to_str())
  said["pre_tokenizer"] = dict(type="Sequence", pretokenizers=gguf_tokenizer.PARTS[pre])
  said["model"]["ignore_merges"] = pre in gguf_tokenizer.WHOLE_WORDS
  return json.dumps(said | fields)


def write(path, model, variables, **options):
  defaults = dict(tokenizer=tokenizer_lib.ByteTokenizer().serialized, chat_template=None, context=72, dtype="float32",
                  special_ids=OPENING)
  gguf_export.write(path, model, variables, **(defaults | options))


def draw(name, **fields):
  model = tiny.config(model=MODELS[name] | fields).model
  return model, {"params": weights.draw(model)}


@pytest.mark.parametrize("name,dtype", [
    *((name, "float32") for name in MODELS), ("relaxed", "float16"), ("recursive", "bfloat16")])
def test_our_reader_finds_the_unrolled_model(name, dtype, tmp_path):
  model, variables = draw(name)
  write(tmp_path / "m.gguf", model, variables, dtype=dtype)
  read = command.read(f"gguf:{tmp_path / 'm.gguf'}")
  assert (read.model.num_layers, read.model.sharing, read.model.vocab_size) == (model.num_layers, "vanilla", 257)
  same = ("d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "rope_theta", "norm_eps", "tie_embeddings")
  assert all(getattr(read.model, field) == getattr(model, field) for field in (*same, "qk_norm")) and read.context == 72
  numbers = dict(float32=np.float32, float16=np.float16, bfloat16=ml_dtypes.bfloat16)[dtype]
  found = dict(layout.write(read.variables, read.model, "hf"))
  expected = dict(unrolled.write(variables, model, "hf"))
  assert found.keys() == expected.keys()
  for key, array in expected.items():
    array = array[:257] if key in ("model.embed_tokens.weight", "lm_head.weight") else array
    rounded = array.astype(numbers).astype(np.float32) if array.ndim == 2 else array
    np.testing.assert_array_equal(found[key], rounded, err_msg=key)


def test_frequencies_are_divided_as_the_model_scales_them(tmp_path):
  model, variables = draw("vanilla", rope_scaling=SCALING, head_dim=16, rope_theta=300.0)
  write(tmp_path / "m.gguf", model, variables)
  tensors = gguf.GGUFReader(tmp_path / "m.gguf").tensors
  found, = (tensor.data for tensor in tensors if tensor.name == "rope_freqs.weight")
  cos_H, sin_H = (np.ravel(part) for part in layers.rotation(np.ones((1, 1), np.int32), model))
  np.testing.assert_allclose(300.0 ** (-np.arange(8) / 8) / found, np.arctan2(sin_H, cos_H), rtol=1e-6)
  assert found.min() == 1 and found.max() == 8 and len(set(found.tolist())) > 3
  assert command.read(f"gguf:{tmp_path / 'm.gguf'}").model.rope_scaling == model.rope_scaling


@pytest.mark.parametrize("pre", [*gguf_tokenizer.PARTS, "bytes"])
def test_our_reader_finds_the_tokenizer(pre, tmp_path):
  serialized = tokenizer_lib.ByteTokenizer().serialized if pre == "bytes" else bpe(pre)
  size = tokenizers.Tokenizer.from_str(serialized).get_vocab_size()
  end = 256 if pre == "bytes" else 0
  ids = dict(opening=(end,), bos=(end,), eos=(end,), pad=(end,))
  model, variables = draw("vanilla", vocab_size=size + 5)
  write(tmp_path / "m.gguf", model, variables, tokenizer=serialized, special_ids=ids, chat_template="{{x}}")
  read = command.read(f"gguf:{tmp_path / 'm.gguf'}")
  assert read.add_bos and read.chat_template == "{{x}}" and read.model.vocab_size == size
  assert (read.special_ids["bos"], read.special_ids["eos"], read.special_ids["pad"]) == ((end,), (end,), (end,))
  ours, theirs = tokenizer_lib.JsonTokenizer(serialized), tokenizer_lib.JsonTokenizer(read.tokenizer)
  for text in TEXTS + ["a <tool> b"]:
    assert ours.encode(text).tolist() == theirs.encode(text).tolist(), text
    assert theirs.decode(theirs.encode(text)) == text
  if pre != "bytes":
    assert size - 1 in theirs.encode("a <tool> b")
  assert tokenizers.Tokenizer.from_str(read.tokenizer).encode("of").ids[0] == end


@pytest.mark.parametrize("changes,message", [
    (dict(normalizer=dict(type="Lowercase")), "normalizer is 'Lowercase'"),
    (dict(pre_tokenizer=None), "splits text by"),
    (dict(pre_tokenizer=gguf_tokenizer.BYTES | dict(use_regex=True, add_prefix_space=True)), '"add_prefix_space": true'),
    (dict(pre_tokenizer=dict(type="Whitespace")), "Whitespace"),
    (dict(decoder=None), "decoder is None"),
    (dict(added_tokens=[dict(id=300, content="<x>", single_word=False, lstrip=True, rstrip=False, normalized=False,
                             special=False)]), "'<x>' has lstrip"),
])
def test_other_tokenizers_are_refused(changes, message, tmp_path):
  model, variables = draw("vanilla", vocab_size=400)
  with pytest.raises(ValueError, match=message) as caught:
    write(tmp_path / "m.gguf", model, variables, tokenizer=bpe(**changes), special_ids=dict(eos=(0,)))
  assert "--target=" in str(caught.value) and "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_other_kinds_of_tokenizers_are_refused():
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<eos>": 1}, unk_token="a"))
  pieces = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "<eos>": 1}, [], byte_fallback=True))
  for tokenizer, message in ((words, "type='WordLevel'"), (pieces, "byte_fallback=True")):
    with pytest.raises(ValueError, match=message):
      gguf_tokenizer.describe(tokenizer.to_str(), dict(eos=(1,)), None)


def test_unicode_forms_are_warned_of(caplog):
  with caplog.at_level(logging.WARNING):
    found = gguf_tokenizer.describe(bpe("qwen2", normalizer=dict(type="NFC")), dict(eos=(0,)), None)
  assert "NFC" in caplog.text and found["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize("ids,message", [
    (dict(opening=(1, 0), eos=(0,)), r"begins with the tokens \(1, 0\)"), (dict(), r"ends at the tokens \(\)"),
    (dict(eos=(0, 1, 2, 3)), "names 1 to 3"), (dict(eos=(999,)), "not the special ones of {'eos': 999, 'bos': 999}")])
def test_ids_without_a_place_are_refused(ids, message):
  with pytest.raises(ValueError, match=message):
    gguf_tokenizer.describe(bpe(), ids, None)


def test_several_ends_have_a_place_each():
  found = gguf_tokenizer.describe(bpe(), dict(opening=(1,), eos=(0, 5)), None)
  assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")] == [1, 0, 5]
  assert found["tokenizer.ggml.token_type"][5] == gguf.TokenType.CONTROL


def test_what_is_wrong_is_refused_and_nothing_is_written(tmp_path):
  model, variables = draw("vanilla")
  (tmp_path / "there.gguf").write_text("mine")
  large = {"params": variables["params"] | {"embedding": variables["params"]["embedding"] * 1e6}}
  for problem, path, arguments, options in [
      ("is there; name a new file", "there.gguf", (model, variables), {}),
      ("no name of a GGUF file; give --output=folder.gguf", "folder", (model, variables), {}),
      ("router.name='expert_choice'.*--target=hf", "m.gguf", (tiny.config(model=dict(vocab_size=263)).model, {}), {}),
      ("kv_plan='shared'", "m.gguf", draw("recursive", kv_plan="shared"), {}),
      ("rope_scaling.factor=8.0 with qk_norm", "m.gguf", draw("qk_norm", rope_scaling=SCALING), {}),
      ("ids up to 256 and the model 99", "m.gguf", draw("vanilla", vocab_size=99), {}),
      ("miss 'params/embedding'", "m.gguf", (model, {"params": {}}), {}),
      ("'token_embd.weight' has numbers up to .*--dtype=bfloat16", "m.gguf", (model, large), dict(dtype="float16")),
  ]:
    with pytest.raises(ValueError, match=problem):
      write(tmp_path / "new" / path if path != "there.gguf" else tmp_path / path, *arguments, **options)
  assert [path.name for path in tmp_path.rglob("*.gguf*")] == ["there.gguf"]
  assert (tmp_path / "there.gguf").read_text() == "mine"


def save_run(directory, tokenizer="bytes", **model):
  """Saves a run of random parameters that was trained for a step, as far as its files say."""
  data = dict(source=tiny.write_text(directory), cache_dir=str(directory / "cache"), tokenizer=tokenizer, seq_len=96)
  config = tiny.config(model=MODELS["vanilla"] | model, data=data)
  state = step_lib.init_state(config, sharding.make_mesh(config.mesh))
  params = weights.draw(config.model)
  params["embedding"] *= 0.1  # else the embedding of a token outweighs what the layers add
  state = dataclasses.replace(state, params=params, step=state.step + 1)
  with checkpoint.Checkpoints(directory / "run") as saved:
    saved.save(1, state, config)
  return directory / "run"


def test_a_run_is_exported(tmp_path):
  workdir, output = save_run(tmp_path), tmp_path / "out" / "model.gguf"
  said = command.export(workdir, "gguf", output, "bfloat16")
  assert said == dict(step=1, target="gguf", dtype="bfloat16", output=str(output))
  read = command.read(f"gguf:{output}")
  assert read.add_bos and read.special_ids["bos"] == (256,) and read.context == 96
  assert [path.name for path in output.parent.iterdir()] == ["model.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize("name,tokenizer", [
    ("vanilla", "bytes"), ("vanilla", "bpe:300"), ("relaxed", "bpe:300"), ("recursive", "bytes"), ("middle", "bytes"),
    ("qk_norm", "bpe:300"), ("scaled", "bytes")])
def test_llama_cpp_continues_a_text_as_we_do(name, tokenizer, tmp_path):
  llama_cpp = pytest.importorskip("llama_cpp")
  fields = MODELS["vanilla"] | dict(rope_scaling=SCALING) if name == "scaled" else MODELS[name]
  size = dict(d_model=32, head_dim=8, vocab_size=320)
  ours = model_lib.load(save_run(tmp_path, tokenizer, **(fields | size)))
  command.export(tmp_path / "run", "gguf", tmp_path / "m.gguf", "float32")
  theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=96, type_k=0, type_v=0, verbose=False, flash_attn=False)
  try:
    for text in TEXTS:
      request = ours.request(text, temperature=0.0, max_tokens=40, stop_tokens=[])
      ids = theirs.tokenize(text.encode(), add_bos=True, special=False)
      assert ids == list(request.prompt), text
    found = []
    for text in ("The state of", "what we keep, 12", "é 日本 <|endoftext|>"):
      request = ours.request(text, temperature=0.0, max_tokens=40, stop_tokens=[])
      ids, tokens = theirs.tokenize(text.encode(), add_bos=True, special=False), []
      theirs.reset()
      for token in theirs.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == 40:
          break
      found += tokens
      assert tokens == list(ours.generate_requests([request])[0].tokens), text
    assert len(set(found)) > 5, "nearly one token only; draw other parameters"
  finally:
    theirs.close()
