"""Check that no text spells a special token, and that losses are noticed, for every kind of tokenizer."""

import io
import itertools
import json
import re

import corpus
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from ttt_jax.data.prepare import records, text_fidelity, tokenize_units
from ttt_jax.data.prepare import tokenizer as tokenizer_lib

LETTERS = "pqrs<>/\u2581"
CONTROL = ("<unk>", "<s>", "</s>")
METASPACE = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


def unigram():
    made = tokenizers.Tokenizer(
        models.Unigram([*((name, 0.0) for name in CONTROL), *((c, -4.0) for c in LETTERS)], unk_id=0)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


def word_level():
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "pq": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def word_piece():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "p": 3, "##q": 4, "<": 5, "##s": 6, "##>": 7, "##/": 8}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def metaspace_bpe():
    """Return a tokenizer like Llama 2's, with merges that make </s>."""
    vocab = {name: id for id, name in enumerate([*CONTROL, *LETTERS, "</", "s>"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    made.normalizer = METASPACE
    return made


def metaspace_before_bpe():
    """Return a tokenizer like newer files of Llama 2, with bytes for characters without a token."""
    vocab = {
        name: id for id, name in enumerate([*CONTROL, *LETTERS, "</", "s>", *(f"<0x{i:02X}>" for i in range(256))])
    }
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def byte_level_bpe():
    vocab = {name: id for id, name in enumerate([*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


FAMILIES = [unigram, word_level, word_piece, metaspace_bpe, metaspace_before_bpe, byte_level_bpe]


def encoder_of(folder, made, **options):
    path = folder / "tokenizer.json"
    path.write_text(made.to_str())
    return tokenizer_lib.load(str(path), **options)


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("flags", [{}, {"lstrip": True, "rstrip": True}, {"single_word": True}, {"normalized": True}])
@pytest.mark.parametrize("special", [True, False])
def test_documents_that_spell_special_tokens_have_none(tmp_path, make, flags, special):
    """Check also files that do not call BOS and EOS special, or do not list them."""
    made = make()
    made.add_special_tokens(["<unk>"])
    if special:
        made.add_special_tokens([AddedToken(name, special=True, **flags) for name in CONTROL[1:]])
    elif flags:
        made.add_tokens([AddedToken(name, **flags) for name in CONTROL[1:]])
    ours = encoder_of(tmp_path, made)
    assert (ours.bos, ours.eos, ours.unknown) == (1, 2, None if make is byte_level_bpe else 0)
    encode = ours.encoder()
    pieces = [*CONTROL, "pq", "p", " ", "</", "s>", "<", "pq </s>"]
    for text in ("pq </s> p <s></s> <unk> pq", "".join(pieces), *map("".join, itertools.product(pieces, repeat=2))):
        assert not {1, 2} & set(encode(text).tolist())


def test_other_text_keeps_its_tokens(tmp_path):
    """Check that an added token that is not special is text and keeps its id, as in the library."""
    made = metaspace_bpe()
    made.add_special_tokens(list(CONTROL))
    made.add_special_tokens(["<pad>"])
    made.add_tokens(["qq"])
    encode = encoder_of(tmp_path, made).encoder()
    assert made.token_to_id("qq") == 14
    for text in ("pq qq rs", "qq", "s> </ pqrs", "p x"):
        assert encode(text).tolist() == made.encode(text, add_special_tokens=False).ids


def test_a_special_token_becomes_the_pieces_of_its_spelling(tmp_path):
    made = metaspace_bpe()
    made.add_special_tokens(list(CONTROL))
    ids = encoder_of(tmp_path, made).encoder()("</s>").tolist()
    assert [made.id_to_token(id) for id in ids] == ["\u2581", "</", "s>"]


def test_a_sentencepiece_symbol_named_as_eos_is_not_spelled(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.documents(100)),
        model_writer=model,
        vocab_size=50,
        user_defined_symbols=["<end>", "<other>"],
        minloglevel=2,
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    named = tokenizer_lib.load(str(tmp_path / "a.model"), eos_token="<end>")
    plain = tokenizer_lib.load(str(tmp_path / "a.model"))
    assert named.eos == 3
    assert 3 in plain.encoder()("the <end>")  # a symbol that is not EOS is text of one token
    found = named.encoder()("the <end> of </s> <other>").tolist()
    assert not {1, 2, 3} & set(found)
    assert 4 in found


@pytest.mark.parametrize(
    "model",
    [
        models.BPE(vocab={"p": 0, "q": 1}, merges=[]),
        models.Unigram([("p", -1.0), ("q", -1.0)]),
        models.WordLevel({"pq": 0, "p": 1, "q": 2}),
        models.WordPiece({"p": 0, "##q": 1, "q": 2}),
    ],
    ids=["bpe", "unigram", "word_level", "word_piece"],
)
def test_a_character_or_word_without_a_token_is_refused_by_name(tmp_path, model):
    made = tokenizers.Tokenizer(model)
    made.add_tokens(["<end>"])
    tokenizer = encoder_of(tmp_path, made, eos_token="<end>")
    assert tokenizer.encoder()("pq").tolist() == made.encode("pq").ids
    of_words = isinstance(model, models.WordLevel | models.WordPiece)
    expected = "word 'pqép' has no token" if of_words else "character 'é' (U+00E9) has no token"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        tokenizer.encoder()("pqép")


def test_an_incomplete_byte_alphabet_is_refused_by_name(tmp_path):
    made = byte_level_bpe()
    file = json.loads(made.to_str())
    del file["model"]["vocab"]["\u0120"]  # a space
    tokenizer = encoder_of(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(file)))
    with pytest.raises(ValueError, match=r"^character ' ' \(U\+0020\) has no token$"):
        tokenizer.encoder()("p q")


@pytest.mark.parametrize("make", FAMILIES)
def test_no_text_spells_tokens_that_the_config_sets_to_null(tmp_path, make):
    """Check also that a token that is both BOS and EOS separates documents once."""
    made = make()
    made.add_special_tokens(list(CONTROL))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": null}')
    ours = encoder_of(tmp_path, made)
    assert (ours.bos, ours.eos) == (None, None)
    assert not {1, 2} & set(ours.encoder()("pq </s> p <s></s>").tolist())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "</s>", "eos_token": {"content": "</s>"}}')
    ours = encoder_of(tmp_path, made)
    assert (ours.bos, ours.eos) == (2, 2)
    job = tokenize_units.Job(ours, ours.bos, ours.eos)
    unit = records.Unit("values", ["pq </s>", "pq"], 1, None, records.Position(1))
    tokens = tokenize_units.tokenize_unit(job, "train", unit).pieces["train"].tokens.tolist()
    assert [i for i, token in enumerate(tokens) if token == 2] == [len(ours.encoder()("pq </s>")), len(tokens) - 1]


def test_bytes_never_spell_a_special_token():
    text = "<s></s><|endoftext|>"
    job = tokenize_units.Job(tokenizer_lib.byte(), 256, 257)
    unit = records.Unit("values", [text], 1, None, records.Position(1))
    assert tokenize_units.tokenize_unit(job, "train", unit).pieces["train"].tokens.tolist() == [
        256,
        *text.encode(),
        257,
    ]


def test_a_special_tokens_map_may_set_a_token_to_null(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": null, "eos_token": "</s>"}')
    found = encoder_of(tmp_path, byte_level_bpe())
    assert (found.bos, found.eos) == (None, 2)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": null}')
    found = encoder_of(tmp_path, byte_level_bpe())
    assert (found.bos, found.eos) == (1, None)


# ---- Lost differences

VARIED = "ABabäﬁ1 \n\t\x01"
PIECES = [*VARIED, "fi", "f", "i", "\u2581", "ab", "Ab", "?"]


def huggingface(model, normalizer=None, pre_tokenizer=None):
    made = tokenizers.Tokenizer(model)
    if normalizer:
        made.normalizer = normalizer
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizer
    return tokenizer_lib.from_huggingface(made.to_str().encode(), "tokenizer_lib.json", None, None)


def bpe():
    return models.BPE(vocab={piece: id for id, piece in enumerate(PIECES)}, merges=[])


def words():
    return models.WordLevel({piece: id for id, piece in enumerate(PIECES)}, unk_token="?")


def sentence_piece(rule):
    """Return a model of letters, with one of the library's normalizers."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(VARIED), "fi Ab ab"] * 9),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        minloglevel=2,
    )
    content = model.getvalue()
    return tokenizer_lib.Tokenizer("sentencepiece", "a.model", content, 300, 1, 2)


SPACES = ["line ends", "repeated spaces", "spaces at the end"]
BYTE_LEVEL = models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
TABLE = {
    "byte": (tokenizer_lib.byte, []),
    "byte_level": (lambda: huggingface(BYTE_LEVEL, None, pre_tokenizers.ByteLevel(add_prefix_space=False)), []),
    "bpe": (lambda: huggingface(bpe()), []),
    "metaspace": (lambda: huggingface(bpe(), None, pre_tokenizers.Metaspace()), []),
    "lower_case": (lambda: huggingface(bpe(), normalizers.Lowercase()), ["capitals"]),
    "nfkc": (lambda: huggingface(bpe(), normalizers.NFKC()), ["compatibility characters"]),
    "accents": (
        lambda: huggingface(bpe(), normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        ["accents"],
    ),
    "strip": (lambda: huggingface(bpe(), normalizers.Strip()), ["spaces at the end"]),
    "bert": (
        lambda: huggingface(bpe(), normalizers.BertNormalizer()),
        ["line ends", "control characters", "capitals", "accents"],
    ),
    "word_level": (lambda: huggingface(words(), None, pre_tokenizers.WhitespaceSplit()), SPACES),
    "sentencepiece_identity": (lambda: sentence_piece("identity"), []),
    "sentencepiece_nmt_nfkc": (
        lambda: sentence_piece("nmt_nfkc"),
        [*SPACES, "control characters", "compatibility characters"],
    ),
}


def lost(tokenizer):
    return text_fidelity.lost_differences(tokenizer.encoder(), tokenizer.unknown)


@pytest.mark.parametrize("name", TABLE)
def test_lost_differences_are_named(name):
    make, expected = TABLE[name]
    assert lost(make()) == expected


def test_characters_without_a_token_are_no_lost_difference():
    assert lost(huggingface(models.WordLevel({"?": 0}, unk_token="?"))) == []
    assert lost(huggingface(models.BPE(vocab={"a": 0}, merges=[]))) == []
