"""Check the tokens of one unit, and the splits of its documents."""

import hashlib

import corpus
import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import models

from ttt_jax.config import ConfigError
from ttt_jax.data.prepare import tokenize_units, tokenizer
from ttt_jax.data.prepare.records import Position, Problem, Unit
from ttt_jax.data.prepare.tokenize_units import Job
from ttt_jax.data.token_source import TokenSource

BYTE = tokenizer.byte()


def unit(texts, problem=None):
    return Unit("values", list(texts), 1, problem, Position(1))


def of_size(vocab_size):
    return Job(tokenizer.Tokenizer("byte", "byte", b"", vocab_size, None, None), None, None)


def split_by_hand(text, seed, validation, test):
    """Return the split by the rule in dataset.json: blake2b-64 of the text, salted with the seed."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(16, "big")).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "validation" if place < validation else "test" if place < validation + test else "train"


@pytest.mark.parametrize(("bos", "eos"), [(256, 257), (None, 257), (256, None), (None, None)])
def test_a_document_is_bos_its_tokens_and_eos(bos, eos):
    texts = ["abc", "", "é\n"]
    part = tokenize_units.tokenize_unit(Job(BYTE, bos, eos), "validation", unit(texts))
    rows = [[bos] * (bos is not None) + list(text.encode()) + [eos] * (eos is not None) for text in texts]
    (name, piece), *others = part.pieces.items()
    assert (name, others, part.problems) == ("validation", [], [])
    assert piece.tokens.tolist() == [token for row in rows for token in row]
    assert piece.lengths.tolist() == [len(row) for row in rows]
    assert piece.text_bytes == 6
    assert (piece.tokens.dtype, piece.lengths.dtype) == (np.uint16, np.int64)


def test_one_token_that_is_bos_and_eos_is_put_after_documents_alone():
    job = Job(BYTE, 7, 7)
    assert (job.bos, job.eos) == (None, 7)
    piece = tokenize_units.tokenize_unit(job, "train", unit(["ab", "c"])).pieces["train"]
    assert piece.tokens.tolist() == [97, 98, 7, 99, 7]
    assert piece.lengths.tolist() == [3, 2]
    source = TokenSource("two", piece.tokens, 258, job.bos)
    assert source.piece(0, 4)["mask"].tolist() == [1, 1, 1, 1]


def test_unknown_tokens_are_counted_by_split():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    job = Job(tokenizer.from_huggingface(words.to_str().encode(), "tokenizer.json", None, None), None, None)
    part = tokenize_units.tokenize_unit(job, "train", unit(["a", "b", "a", "c"]))
    assert (part.pieces["train"].tokens.tolist(), part.pieces["train"].unknown) == ([0, 1, 0, 1], 2)
    assert part.problems == []


def test_documents_without_tokens_are_counted_by_split():
    """Count empty documents, and documents of which the tokenizer keeps nothing."""
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    job = Job(tokenizer.from_huggingface(words.to_str().encode(), "tokenizer.json", None, None), None, 2)
    piece = tokenize_units.tokenize_unit(job, "train", unit(["a", "", " \n", "a"])).pieces["train"]
    assert (piece.tokens.tolist(), piece.lengths.tolist(), piece.empty) == ([0, 2, 2, 2, 0, 2], [2, 1, 1, 2], 2)
    piece = tokenize_units.tokenize_unit(Job(BYTE, None, None), "train", unit(["", "", " "])).pieces["train"]
    assert (piece.tokens.tolist(), piece.lengths.tolist(), piece.empty) == ([32], [0, 0, 1], 2)


def test_problems_come_in_order_beside_the_readable_records():
    part = tokenize_units.tokenize_unit(Job(BYTE, None, None), "train", unit(["a", None, "b", 5], Problem(5, "broken")))
    assert part.pieces["train"].tokens.tolist() == [97, 98]
    assert [problem.record for problem in part.problems] == [2, 4, 5]
    assert tokenize_units.tokenize_unit(Job(BYTE, None, None), "train", unit([None])).pieces == {}
    assert tokenize_units.tokenize_unit(Job(BYTE, None, None), "train", unit([])) == ({}, [])


def test_a_text_that_the_tokenizer_refuses_is_a_bad_record():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}))  # without a token for unknown words
    job = Job(tokenizer.from_huggingface(words.to_str().encode(), "tokenizer.json", None, None), None, None)
    part = tokenize_units.tokenize_unit(job, "train", unit(["a", "b", "a"]))
    assert part.pieces["train"].tokens.tolist() == [0, 0]
    (problem,) = part.problems
    assert problem == Problem(2, "the tokenizer failed: word 'b' has no token")


def test_a_tokenizer_that_cannot_be_loaded_is_an_error():
    """Raise for a missing library: skipping records would skip all that come to the machine without it."""
    job = Job(tokenizer.Tokenizer("huggingface", "tokenizer.json", b"{}", 300, None, None), None, None)
    with pytest.raises(ConfigError, match=r"^tokenizer.json: not a Hugging Face tokenizer"):
        tokenize_units.tokenize_unit(job, "train", unit(["a", "b"]))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(258, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_tokens_take_two_bytes_as_long_as_all_fit(vocab_size, dtype):
    job = of_size(vocab_size)
    assert job.dtype == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1
    assert tokenize_units.tokenize_unit(job, "train", unit(["a"])).pieces["train"].tokens.dtype == dtype


@hypothesis.given(
    texts=st.lists(st.text(), max_size=20),
    seed=st.integers(0, 2**64 - 1),
    validation=st.floats(0, 0.5),
    test=st.floats(0, 0.4),
)
def test_the_split_of_a_document_depends_on_its_hash_alone(texts, seed, validation, test):
    job = Job(BYTE, 256, None, validation_fraction=validation, test_fraction=test, split_seed=seed)
    expected: dict[str, list[str]] = {}
    for text in texts:
        expected.setdefault(split_by_hand(text, seed, validation, test), []).append(text)
    for order in (1, -1):
        found = {}
        for name, piece in tokenize_units.tokenize_unit(job, "train", unit(texts[::order])).pieces.items():
            rows = np.split(piece.tokens, np.cumsum(piece.lengths)[:-1])
            found[name] = [bytes(row[1:].astype(np.uint8)).decode() for row in rows][::order]
        assert found == expected


def test_splits_have_about_the_given_fractions():
    texts = [f"document {i}" for i in range(20_000)]
    job = Job(BYTE, None, None, validation_fraction=0.1, test_fraction=0.05, split_seed=1)
    part = tokenize_units.tokenize_unit(job, "train", unit(texts))
    counts = {name: len(piece.lengths) for name, piece in part.pieces.items()}
    assert sum(counts.values()) == 20_000
    assert counts["validation"] == pytest.approx(2000, abs=200)  # 4.7 standard deviations
    assert counts["test"] == pytest.approx(1000, abs=150)


def test_another_seed_is_another_split():
    texts = [f"document {i}" for i in range(2000)]

    def validation(seed):
        job = Job(BYTE, None, None, validation_fraction=0.5, split_seed=seed)
        return {text for text in texts if job.split_of("train", text.encode()) == "validation"}

    sets = [validation(seed) for seed in (0, 1, 2357, 2**64 - 1)]
    assert validation(1) == sets[1]
    for i, one in enumerate(sets):
        for other in sets[:i]:
            assert len(one & other) == pytest.approx(500, abs=100)  # independent


def test_only_train_files_are_split():
    job = Job(BYTE, None, None, validation_fraction=0.5, test_fraction=0.4)
    for split in ("validation", "test"):
        assert {job.split_of(split, text.encode()) for text in corpus.documents(50)} == {split}
    whole = Job(BYTE, None, None)
    assert {whole.split_of("train", text.encode()) for text in corpus.documents(50)} == {"train"}


def test_a_job_is_sent_without_its_loaded_tokenizer_and_does_the_same(sent_to_a_process):
    job = Job(BYTE, 256, 257, validation_fraction=0.25, split_seed=3)
    expected = tokenize_units.tokenize_unit(job, "train", unit(corpus.documents(30)))
    copy = sent_to_a_process(job)
    assert "encode" in vars(job)
    assert "encode" not in vars(copy)
    assert copy == job
    actual = tokenize_units.tokenize_unit(copy, "train", unit(corpus.documents(30)))
    assert actual.pieces.keys() == expected.pieces.keys() == {"train", "validation"}
    for name, piece in actual.pieces.items():
        np.testing.assert_array_equal(piece.tokens, expected.pieces[name].tokens)
