"""Texts begin and end as the files beside a tokenizer say."""

import json

import pytest
import tokenizers
from tokenizers import processors

from mor.data import pieces
from mor.data import special_tokens
from mor.data import tokenizer as tokenizer_lib
from tests.helpers import tiny
from tests.helpers import vocabularies

BOS, EOS, EOT = 256, 257, 258  # of `vocabularies.llama3`


def write(folder, **files):
  for name, content in files.items():
    (folder / f"{name}.json").write_text(json.dumps(content))


def with_processor(processor):
  made = vocabularies.llama3(opens=False)
  if processor is not None:
    made.post_processor = processor
  return made


@pytest.mark.parametrize("processor,opening", [
    (None, ()),
    (processors.ByteLevel(), ()),
    (processors.TemplateProcessing(single="<|eot_id|> <|begin_of_text|> $A <|end_of_text|>",
                                   special_tokens=[("<|begin_of_text|>", BOS), ("<|end_of_text|>", EOS),
                                                   ("<|eot_id|>", EOT)]), (EOT, BOS)),
    (processors.TemplateProcessing(single="$A <|end_of_text|>", special_tokens=[("<|end_of_text|>", EOS)]), ()),
    (processors.RobertaProcessing(("<|end_of_text|>", EOS), ("<|begin_of_text|>", BOS)), (BOS,)),
    (processors.BertProcessing(("<|end_of_text|>", EOS), ("<|begin_of_text|>", BOS)), (BOS,)),
    (vocabularies.llama3().post_processor, (BOS,)),
])
def test_the_post_processor_opens_a_text(processor, opening, tmp_path):
  made = with_processor(processor)
  made.enable_truncation(1)
  said = special_tokens.read(tmp_path, special_tokens.parse(made.to_str()))
  assert said.opening == opening
  made.no_truncation()
  ids = made.encode("the state").ids
  assert list(opening) == ids[:len(opening)] and ids[len(opening)] < BOS


@pytest.mark.parametrize("opens,add_bos,opening", [
    (True, None, (BOS,)), (True, False, (BOS,)), (True, True, (BOS,)), (False, True, (BOS,)), (False, None, ())])
def test_a_post_processor_that_opens_goes_before_add_bos_token(opens, add_bos, opening, tmp_path):
  write(tmp_path, tokenizer_config=dict(bos_token=dict(content="<|begin_of_text|>"), add_bos_token=add_bos))
  said = special_tokens.read(tmp_path, vocabularies.llama3(opens))
  assert said.opening == opening and said.add_bos == bool(opening)


def test_all_stops_are_taken(tmp_path):
  write(tmp_path, generation_config=dict(eos_token_id=[7, EOT], bos_token_id=BOS), config=dict(eos_token_id=9),
        tokenizer_config=dict(eos_token="<|end_of_text|>", pad_token="none of it", unk_token=None))
  said = special_tokens.read(tmp_path, vocabularies.llama3())
  assert said.stops == (EOS, 7, EOT, 9) and said.ids["bos"] == (BOS,) and "pad" not in said.ids
  assert special_tokens.read(tmp_path, vocabularies.llama3(), config=dict(eos_token_id=3)).stops == (EOS, 7, EOT, 3)


def load(path):
  return tokenizer_lib.load(tiny.config(data=dict(tokenizer=str(path))).data, None)


@pytest.mark.parametrize("files,eos", [
    (dict(tokenizer_config=dict(eos_token="<|eot_id|>"), config=dict(eos_token_id=EOS)), EOT),
    (dict(generation_config=dict(eos_token_id=[EOT, EOS])), EOT),
    (dict(config=dict(eos_token_id=EOS)), EOS),
    (dict(config=dict(eos_token_id=4000), generation_config=dict(eos_token_id=EOS)), EOS),
    (dict(pretrained=dict(eos_id=EOS), tokenizer_config=dict(eos_token="<|eot_id|>")), EOS),
])
def test_the_end_of_a_document_is_what_lies_beside_the_tokenizer(files, eos, tmp_path):
  path = tmp_path / "tokenizer.json"
  vocabularies.llama3().save(str(path))
  with pytest.raises(ValueError, match="no end-of-text token; add"):
    load(path)
  write(tmp_path, **files)
  made = load(path)
  assert made.eos_id == eos and made.num_bytes_V[eos] == 0
  assert eos not in made.encode(made.decode([5]) + "<|eot_id|><|end_of_text|>")
  assert made.identity != tokenizer_lib.JsonTokenizer(path.read_text(), 3).identity


def test_a_known_name_goes_first_where_it_is_an_added_token(tmp_path):
  """Its makers may name the token that ends an answer."""
  made = vocabularies.llama3()
  made.add_special_tokens(["</s>"])
  made.save(str(tmp_path / "a.json"))
  write(tmp_path, config=dict(eos_token_id=EOS))
  assert load(tmp_path / "a.json").eos_id == made.token_to_id("</s>")
  fields = json.loads(vocabularies.llama3().to_str())
  fields["model"]["vocab"]["</s>"] = 256  # text that no merge makes; it moves the added tokens by one
  (tmp_path / "b.json").write_text(json.dumps(fields))
  write(tmp_path, config=dict(eos_token_id=EOS + 1))
  assert load(tmp_path / "b.json").eos_id == EOS + 1


@pytest.mark.parametrize("files,message", [
    (dict(generation_config=[]), "generation_config.json holds a list"),
    (dict(generation_config=dict(eos_token_id="x")), "generation_config.json: eos_token_id='x'; give an id"),
    (dict(config=dict(bos_token_id=[1, None])), "config.json: bos_token_id=.1, None.; give an id"),
    (dict(tokenizer_config=dict(bos_token=3)), "tokenizer_config.json: bos is a int, not text"),
    (dict(tokenizer_config=dict(eos_token="\ud800")), "tokenizer_config.json: eos is no text"),
    (dict(tokenizer_config=dict(add_bos_token="yes")), "add_bos_token='yes'; use true or false"),
])
def test_fields_of_another_type_are_refused(files, message, tmp_path):
  write(tmp_path, **files)
  with pytest.raises(ValueError, match=message) as caught:
    special_tokens.read(tmp_path, vocabularies.llama3())
  assert "\n" not in str(caught.value)


def test_special_tokens_that_a_text_spells(tmp_path):
  """Training reads text; the library reads tokens."""
  plain = vocabularies.llama3()
  plain.add_tokens(["<tool>"])
  made, text = tokenizer_lib.JsonTokenizer(plain.to_str(), EOS), "the<|eot_id|> <tool>in<|end_of_text|>"
  assert made.encode_special(text).tolist() == plain.encode(text, add_special_tokens=False).ids
  ids = made.encode(text).tolist()
  assert plain.token_to_id("<tool>") in ids and EOT not in ids and EOS not in ids
  assert made.decode(ids) == text


@pytest.mark.parametrize("flags", [dict(), dict(lstrip=True), dict(rstrip=True), dict(single_word=True),
                                   dict(normalized=True)])
@pytest.mark.parametrize("content", ["state of", "of", " of", "of "])
def test_added_tokens_are_matched_as_the_library_does(flags, content, monkeypatch):
  """Long texts too, which are cut between words."""
  monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 3)
  plain = vocabularies.llama3()
  plain.add_tokens([tokenizers.AddedToken(content, **flags)])
  made = tokenizer_lib.JsonTokenizer(plain.to_str(), EOS)
  for text in ("the state of  a union of it", "of state of", "often of  of"):
    assert made.encode(text).tolist() == plain.encode(text, add_special_tokens=False).ids, text


def test_tokens_beyond_the_embedding_are_dropped():
  made = vocabularies.llama3()
  made.add_tokens(["<tool>"])
  made.add_special_tokens(["<pad>"])
  text = made.to_str()
  assert special_tokens.drop_beyond(text, 261) == (text, [])
  kept, dropped = special_tokens.drop_beyond(text, 259)
  assert dropped == ["<tool>", "<pad>"]
  ours = tokenizer_lib.JsonTokenizer(kept, EOS)
  assert ours.vocab_size == 259 and ours.decode(ours.encode("a<tool><pad>")) == "a<tool><pad>"
  with pytest.raises(ValueError, match="has id 260 and the embedding 200 rows; use the tokenizer that belongs"):
    special_tokens.drop_beyond(text, 200)
