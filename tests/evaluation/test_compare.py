"""Paired differences: on the same documents, what is common to both models cancels."""

import dataclasses

import numpy as np
import pytest

from ttt_jax.config import ConfigError
from ttt_jax.evaluation import compare, evaluations, statistics
from ttt_jax.evaluation.statistics import Segment

ABOUT = {"workdir": "a", "fingerprint": "f", "split": "test", "of": "documents", "context": 64}
RNG = np.random.default_rng(1)
LEVEL = RNG.normal(3, 1, (30, 1))  # of a document: the same for every model
LENGTHS = np.append(64, RNG.integers(5, 65, 29))
DIFFERENCE = RNG.normal(-0.05, 0.02, (30, 64))


def evaluation(nll, **about):
    segments = [Segment(i, 0, row[:n]) for i, (row, n) in enumerate(zip(nll, LENGTHS, strict=True))]
    known = {**ABOUT, "windows": len(segments), "tokens": int(sum(LENGTHS))}
    return evaluations.from_summary({**known, **about}, statistics.summarise(segments, 64))


BASE = LEVEL + RNG.normal(0, 0.5, (30, 64))
A, B = evaluation(BASE + DIFFERENCE), evaluation(BASE, workdir="b")


def test_the_difference_and_its_error_are_those_of_the_differences_of_documents():
    found = compare.paired_difference(A, B)
    counted = np.arange(64) < LENGTHS[:, None]
    sums, counts = (DIFFERENCE * counted).sum(1), counted.sum(1)
    mean = sums.sum() / counts.sum()
    assert found.mean == pytest.approx(mean, rel=1e-9)
    error = np.sqrt(30 / 29 * ((sums - mean * counts) ** 2).sum()) / counts.sum()
    assert found.standard_error == pytest.approx(error, rel=1e-6)
    assert found.low < found.mean < found.high
    assert found.standard_error < 0.02 * float(statistics.estimate(A.document_sums.sum(1), counts).standard_error)
    for k, (first, last) in enumerate(zip(found.bin_first, found.bin_last, strict=True)):
        where = counted[:, first - 1 : last]
        expected = DIFFERENCE[:, first - 1 : last][where].mean()
        assert found.bin_loss[k] == pytest.approx(expected, abs=1e-9)
    assert compare.paired_difference(B, A).mean == pytest.approx(-mean, rel=1e-9)


def test_a_model_and_itself():
    found = compare.paired_difference(A, A)
    assert (found.mean, found.standard_error, found.low, found.high) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("key", "value"), [("fingerprint", "g"), ("split", "train"), ("of", "windows"), ("context", 65), ("windows", 31)]
)
def test_other_text(key, value):
    other = dataclasses.replace(B, about={**B.about, key: value})
    with pytest.raises(ConfigError) as caught:
        compare.paired_difference(A, other)
    assert str(caught.value).startswith(f"a: its evaluation has {key} {A.about[key]}, that of b {value}; expected the")


def test_other_tokens():
    counts = B.document_counts.copy()
    counts[[0, 1]] = counts[[1, 0]]
    with pytest.raises(ConfigError, match="a: its evaluation counts other tokens than that of b"):
        compare.paired_difference(A, dataclasses.replace(B, document_counts=counts))
