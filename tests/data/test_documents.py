"""Whole documents in order: every token of every document once, whatever the pieces and batches."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ttt_jax.config import ConfigError
from ttt_jax.data import documents
from ttt_jax.data.source import TokenSource

BOS = 99


def a_source(lengths, known=True) -> TokenSource:
    """Documents of so many tokens, BOS included; token i of document d is 100 (d + 1) + i."""
    tokens = [token for d, n in enumerate(lengths) for token in (BOS, *range(100 * d + 101, 100 * d + 100 + n))]
    starts = np.cumsum([0, *lengths[:-1]])
    return TokenSource("some/test", np.array(tokens, np.uint32), 10**6, BOS, starts if known else None)


def read(source, **options) -> list[dict[str, list[int]]]:
    """The inputs, targets and counted targets of each document, put together from its pieces."""
    found: list[dict[str, list[int]]] = []
    rows = 0
    for piece in documents.pieces(source, **options):
        if piece.begins:
            rows = piece.rows
            found += [{"inputs": [], "targets": [], "lengths": []} for _ in range(rows)]
        assert piece.rows == rows
        assert {x.shape for x in piece.batch.values()} == {(options["batch_size"], options["piece_length"])}
        assert not piece.batch["mask"][rows:].any()
        for row, document in enumerate(found[-rows:]):
            counted = piece.batch["mask"][row] > 0
            document["lengths"].append(int(counted.sum()))
            assert counted[: counted.sum()].all()  # what is filled up stands behind
            for name in ("inputs", "targets"):
                document[name] += piece.batch[name][row][counted].tolist()
    return found


@pytest.mark.parametrize("known", [True, False])
@hypothesis.given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=9),
    piece_length=st.integers(1, 12),
    batch_size=st.integers(1, 4),
)
def test_every_document_is_read_from_its_beginning_to_its_end(known, lengths, piece_length, batch_size):
    found = read(a_source(lengths, known), piece_length=piece_length, batch_size=batch_size)
    expected = [(BOS, *range(100 * d + 101, 100 * d + 100 + n)) for d, n in enumerate(lengths)]
    assert [document["inputs"] for document in found] == [list(tokens[:-1]) for tokens in expected]
    assert [document["targets"] for document in found] == [list(tokens[1:]) for tokens in expected]


def test_the_last_target_is_of_the_same_document_also_where_no_token_begins_the_next():
    source = dataclasses.replace(a_source([5, 3, 7]), bos=None)
    found = read(source, piece_length=4, batch_size=2)
    assert [document["targets"][-1] for document in found] == [104, 202, 306]
    assert [len(document["targets"]) for document in found] == [4, 2, 6]


def test_no_more_of_a_document_than_asked():
    found = read(a_source([30, 5, 12]), piece_length=4, batch_size=2, most_tokens=10)
    assert [len(document["inputs"]) for document in found] == [10, 4, 10]
    assert found[0]["targets"] == list(range(101, 111))


def test_documents_spread_over_the_split():
    found = read(a_source([5] * 10), piece_length=8, batch_size=3, most_documents=4)
    assert [document["targets"][0] // 100 - 1 for document in found] == [0, 2, 5, 7]


def test_short_documents_are_left_out():
    source = a_source([1, 7, 3, 2, 9])
    assert list(documents.bounds(source)) == [(1, 8), (8, 11), (11, 13), (13, 22)]
    assert list(documents.bounds(source, least_tokens=7)) == [(1, 8), (13, 22)]


def test_documents_of_a_source_that_does_not_know_them():
    unknown = dataclasses.replace(a_source([5, 5], known=False), bos=None)
    with pytest.raises(ConfigError, match="some/test: does not say where documents begin; expected"):
        list(documents.bounds(unknown))


def test_documents_are_found_across_the_blocks_in_which_they_are_looked_for(monkeypatch):
    monkeypatch.setattr(documents, "_SCANNED", 7)
    lengths = [5, 9, 2, 20, 3, 3]
    assert list(documents.bounds(a_source(lengths, known=False))) == list(documents.bounds(a_source(lengths)))
    ends = np.cumsum(lengths)
    assert [stop for _, stop in documents.bounds(a_source(lengths))] == ends.tolist()
