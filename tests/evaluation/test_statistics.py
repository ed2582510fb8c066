"""Compare statistics of losses with plain loops and with resampled documents."""

import itertools
import math

import numpy as np
import pytest

from ttt_jax.evaluation import statistics
from ttt_jax.evaluation.statistics import Segment

RNG = np.random.default_rng(0)


def random_losses(n, tokens, density=0.6):
    """Return losses [N, T], with NaN where a token does not count."""
    nll = RNG.gamma(2.0, 1.0, (n, tokens)) + RNG.normal(0, 1, (n, 1))
    return np.where(RNG.random((n, tokens)) < density, nll, np.nan).astype(np.float32)


def of_rows(nll):
    """Summarise losses with a document in each row, and NaN where a token does not count."""
    return statistics.summarise([Segment(i, 0, row, np.isfinite(row)) for i, row in enumerate(nll)], nll.shape[1])


def by_loops(nll):
    """Return the mean, standard error and count of each position, where each document has at most one token."""
    rows = []
    for t in range(nll.shape[1]):
        values = [float(x) for x in nll[:, t] if math.isfinite(x)]
        n = len(values)
        mean = sum(values) / n if n else math.nan
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.nan
        rows.append((mean, error, n))
    return (np.array(column) for column in zip(*rows, strict=True))


def test_positions_match_loops():
    nll = random_losses(6, 9)
    nll[:, 2] = np.nan  # counts in no document
    nll[:, 5] = [np.nan, np.nan, 1, np.nan, np.nan, np.nan]  # in one
    nll[:, 7] = 1.5  # in all
    found = of_rows(nll)
    loss, error, count = by_loops(nll)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, error, rtol=1e-12)
    np.testing.assert_array_equal(found.tokens, count)
    assert (found.tokens[2], found.tokens[5], found.tokens[7]) == (0, 1, 6)
    assert np.isnan(found.standard_error).tolist() == [t in (2, 5) for t in range(9)]


def test_segments_of_one_document_are_one_sample():
    """Add the residuals of two windows of one document at each position, beside a window of another document."""
    nll = random_losses(3, 20, density=1).astype(np.float64)
    found = statistics.summarise([Segment(7, 0, nll[0]), Segment(9, 0, nll[1]), Segment(7, 0, nll[2])], 20)
    mean = nll.mean(0)
    residuals = np.stack([nll[0] + nll[2] - 2 * mean, nll[1] - mean])
    np.testing.assert_allclose(found.loss, mean, rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, np.sqrt(2 * (residuals**2).sum(0)) / 3, rtol=1e-10)
    assert found.document_sums.shape == (2, len(statistics.bin_edges(20)) - 1)
    np.testing.assert_allclose(found.document_sums.sum(1), [nll[0].sum() + nll[2].sum(), nll[1].sum()], rtol=1e-12)


def test_the_mean_is_over_tokens_not_over_documents_or_positions():
    nll = random_losses(5, 8)
    nll[0] = [100, *[np.nan] * 7]
    counted = nll[np.isfinite(nll)].astype(np.float64)
    found = of_rows(nll)
    assert found.all.mean == pytest.approx(sum(counted.tolist()) / len(counted), rel=1e-12)
    assert found.all.tokens == len(counted)


def test_bins_match_their_positions():
    nll = random_losses(7, 300)
    found = of_rows(nll)
    edges = statistics.bin_edges(300)
    assert len(found.bins.mean) == len(edges) - 1
    for k, (first, stop) in enumerate(itertools.pairwise(edges)):
        part = nll[:, first - 1 : stop - 1].astype(np.float64)
        if np.isfinite(part).any():
            assert found.bins.mean[k] == pytest.approx(np.nanmean(part), rel=1e-12)
        assert found.bins.tokens[k] == np.isfinite(part).sum()
        np.testing.assert_allclose(found.document_sums[:, k], np.nansum(part, 1), rtol=1e-12)
    assert found.bins.tokens.sum() == np.isfinite(nll).sum()


@pytest.mark.parametrize("positions", [1, 2, 3, 5, 16, 17, 100, 2048, 32768])
def test_bins_are_a_quarter_of_an_octave_for_every_context(positions):
    edges = statistics.bin_edges(positions)
    assert (edges[0], edges[-1]) == (1, positions + 1)
    assert (np.diff(edges) > 0).all()
    longer = statistics.bin_edges(4 * positions)
    assert edges[:-1].tolist() == longer[: len(edges) - 1].tolist()
    last = edges[1:] - 1
    whole = last[:-1][last[:-1] >= 32]
    np.testing.assert_allclose(whole[1:] / whole[:-1], 2**0.25, rtol=0.03)
    octaves = sorted({min(2**i, positions) for i in range(17)})
    assert set(octaves) <= set(last.tolist())
    assert [last[stop - 1] for _, stop in statistics.octaves(last)] == octaves


@pytest.mark.slow
def test_errors_match_the_spread_over_samples():
    """Compare the spread of the means of many samples with the errors that single samples estimate."""

    def draw(n):
        length = RNG.integers(1, 40, n)  # documents of very different lengths, and of levels that depend on it
        level = RNG.normal(3 + length / 40, 0.5)
        return RNG.normal(level * length, 0.3 * np.sqrt(length)), length

    samples = [statistics.estimate(*draw(80)) for _ in range(300)]
    spread = np.std([float(s.mean) for s in samples])
    assert np.mean([float(s.standard_error) for s in samples]) == pytest.approx(spread, rel=0.1)
    truth = np.divide(*(x.sum() for x in draw(400_000)))
    covered = np.mean([float(s.low) <= truth <= float(s.high) for s in samples])
    assert 0.90 <= covered <= 0.98
    assert np.mean([float(s.high - s.low) for s in samples]) == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_errors_over_documents_are_larger_than_over_tokens_where_documents_differ():
    level = RNG.normal(0, 1, (40, 1))
    nll = level + RNG.normal(0, 0.1, (40, 64))
    found = of_rows(nll)
    naive = nll.std() / math.sqrt(nll.size)
    assert found.all.standard_error == pytest.approx(level.std(ddof=1) / math.sqrt(40), rel=0.02)
    assert found.all.standard_error > 6 * naive


def test_one_document_has_no_error():
    found = of_rows(random_losses(1, 6, density=1))
    for x in (*found.all[1:4], *(y for errors in found.bins[1:4] for y in errors), *found.standard_error):
        assert math.isnan(x)
    assert math.isfinite(found.all.mean)


def test_results_are_deterministic_and_independent_of_order():
    nll = random_losses(9, 50)
    first, again = of_rows(nll), of_rows(nll[::-1])
    np.testing.assert_array_equal(first.bins.low, of_rows(nll).bins.low)
    np.testing.assert_allclose(first.bins.mean, again.bins.mean, rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_shows_in_every_mean_that_it_is_part_of(value):
    nll = random_losses(5, 40)
    counted = np.isfinite(nll)
    counted[2, 9] = True
    clean = np.where(counted, np.nan_to_num(nll), np.nan)
    nll[2, 9] = value

    def summary(losses):
        return statistics.summarise([Segment(i, 0, row, counted[i]) for i, row in enumerate(losses)], 40)

    found, expected = summary(nll), summary(clean)
    assert (found.not_finite, expected.not_finite) == (1, 0)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.document_counts, expected.document_counts)
    [k] = np.flatnonzero(statistics.bin_edges(40) <= 10)[-1:]  # the bin of position 10
    for mean, all_of_it, where in (
        (found.loss, expected.loss, 9),
        (found.bins.mean, expected.bins.mean, k),
        (found.document_sums[2], expected.document_sums[2], k),
    ):
        assert str(mean[where]) == str(np.float64(value))
        np.testing.assert_array_equal(np.delete(mean, where), np.delete(all_of_it, where))
    assert str(found.all.mean) == str(np.float64(value))
    assert np.isnan([*found.all[1:4], *(x[k] for x in found.bins[1:4]), found.standard_error[9]]).all()
    np.testing.assert_array_equal(np.delete(found.bins.low, k), np.delete(expected.bins.low, k))
    assert found.all.tokens == expected.all.tokens


def test_without_documents_means_are_nan():
    nothing = Segment(0, 0, np.zeros(6), np.zeros(6, bool))
    for segments in ([], [nothing]):
        found = statistics.summarise(segments, 6)
        assert (found.all.tokens, found.not_finite, found.document_sums.shape) == (0, 0, (0, 6))
        assert np.isnan([*found.all[:4], *found.loss, *found.bins.mean, *found.bins.high]).all()
    empty = statistics.summarise([], 0)
    assert (len(empty.loss), len(empty.bins.mean), int(empty.all.tokens)) == (0, 0, 0)
