"""What `AutoTokenizer` and `pipeline` make of an exported text is what `generate` makes of it."""

import json

import jax
import pytest
import tokenizers
import transformers

import mor
from mor import checkpoint
from mor.conversion import command
from mor.conversion import export_tokenizer
from mor.data import tokenizer as tokenizer_lib
from mor.train import step as step_lib
from tests.helpers import decoding
from tests.helpers import tiny

TEXTS = ["My fellow citizens", " of  it", "a\n\nb ,c 's n't.", "naïve — 你好 🙂", "", "<|endoftext|> said", "of</s>it<s>"]
MODELS = {
    "vanilla": tiny.VANILLA,
    "unrolled": dict(sharing="cycle", num_layers=4, num_recursions=2, router=tiny.FIXED, lora=dict(q=2)),
    "routed": dict(sharing="cycle", num_layers=6),
}


def byte_level() -> tokenizers.Tokenizer:
  """A tokenizer that opens no text itself, but moves offsets."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  made.train_from_iterator(TEXTS * 3, tokenizers.trainers.BpeTrainer(
      vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  return made


def sentence_piece() -> tokenizers.Tokenizer:
  """A tokenizer as converters make it of Llama 2's: spaces put before the text, bytes where pieces miss."""
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "o", "f", "i", "t", "of", "it"]
  made = tokenizers.Tokenizer(tokenizers.models.BPE(
      {piece: i for i, piece in enumerate(pieces)}, [("o", "f"), ("i", "t")], unk_token="<unk>", byte_fallback=True,
      fuse_unk=True))
  made.normalizer = tokenizers.normalizers.Sequence([
      tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")])
  made.decoder = tokenizers.decoders.Sequence([
      tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0)])
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  made.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
  return made


KINDS = {"bytes": tokenizer_lib.ByteTokenizer, "byte level": byte_level, "sentence piece": sentence_piece}


@pytest.fixture(scope="module", params=KINDS)
def ours(request):
  """A tokenizer of the package."""
  made = KINDS[request.param]()
  return made if request.param == "bytes" else tokenizer_lib.JsonTokenizer(made.to_str())


def write(folder, ours, template=None, **special_ids):
  """Writes the files; returns what transformers makes of them."""
  folder.mkdir()
  for name, content in export_tokenizer.files(ours.serialized, template, 99, ours.vocab_size, special_ids).items():
    (folder / name).write_text(content)
  return transformers.AutoTokenizer.from_pretrained(folder)


def test_ids_are_ours(ours, tmp_path):
  """With any opening, and text that spells a special token."""
  eos = ours.eos_id
  for i, opening in enumerate([(eos,), (), (eos, 5)]):
    theirs = write(tmp_path / str(i), ours, opening=opening, bos=(eos,), eos=(eos,), pad=(eos,))
    for text in TEXTS:
      expected = ours.encode(text).tolist()
      assert theirs(text).input_ids == [*opening, *expected], (opening, text)
      assert theirs(text, add_special_tokens=False).input_ids == expected, (opening, text)
      assert theirs.decode(expected, skip_special_tokens=True) == ours.decode(expected)
    config = json.loads((tmp_path / str(i) / "tokenizer_config.json").read_text())
    assert config.get("add_bos_token", False) == (opening == (eos,))
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (eos, eos, eos)
    theirs.save_pretrained(tmp_path / f"again{i}")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / f"again{i}")
    assert again(TEXTS).input_ids == theirs(TEXTS).input_ids


def test_a_batch_is_padded_before_the_opening(ours, tmp_path):
  theirs = write(tmp_path / "out", ours, opening=(ours.eos_id,), bos=(ours.eos_id,), eos=(ours.eos_id,))
  batch = theirs(["of it", "o"], padding=True)
  for ids, mask, text in zip(batch.input_ids, batch.attention_mask, ["of it", "o"]):
    assert [i for i, shown in zip(ids, mask) if shown] == [ours.eos_id, *ours.encode(text)]
    assert mask == sorted(mask)


def test_a_template_writes_special_tokens(tmp_path):
  """So they are matched beside one, and nothing is put before it."""
  ours = tokenizer_lib.JsonTokenizer(sentence_piece().to_str())
  theirs = write(tmp_path / "out", ours, "<s>{{ messages[0]['content'] }}</s>", opening=(1,), bos=(1,), eos=(2,))
  ids = theirs.apply_chat_template([dict(role="user", content="of")], return_dict=True).input_ids
  assert (ids[0], ids[-1], ids.count(1)) == (1, 2, 1)
  assert theirs("of it").input_ids == [1, *ours.encode("of it")]


def test_a_tokenizer_that_opens_its_texts_stays_as_it_is(tmp_path):
  ours = tokenizer_lib.JsonTokenizer(sentence_piece().to_str())
  files = export_tokenizer.files(ours.serialized, None, 99, ours.vocab_size, dict(opening=(1,), bos=(1,), eos=(2, 5)))
  assert files["tokenizer.json"] == ours.serialized
  assert json.loads(files["generation_config.json"]) == dict(bos_token_id=1, eos_token_id=[2, 5], pad_token_id=2)
  old = json.loads(KINDS["bytes"]().serialized)
  del old["post_processor"]  # as in a file that was written by hand
  opened = export_tokenizer.files(json.dumps(old), None, 99, 257, dict(opening=(256,)))["tokenizer.json"]
  assert tokenizers.Tokenizer.from_str(opened).encode("of").ids == [256, *b"of"]
  with pytest.raises(ValueError, match="opening=999 is no token"):
    export_tokenizer.files(ours.serialized, None, 99, 9999, dict(opening=(999,)))


@pytest.mark.parametrize("name, target", [("vanilla", "llama"), ("routed", "hf"), *(
    pytest.param(name, target, marks=pytest.mark.slow) for name, target in
    [("vanilla", "hf"), ("unrolled", "hf"), ("unrolled", "llama")])])
def test_a_pipeline_continues_a_text_as_we_do(name, target, tmp_path):
  data = dict(source=tiny.write_text(tmp_path), cache_dir=str(tmp_path / "cache"), tokenizer="bpe:280")
  config = tiny.config(model=dict(execution="masked", scan_layers=False, vocab_size=280) | MODELS[name], data=data)
  variables = decoding.draw(config.model)
  variables["params"]["embedding"] *= 0.3
  with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
    checkpoints.save(0, step_lib.start(config, jax.tree.map(jax.numpy.asarray, variables)), config)
  command.export(tmp_path / "run", target, tmp_path / "out", "float32")
  model = mor.load(tmp_path / "run")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
  assert theirs("My fellow citizens").input_ids == list(model.request("My fellow citizens").prompt)
  pipe = transformers.pipeline("text-generation", str(tmp_path / "out"), trust_remote_code=True)
  prompts = ["the union", "plain old"]
  expected = model.generate(prompts, temperature=0.0, max_tokens=16, context=48)
  assert len({token for row in expected for token in row.tokens}) > 2, "nearly one token only; draw other parameters"
  got = pipe(prompts, max_new_tokens=16, do_sample=False)
  assert [row[0]["generated_text"] for row in got] == [p + row.text for p, row in zip(prompts, expected)]
