"""Compare tokenizers with direct calls of the libraries that they come from."""

import io
import json

import corpus
import hypothesis
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from refusals import error_of
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers

from ttt_jax.config import ConfigError
from ttt_jax.data.prepare import tokenizer as tokenizer_lib

SPELLED = "<s>the river</s> <|bos|><s> bent <pad>"


@pytest.fixture(scope="module")
def sentencepiece_model():
    """Return the content of a .model like Llama 2's: BPE, byte fallback, BOS 1, EOS 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.documents(200)),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        minloglevel=2,
    )
    return model.getvalue()


def byte_level_bpe(special=("<s>", "</s>", "<|bos|>", "<pad>")):
    """Return a byte-level BPE of 320 tokens, the special tokens first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documents(200), trainer)
    return tokenizer


def write(path, tokenizer):
    path.parent.mkdir(exist_ok=True)
    path.write_text(tokenizer.to_str())
    return str(path)


def refused(location, **options):
    return error_of(ConfigError, tokenizer_lib.load, str(location), **options)


# ---- Bytes


@hypothesis.given(st.text())
def test_bytes_are_utf_8(text):
    byte = tokenizer_lib.load("byte")
    assert bytes(byte.encoder()(text)).decode() == text
    assert (byte.kind, byte.name, byte.vocab_size, byte.bos, byte.eos) == ("byte", "byte", 258, 256, 257)


def test_bytes_have_no_names_for_bos_and_eos():
    assert refused("byte", bos_token="<s>").startswith("--bos-token, --eos-token: the byte tokenizer has no names")


# ---- SentencePiece


def test_sentencepiece_encodes_as_the_library_does(tmp_path, sentencepiece_model):
    (tmp_path / "a.model").write_bytes(sentencepiece_model)
    ours = tokenizer_lib.load(str(tmp_path / "a.model"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    assert (ours.kind, ours.name, ours.vocab_size) == ("sentencepiece", "a.model", 300)
    assert ours.content == sentencepiece_model
    encode = ours.encoder()
    for text in [*corpus.documents(50, seed=1), SPELLED, " leading and trailing ", "\n\n"]:
        with_both = theirs.encode(text, add_bos=True, add_eos=True)
        assert [ours.bos, *encode(text).tolist(), ours.eos] == with_both
    assert encode("").tolist() == []
    assert not {1, 2} & set(encode(SPELLED).tolist())  # as text


def test_bos_and_eos_of_sentencepiece_can_be_named(tmp_path, sentencepiece_model):
    path = tmp_path / "a.model"
    path.write_bytes(sentencepiece_model)
    named = tokenizer_lib.load(str(path), bos_token="</s>", eos_token="<s>")
    assert (named.bos, named.eos) == (2, 1)
    assert refused(path, eos_token="<|end|>") == f"--eos-token '<|end|>': {path} has no such token"


def test_a_sentencepiece_model_may_have_no_bos(tmp_path):
    """Load a model without BOS, whose id is -1 in the library."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.documents(200)), model_writer=model, vocab_size=60, bos_id=-1, minloglevel=2
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    ours = tokenizer_lib.load(str(tmp_path / "a.model"))
    assert (ours.bos, ours.eos) == (None, 2)


# ---- Hugging Face


def test_huggingface_encodes_as_the_library_does_without_special_tokens(tmp_path):
    theirs = byte_level_bpe()
    ours = tokenizer_lib.load(write(tmp_path / "tokenizer.json", theirs))
    assert (ours.kind, ours.name, ours.vocab_size, ours.bos, ours.eos) == ("huggingface", "tokenizer.json", 320, 0, 1)
    encode = ours.encoder()
    for text in corpus.documents(50, seed=1):
        assert theirs.decode(encode(text).tolist()) == text
        if "<" not in text:
            assert encode(text).tolist() == theirs.encode(text).ids


def test_truncation_padding_and_post_processor_of_a_file_have_no_effect(tmp_path):
    plain = byte_level_bpe()
    eager = byte_level_bpe()
    eager.enable_truncation(5)
    eager.enable_padding(length=50, pad_id=3, pad_token="<pad>")
    both = [("<s>", 0), ("</s>", 1)]
    eager.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=both)
    assert len(eager.encode("the river bent twice").ids) == 50  # the file turns it on
    expected = tokenizer_lib.load(write(tmp_path / "plain.json", plain)).encoder()
    actual = tokenizer_lib.load(write(tmp_path / "eager.json", eager)).encoder()
    for text in [*corpus.documents(50, seed=1), ""]:
        assert actual(text).tolist() == expected(text).tolist()


def test_special_tokens_that_are_spelled_out_are_text(tmp_path):
    theirs = byte_level_bpe()
    ours = tokenizer_lib.load(write(tmp_path / "a.json", theirs))
    ids = ours.encoder()(SPELLED).tolist()
    assert {0, 1, 2, 3} & set(theirs.encode(SPELLED).ids)  # which the library returns by default
    assert not {0, 1, 2, 3} & set(ids)
    assert theirs.decode(ids) == SPELLED


def test_a_normalizer_is_part_of_the_tokenizer(tmp_path):
    theirs = byte_level_bpe()
    theirs.normalizer = normalizers.Lowercase()
    encode = tokenizer_lib.load(write(tmp_path / "a.json", theirs)).encoder()
    assert encode("The RIVER").tolist() == encode("the river").tolist() == theirs.encode("the river").ids


def test_the_vocabulary_size_is_above_the_highest_id(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"the": 0, "river": 70_000, "[UNK]": 9}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ours = tokenizer_lib.load(write(tmp_path / "a.json", words))
    assert (ours.vocab_size, ours.bos, ours.eos) == (70_001, None, None)
    assert ours.encoder()("the river bent").tolist() == [0, 70_000, 9]


def test_added_tokens_count_for_the_vocabulary_size(tmp_path):
    theirs = byte_level_bpe(special=["<|endoftext|>"])
    theirs.add_special_tokens([AddedToken("<|begin_of_text|>", special=True)])
    ours = tokenizer_lib.load(write(tmp_path / "a.json", theirs))
    assert (ours.vocab_size, ours.bos, ours.eos) == (321, 320, 0)


# ---- BOS and EOS


@pytest.mark.parametrize(
    ("special", "beside", "asked", "expected"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>"], None, {}, (0, 1)),
        (["<|endoftext|>"], None, {}, (None, 0)),
        (["[BOS]", "<s>", "</s>"], None, {}, (1, 2)),  # the most usual names
        (["<s>", "<a>", "</s>", "<b>"], {"bos_token": "<a>", "eos_token": {"content": "<b>", "special": True}},
         {}, (1, 3)),
        (["<s>", "<a>", "</s>"], {"bos_token": "<a>", "eos_token": None}, {}, (1, None)),
        (["<s>", "</s>"], {"bos_token": None, "eos_token": None}, {}, (None, None)),
        (["<s>", "</s>"], {"bos_token": None, "eos_token": None}, {"bos_token": "<s>"}, (0, None)),
        (["<s>", "</s>"], {"bos_token": None, "add_bos_token": False}, {}, (None, 1)),
        (["<s>", "</s>", "<a>", "<b>"], {"bos_token": "<s>"}, {"bos_token": "<a>", "eos_token": "<b>"}, (2, 3)),
        (["<a>"], None, {}, (None, None)),
        (["<s>", "</s>"], ["no", "object"], {}, (0, 1)),
    ],
)  # fmt: skip
def test_bos_and_eos_come_from_options_then_config_then_usual_names(tmp_path, special, beside, asked, expected):
    path = write(tmp_path / "tokenizer.json", byte_level_bpe(special))
    if beside is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    ours = tokenizer_lib.load(path, **asked)
    assert (ours.bos, ours.eos) == expected


def test_the_config_belongs_to_tokenizer_json_alone(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "</s>"}')
    assert tokenizer_lib.load(write(tmp_path / "other.json", byte_level_bpe())).bos == 0
    assert tokenizer_lib.load(write(tmp_path / "tokenizer.json", byte_level_bpe())).bos == 1


def test_an_unknown_token_name_is_refused(tmp_path):
    path = write(tmp_path / "a.json", byte_level_bpe())
    assert refused(path, bos_token="<|start|>") == f"--bos-token '<|start|>': {path} has no such token"


# ---- Files that are no tokenizer


PICKLE = b"cpytest\nfail\n(Va pickle was read\ntR."  # calls pytest.fail when it is read


@pytest.mark.parametrize("name", ["tokenizer.pkl", "tokenizer.pickle", "tokenizer.json", "tokenizer.model"])
def test_a_pickle_is_not_read_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(PICKLE)
    message = refused(tmp_path / name)
    assert str(tmp_path / name) in message
    assert ("pickles are not read" in message) == ("pick" in name or ".pkl" in name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "{}: not a Hugging Face tokenizer: "),
        ("a.json", b"{}", "{}: not a Hugging Face tokenizer: "),
        ("a.json", b"\xff\xfe", "{}: not a Hugging Face tokenizer: "),
        ("a.json", b'{\n"model":\n1}', "{}: not a Hugging Face tokenizer: "),
        ("a.json", tokenizers.Tokenizer(models.BPE()).to_str().encode(), "{}: "),  # without tokens
        ("a.model", b"junk and more of it", "{}: not a SentencePiece model"),
        ("a.model", b"", "{}: not a SentencePiece model"),
        ("a.txt", b"", "--tokenizer {}: expected byte, a SentencePiece .model or a Hugging Face tokenizer.json"),
    ],
)
def test_files_that_are_no_tokenizer_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith(message.format(tmp_path / name))


def test_a_config_that_is_not_json_is_refused(tmp_path):
    path = write(tmp_path / "tokenizer.json", byte_level_bpe())
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert refused(path).startswith(f"{tmp_path}/tokenizer_config.json: not JSON: ")


def test_a_missing_tokenizer_is_refused(tmp_path):
    for name in ("tokenizer.json", "a.model"):
        assert refused(tmp_path / name) == f"--tokenizer {tmp_path / name}: no such file"
    (tmp_path / "a.model").mkdir()
    assert refused(tmp_path / "a.model") == f"--tokenizer {tmp_path}/a.model: Is a directory"


def test_equal_contents_have_equal_hashes(tmp_path, sentencepiece_model):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    hashes = {tokenizer_lib.load(write(path, byte_level_bpe())).sha256 for path in (first, second)}
    assert len(hashes) == 1
    assert tokenizer_lib.load(write(second, byte_level_bpe(["<s>"]))).sha256 not in hashes


def test_tokens_are_uint32(tmp_path):
    path = write(tmp_path / "a.json", byte_level_bpe())
    assert tokenizer_lib.load(path).encoder()("").dtype == np.uint32


# ---- Back to text


@hypothesis.given(st.text())
def test_bytes_decode_to_their_text(text):
    byte = tokenizer_lib.byte()
    tokens = np.concatenate([[256], byte.encoder()(text), [257]])
    assert byte.decoder()(tokens) == text


def test_part_of_a_character_is_replaced():
    assert tokenizer_lib.byte().decoder()(np.frombuffer("né".encode()[:-1], np.uint8)) == "n\ufffd"


def test_tokens_of_libraries_decode_to_their_text(tmp_path, sentencepiece_model):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    write(tmp_path / "of_words" / "tokenizer.json", byte_level_bpe())
    text = "The river bent and the Ünder grew 12."
    for location in (tmp_path / "tokenizer.model", tmp_path / "of_words" / "tokenizer.json"):
        tokenizer = tokenizer_lib.load(str(location))
        tokens = tokenizer.encoder()(text)
        assert tokenizer.decoder()(tokens) == text
        assert tokenizer.decoder()(np.concatenate([[tokenizer.bos], tokens, [tokenizer.eos]])) == text
