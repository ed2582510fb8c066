"""Check that an evaluation reads every token of every sequence once, for any pieces and batches."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ttt_jax.config import ConfigError
from ttt_jax.data import sequences
from ttt_jax.data.sequences import Span
from ttt_jax.data.token_source import TokenSource

BOS = 99


def a_source(lengths, known=True) -> TokenSource:
    """Return documents of these lengths, BOS included; token i of document d is 100 (d + 1) + i."""
    tokens = [token for d, n in enumerate(lengths) for token in (BOS, *range(100 * d + 101, 100 * d + 100 + n))]
    starts = np.cumsum([0, *lengths[:-1]])
    return TokenSource("some/test", np.array(tokens, np.uint32), 10**6, BOS, starts if known else None)


def read(source, wanted, piece_length=5, batch_size=2) -> list[dict[str, list[int]]]:
    """Return the inputs, targets and masks of each sequence, joined from its pieces."""
    found: list[dict[str, list[int]]] = []
    begins = True
    for piece in sequences.pieces(source, wanted, piece_length=piece_length, batch_size=batch_size):
        assert piece.begins == begins  # a new group begins after the last piece of a group
        begins = piece.ends
        if piece.begins:
            found += [{"inputs": [], "targets": [], "mask": []} for _ in range(piece.rows)]
        assert {x.shape for x in piece.batch.values()} == {(batch_size, piece_length)}
        assert not piece.batch["mask"][piece.rows :].any()
        for row, sequence in enumerate(found[-piece.rows :]):
            for name, x in sequence.items():
                x += piece.batch[name][row].tolist()
    assert begins
    for spans, sequence in zip(wanted, found, strict=True):
        length = sequences.length(spans)
        assert not any(sequence["mask"][length:])  # padding comes last
        for name in sequence:
            sequence[name] = sequence[name][:length]
        assert sequences.counted(source, spans).tolist() == [count > 0 for count in sequence["mask"]]
    return found


LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=9)


@pytest.mark.parametrize("known", [True, False])
@hypothesis.given(lengths=LENGTHS, piece_length=st.integers(1, 12), batch_size=st.integers(1, 4))
@hypothesis.settings(max_examples=30)
def test_every_document_is_read_from_its_beginning_to_its_end(known, lengths, piece_length, batch_size):
    source = a_source(lengths, known)
    found = read(source, sequences.documents(source, 100, 100), piece_length, batch_size)
    expected = [(BOS, *range(100 * d + 101, 100 * d + 100 + n)) for d, n in enumerate(lengths)]
    assert [document["inputs"] for document in found] == [list(tokens[:-1]) for tokens in expected]
    assert [document["targets"] for document in found] == [list(tokens[1:]) for tokens in expected]
    assert all(all(document["mask"]) for document in found)


@hypothesis.given(
    lengths=LENGTHS,
    length=st.integers(1, 40),
    chains=st.integers(1, 5),
    piece_length=st.integers(1, 12),
    has_bos=st.booleans(),
)
@hypothesis.settings(max_examples=50)
def test_chains_read_documents_one_after_another_and_count_what_documents_count(
    lengths, length, chains, piece_length, has_bos
):
    source = dataclasses.replace(a_source(lengths), **({} if has_bos else {"bos": None}))
    alone = read(source, sequences.documents(source, length, 100))
    wanted = sequences.chains(source, length, 100, chains)
    found = read(source, wanted, piece_length)
    assert len(found) == min(chains, len(lengths))
    assert max(map(len, wanted)) - min(map(len, wanted)) <= 1
    whole = [(BOS, *range(100 * d + 101, 100 * d + 100 + n))[:length] for d, n in enumerate(lengths)]
    if len(whole[-1]) == lengths[-1]:
        whole[-1] = whole[-1][:-1]  # the last token of the split has no target
    assert [token for chain in found for token in chain["inputs"]] == [
        token for document in whole for token in document
    ]
    counted = [
        (x, y)
        for chain in found
        for x, y, mask in zip(chain["inputs"], chain["targets"], chain["mask"], strict=True)
        if mask
    ]
    assert counted == [pair for document in alone for pair in zip(document["inputs"], document["targets"], strict=True)]


def test_windows_spread_over_the_split():
    source = a_source([400])
    assert sequences.windows(source, 39, 4) == [(Span(s, s + 39, 39),) for s in (0, 78, 195, 273)]  # 4 of 10 windows
    assert len(sequences.windows(source, 39, 100)) == 10
    found = read(source, sequences.windows(source, 39, 4), piece_length=8, batch_size=3)
    assert found[1]["inputs"] == list(range(178, 178 + 39))
    assert found[1]["targets"] == list(range(179, 179 + 39))


def test_the_last_target_is_of_the_same_document_also_without_bos():
    source = dataclasses.replace(a_source([5, 3, 7]), bos=None)
    found = read(source, sequences.documents(source, 100, 100), piece_length=4)
    assert [document["targets"][-1] for document in found] == [104, 202, 306]
    assert [len(document["targets"]) for document in found] == [4, 2, 6]


def test_documents_are_cut_to_the_given_length():
    source = a_source([30, 5, 12])
    found = read(source, sequences.documents(source, 10, 100), piece_length=4)
    assert [len(document["inputs"]) for document in found] == [10, 4, 10]
    assert found[0]["targets"] == list(range(101, 111))


def test_documents_spread_over_the_split():
    source = a_source([5] * 10)
    found = read(source, sequences.documents(source, 100, 4), piece_length=8, batch_size=3)
    assert [document["targets"][0] // 100 - 1 for document in found] == [0, 2, 5, 7]


def test_documents_without_anything_to_predict_are_left_out():
    source = a_source([1, 7, 3, 1, 9])
    assert sequences.documents(source, 100, 100) == [(Span(1, 7, 6),), (Span(8, 10, 2),), (Span(12, 20, 8),)]
    empty = a_source([1, 1])
    assert sequences.documents(empty, 100, 100) == sequences.chains(empty, 100, 100, 3) == []


def test_a_source_that_knows_no_documents_is_refused():
    unknown = dataclasses.replace(a_source([5, 5], known=False), bos=None)
    with pytest.raises(ConfigError, match="some/test: does not say where documents begin; expected"):
        sequences.document_starts(unknown)


def test_document_starts_are_found_in_every_block_of_the_search(monkeypatch):
    monkeypatch.setattr(sequences, "_SCANNED", 7)
    lengths = [5, 9, 2, 20, 3, 3]
    expected = np.cumsum([0, *lengths[:-1]]).tolist()
    assert sequences.document_starts(a_source(lengths, known=False)).tolist() == expected
    assert sequences.document_starts(a_source(lengths)).tolist() == expected


def test_documents_with_nothing_to_predict_are_counted():
    assert [sequences.too_short(a_source([1, 3, 1, 2], known)) for known in (True, False)] == [2, 2]
    assert len(sequences.documents(a_source([1, 3, 1, 2]), 9, 9)) == 2
