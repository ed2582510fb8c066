"""What tokenizers lose is named, for every kind of tokenizer."""

import io

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from ttt_jax.data.prepare import lost_text, tokenizer

LETTERS = "ABabäﬁ1 \n\t\x01"
PIECES = [*LETTERS, "fi", "f", "i", "\u2581", "ab", "Ab", "?"]


def huggingface(model, normalizer=None, pre_tokenizer=None):
    made = tokenizers.Tokenizer(model)
    if normalizer:
        made.normalizer = normalizer
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizer
    return tokenizer.from_huggingface(made.to_str().encode(), "tokenizer.json", None, None)


def bpe():
    return models.BPE(vocab={piece: id for id, piece in enumerate(PIECES)}, merges=[])


def words():
    return models.WordLevel({piece: id for id, piece in enumerate(PIECES)}, unk_token="?")


def sentence_piece(rule):
    """A model of letters, with one of the library's normalizers."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(LETTERS), "fi Ab ab"] * 9),
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
    return tokenizer.Tokenizer("sentencepiece", "a.model", content, 300, 1, 2)


SPACES = ["line ends", "repeated spaces", "spaces at the end"]
BYTES = models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
TABLE = {
    "byte": (tokenizer.byte, []),
    "byte_level": (lambda: huggingface(BYTES, None, pre_tokenizers.ByteLevel(add_prefix_space=False)), []),
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


@pytest.mark.parametrize("name", TABLE)
def test_what_is_lost_is_named(name):
    make, expected = TABLE[name]
    assert lost_text.lost(make()) == expected


def test_characters_without_a_token_are_counted_rather():
    assert lost_text.lost(huggingface(models.WordLevel({"?": 0}, unk_token="?"))) == []
    assert lost_text.lost(huggingface(models.BPE(vocab={"a": 0}, merges=[]))) == []
