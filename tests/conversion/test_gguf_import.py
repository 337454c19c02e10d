"""GGUF files: weights, tokenizer, and what is refused."""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import tokenizers

from mor.conversion import command
from mor.conversion import gguf_tokenizer
from mor.conversion import layout
from tests.helpers import checkpoints
from tests.helpers import weights

WIDE = dict(d_model=32, head_dim=16, d_ff=96)  # quantised rows come in blocks of 32
TEXTS = ["The state of a union, it's WE'LL 1234567 2³\n\n\t of  it  ", "<|im_start|>hé 日本<|endoftext|>é́ ½",
         "a" * 40, "zzz zzz it'Sx it'sx", "   three spaces\r\n\r\nand\ttabs\u00a0\u3000x", "I'VE x=3.14159;y=[1,22,333,4444]",
         "مرحبا שלום ไทย Ⅷ ② x² ٣٤٥", "\x01 control \x7f\u200b\ufeff", "_under__score ÀÉ🙂🏽 ..!? \n\n\n  \n a"]


def draw(model):
  return {"params": weights.draw(model)}


def arrays_of(model, variables):
  return dict(layout.write(variables, model, "gguf"))


def q8_0(rows):
  """By hand: 32 numbers share a half-precision step, a 127th of the largest."""
  blocks = rows.reshape(-1, 32).astype(np.float32)
  step = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
  whole = blocks * np.divide(1, step, out=np.zeros_like(step), where=step != 0)
  whole = np.sign(whole) * np.floor(np.abs(whole) + 0.5)  # half away from zero, as C's roundf
  return (whole * step.astype(np.float16).astype(np.float32)).reshape(rows.shape)


def q4_1(rows):
  """By hand: 16 levels from the smallest of 32 numbers to the largest."""
  blocks = rows.reshape(-1, 32).astype(np.float32)
  low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
  step = (high - low) / np.float32(15)
  level = np.floor((blocks - low) / step + np.float32(0.5)).clip(0, 15)
  half = lambda x: x.astype(np.float16).astype(np.float32)
  return (level * half(step) + half(low)).reshape(rows.shape)


@pytest.mark.parametrize("heads", checkpoints.HEADS)
def test_whole_numbers_come_back(heads, tmp_path):
  model = checkpoints.llama(**checkpoints.HEADS[heads], tie_embeddings=heads != "mha")
  variables = draw(model)
  checkpoints.write_gguf(tmp_path / "m.gguf", model, arrays_of(model, variables))
  read = command.read(f"gguf:{tmp_path / 'm.gguf'}")
  assert read.model == model and read.context == 77 and read.tokenizer is None
  assert checkpoints.equal(read.variables, variables)


@pytest.mark.parametrize("kind,expect", [
    ("F16", lambda x: x.astype(np.float16).astype(np.float32)), ("Q8_0", q8_0), ("Q4_1", q4_1)])
def test_numbers_are_dequantised(kind, expect, tmp_path):
  model = checkpoints.llama(**WIDE)
  variables = draw(model)
  checkpoints.write_gguf(tmp_path / "m.gguf", model, arrays_of(model, variables), kind)
  read = command.read(f"gguf:{tmp_path / 'm.gguf'}")
  written = dict(layout.write(read.variables, model, "hf"))
  for key, array in layout.write(variables, model, "hf"):
    # Blocks run along a row, so a permutation of rows does not change them.
    expected = array if array.ndim == 1 else expect(array)
    np.testing.assert_allclose(written[key], expected, rtol=1e-6, atol=1e-7, err_msg=key)


def test_weights_are_those_of_transformers_reader(tmp_path):
  """It permutes q and k back in its own way."""
  import transformers
  from transformers import modeling_gguf_pytorch_utils
  model = checkpoints.llama(**WIDE, tie_embeddings=False)
  checkpoints.write_gguf(tmp_path / "m.gguf", model, arrays_of(model, draw(model)), "Q8_0")
  network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoints.hf_config(model)))
  theirs = modeling_gguf_pytorch_utils.load_gguf_checkpoint(
      str(tmp_path / "m.gguf"), return_tensors=True, model_to_load=network)["tensors"]
  ours = dict(layout.write(command.read(f"gguf:{tmp_path / 'm.gguf'}").variables, model, "hf"))
  assert set(ours) == set(theirs)
  for key, value in theirs.items():
    np.testing.assert_array_equal(ours[key], value.numpy(), err_msg=key)


def vocabulary(pre="gpt-2", **changes):
  """Metadata of a tokenizer."""
  fields = json.loads(checkpoints.tokenizer().to_str())["model"]
  # The last two are whole words that no merge makes.
  tokens = sorted(fields["vocab"], key=fields["vocab"].get) + ["Ġzzz", "'Sx"]
  types = [3, 3] + [1] * (len(tokens) - 2)
  merges = [" ".join(pair) for pair in fields["merges"]]
  return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
          "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges, "tokenizer.ggml.eos_token_id": 0,
          "tokenizer.ggml.bos_token_id": 1, "tokenizer.chat_template": "{{x}}"} | {
              f"tokenizer.{key}": value for key, value in changes.items()}


def file_with(directory, extra, **fields):
  model = checkpoints.llama(vocab_size=300, num_layers=1, **fields)
  checkpoints.write_gguf(directory / "m.gguf", model, arrays_of(model, draw(model)), extra=extra)
  return f"gguf:{directory / 'm.gguf'}"


@pytest.mark.parametrize("pre", gguf_tokenizer.PARTS)
def test_tokens_are_llama_cpps(pre, tmp_path):
  llama_cpp = pytest.importorskip("llama_cpp")
  spec = file_with(tmp_path, vocabulary(pre))
  ours = tokenizers.Tokenizer.from_str(command.read(spec).tokenizer)
  theirs = llama_cpp.Llama(spec.removeprefix("gguf:"), vocab_only=True, verbose=False)
  try:
    for text in TEXTS:
      ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
      assert ours.encode(text, add_special_tokens=False).ids == ids, text
      assert ours.decode(ids, skip_special_tokens=False) == text
      start = theirs.tokenize(text.encode(), add_bos=True, special=True)[:1]
      assert (ours.encode(text).ids[:1] == [1]) == (start == [1]) == (pre == "llama-bpe") or ids[:1] == [1]
  finally:
    theirs.close()


def test_llama_3_scaling_is_that_of_the_folder(tmp_path):
  """The file has the divisors of the frequencies, the folder the numbers behind them."""
  model = checkpoints.llama(rope_scaling=dict(factor=4.0, low_freq_factor=0.5, high_freq_factor=1.5, original_context=12))
  model = dataclasses.replace(model, head_dim=10)
  variables = draw(model)
  divisors_H = rope_divisors(model)
  assert set(np.round(divisors_H, 3)) > {1.0, 4.0}
  checkpoints.write_gguf(tmp_path / "m.gguf", model, arrays_of(model, variables) | {"rope_freqs.weight": divisors_H})
  read = command.read(f"gguf:{tmp_path / 'm.gguf'}")
  scaling = dict(rope_type="llama3", factor=4.0, low_freq_factor=0.5, high_freq_factor=1.5,
                 original_max_position_embeddings=12)
  folder = checkpoints.write_folder(tmp_path / "hf", checkpoints.hf_config(model, rope_scaling=scaling),
                                    dict(layout.write(variables, model, "hf")))
  theirs = command.read(f"hf:{folder}")
  assert theirs.model.rope_scaling == model.rope_scaling
  np.testing.assert_allclose(checkpoints.logits(read.model, read.variables),
                             checkpoints.logits(theirs.model, theirs.variables), rtol=0, atol=1e-5)
  plain = dataclasses.replace(read.model, rope_scaling=type(model.rope_scaling)())
  assert np.abs(checkpoints.logits(plain, read.variables) - checkpoints.logits(theirs.model, variables)).max() > 1e-3


def rope_divisors(model):
  """By hand."""
  scaling, half = model.rope_scaling, model.head_dim // 2
  turns_H = scaling.original_context * model.rope_theta ** (-np.arange(half) / half) / (2 * np.pi)
  smooth_H = (turns_H - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  return 1 / (np.clip(smooth_H, 0, 1) + (1 - np.clip(smooth_H, 0, 1)) / scaling.factor)


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_big_endian_files_are_read(kind, tmp_path):
  model = checkpoints.llama(num_layers=1)
  arrays = arrays_of(model, draw(model))
  for order in ("LITTLE", "BIG"):
    checkpoints.write_gguf(tmp_path / order, model, arrays, kind, endianess=gguf.GGUFEndian[order])
  little, big = (command.read(f"gguf:{tmp_path / order}") for order in ("LITTLE", "BIG"))
  assert big.model == little.model and checkpoints.equal(big.variables, little.variables)
  assert big.variables["params"]["embedding"].dtype.isnative


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_other_types_of_big_endian_files_are_refused(kind, tmp_path):
  """Also bfloat16, which the library writes unswapped."""
  model = checkpoints.llama(**WIDE)
  checkpoints.write_gguf(tmp_path / "m.gguf", model, arrays_of(model, draw(model)), kind,
                         endianess=gguf.GGUFEndian.BIG)
  refuses(f"gguf:{tmp_path / 'm.gguf'}", f"is of type {kind} in a file of the other byte order")


def test_every_end_of_the_metadata_is_a_stop(tmp_path):
  extra = vocabulary(**{"ggml.eot_token_id": 1, "ggml.eom_token_id": 9, "ggml.bos_token_id": 7,
                        "ggml.add_bos_token": True})
  read = command.read(file_with(tmp_path, extra))
  assert read.special_ids["eos"] == (0, 1, 9) and read.stops == (0, 1, 9) and read.opening == (7,)


def test_tokenizer_and_template_come_along(tmp_path):
  extra = vocabulary(**{"ggml.padding_token_id": 5, "ggml.unknown_token_id": 0, "ggml.add_bos_token": True})
  extra["tokenizer.ggml.token_type"][7] = 4
  read = command.read(file_with(tmp_path, extra))
  assert read.special_ids == dict(bos=(1,), eos=(0,), pad=(5,), unk=(0,)) and read.add_bos
  assert read.special_tokens["eos"] == "<|endoftext|>" and read.chat_template == "{{x}}"
  ours = tokenizers.Tokenizer.from_str(read.tokenizer)
  assert {i: token.special for i, token in ours.get_added_tokens_decoder().items()} == {0: True, 1: True, 7: False}
  for text in TEXTS:
    assert ours.encode(text).ids[0] == 1
  plain = checkpoints.tokenizer()
  assert ours.encode("the state of it", add_special_tokens=False).ids == plain.encode("the state of it").ids


@pytest.mark.parametrize("extra,message", [
    ({"general.architecture": "qwen2"}, "architecture 'qwen2' is unsupported"),
    ({"llama.expert_count": 8}, "llama.expert_count=8 is unsupported"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn' is unsupported"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, "scaling.type='linear'"),
    ({"llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.factor=2.0 is unsupported"),
    ({"llama.attention.sliding_window": 512}, "sliding_window=512 is unsupported"),
    ({"llama.logit_scale": 2.0}, "llama.logit_scale=2.0 is unknown"),
    ({"llama.attention.value_length": 8}, "value_length=8 with heads of width 6"),
    ({"llama.rope.dimension_count": 4}, "dimension_count=4 with heads of width 6"),
    ({"llama.attention.head_count_kv": [2, 2]}, "head_count_kv is a list, expected one int"),
    ({"llama.block_count": None}, "has no llama.block_count"),
    ({"llama.block_count": 2}, "has no tensor 'blk.1.attn_norm.weight', .* and 5 more"),
    ({"llama.feed_forward_length": 29}, r"'blk.0.ffn_gate.weight' has shape \(28, 20\), its config says \(29, 20\)"),
    ({"llama.attention.head_count": 3}, "m.gguf: model.num_heads=3 is not a multiple"),
    ({"split.count": 2}, "is one part of a split model"),
    (vocabulary("deepseek-llm"), "tokenizer.ggml.pre='deepseek-llm' is unsupported"),
    (vocabulary("default"), "tokenizer.ggml.pre='default' is unsupported"),
    (vocabulary() | {"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre='default' is unsupported"),
    (vocabulary(**{"ggml.model": "llama"}), "tokenizer.ggml.model='llama' is unsupported"),
    (vocabulary(**{"ggml.merges": ["no merge"]}), "its tokenizer is not a tokenizers file"),
    (vocabulary(**{"ggml.merges": None}), "has no tokenizer.ggml.merges"),
    (vocabulary(**{"ggml.merges": [1, 2]}), "tokenizer.ggml.tokens or merges are no text"),
    ({"llama.rope.freq_base": float("nan")}, "rope.freq_base=nan is no number"),
    ({"llama.context_length": 0}, "context_length=0; give a number of positions"),
    ({"llama.attention.head_count": 2**31}, "num_heads=2147483648 is no size of a model"),
    (vocabulary(**{"ggml.tokens": ["a", "a"]}), "1 different tokens of 2 with 2.. types"),
    (vocabulary(**{"ggml.eos_token_id": 999}), "special token 999 of 2.. tokens"),
])
def test_metadata_that_is_refused(extra, message, tmp_path):
  refuses(file_with(tmp_path, extra), message)


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path):
  model = checkpoints.llama()
  checkpoints.write_gguf(tmp_path / "m.gguf", model, arrays_of(model, draw(model)), extra=vocabulary())
  refuses(f"gguf:{tmp_path / 'm.gguf'}", "the tokenizer has id 2.. and the embedding 61 rows")


@pytest.mark.parametrize("change,message", [
    (lambda a: a.pop("output_norm.weight"), "m.gguf has no tensor 'output_norm.weight'"),
    (lambda a: a.update({"blk.0.attn_q.bias": np.ones(24)}), "has tensor 'blk.0.attn_q.bias', which a gguf model"),
    (lambda a: a.update({"rope_freqs.weight": np.ones(4)}), r"'rope_freqs.weight' has shape \(4,\), its metadata say"),
  (lambda a: a.update({"rope_freqs.weight": np.array([1.0, 9.0, 2.0])}), "not those of a Llama 3; convert the Hugging"),
  (lambda a: a.update({"rope_freqs.weight": np.full(3, np.nan)}), "'rope_freqs.weight' has 3 numbers that are not fin"),
  (lambda a: a["blk.0.attn_q.weight"].__setitem__((0, 0), np.inf), "'blk.0.attn_q.weight' has 1 numbers that are not"),
])
def test_tensors_that_are_refused(change, message, tmp_path):
  model = checkpoints.llama()
  arrays = arrays_of(model, draw(model))
  change(arrays)
  checkpoints.write_gguf(tmp_path / "m.gguf", model, arrays)
  refuses(f"gguf:{tmp_path / 'm.gguf'}", message)


def type_at(data, name):
  """Where a two-dimensional tensor's type is written."""
  return data.index(name.encode()) + len(name) + 4 + 2 * 8


@pytest.mark.parametrize("code,message", [
    (999, "tensor 'blk.0.attn_q.weight' has unknown type 999"),
    (int(gguf.GGMLQuantizationType.I32), "'blk.0.attn_q.weight' has unsupported quantisation I32"),
    (int(gguf.GGMLQuantizationType.Q8_K), r"'blk.0.attn_q.weight' of shape \(24, 20\) does not divide into Q8_K"),
])
def test_types_that_are_refused(code, message, tmp_path):
  model = checkpoints.llama()
  checkpoints.write_gguf(tmp_path / "m.gguf", model, arrays_of(model, draw(model)))
  data = bytearray((tmp_path / "m.gguf").read_bytes())
  start = type_at(data, "blk.0.attn_q.weight")
  data[start:start + 4] = code.to_bytes(4, "little")
  (tmp_path / "m.gguf").write_bytes(data)
  refuses(f"gguf:{tmp_path / 'm.gguf'}", message)


def test_a_file_cut_anywhere(tmp_path):
  path = tmp_path / "m.gguf"
  model = checkpoints.llama(num_layers=1)
  checkpoints.write_gguf(path, model, arrays_of(model, draw(model)))
  whole = path.read_bytes()
  header = whole.index(b"blk.0.ffn_down.weight") + 64
  for size in {0, 3, 4, 12, 24, *range(30, header, 37)}:
    path.write_bytes(whole[:size])
    refuses(f"gguf:{path}", "m.gguf: (the header reads on to byte|tensor '.*weight' ends at byte)" if size else "m.gguf: ")
  path.write_bytes(whole[:-40])
  refuses(f"gguf:{path}", "tensor '.*weight' ends at byte .*: the file is cut short")


@pytest.mark.parametrize("size", [1 << 62, 1 << 40])
def test_lengths_that_lie_end_quickly(size, tmp_path):
  path = tmp_path / "m.gguf"
  file_with(tmp_path, vocabulary())
  data = bytearray(path.read_bytes())
  start = data.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 4 + 4
  data[start:start + 8] = size.to_bytes(8, "little")
  path.write_bytes(data)
  refuses(f"gguf:{path}", "m.gguf: the header reads on to byte")
  data[16:24] = size.to_bytes(8, "little")  # number of keys
  path.write_bytes(data)
  refuses(f"gguf:{path}", "m.gguf: the header reads on to byte")


def test_other_files_are_refused(tmp_path):
  refuses(f"gguf:{tmp_path}", "is no file")
  (tmp_path / "m.gguf").write_bytes(b"GGML" + bytes(100))
  refuses(f"gguf:{tmp_path / 'm.gguf'}", "GGUF magic invalid")


def refuses(spec: str, message: str) -> None:
  """Reading is one line that says so."""
  with pytest.raises(ValueError, match=message) as caught:
    command.read(spec)
  assert "\n" not in str(caught.value)
