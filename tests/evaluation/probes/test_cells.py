"""Check shares with their intervals, against SciPy and by how often they hold, and the tables of cells."""

import io

import numpy as np
import pytest
from scipy import stats

from ttt_jax.evaluation.probes import cells
from ttt_jax.evaluation.probes.cells import wilson
from ttt_jax.terminal import console


@pytest.mark.parametrize(("correct", "samples"), [(0, 1), (0, 20), (20, 20), (7, 20), (1, 3), (500, 1000)])
def test_the_interval_is_that_of_scipy(correct, samples):
    expected = stats.binomtest(correct, samples).proportion_ci(0.95, "wilson")
    assert wilson(correct, samples) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_interval_holds_the_true_share_95_times_in_100():
    shares = np.random.default_rng(0).uniform(0.05, 0.95, 4000)
    found = [wilson(int(n), 25) for n in np.random.default_rng(1).binomial(25, shares)]
    held = np.mean([low <= share <= high for (low, high), share in zip(found, shares, strict=True)])
    assert held == pytest.approx(0.95, abs=0.01)


def test_shares_that_are_not_known_are_not_finite_in_tables():
    shares = {(1, 8): (0.5, 0.25), (2, 8): (None, None), (1, 16): (0.25, None), (2, 16): (0.75, 0.5), (1, 32): (1, 1)}
    of = [
        {"items": items, "context": context, "accuracy": accuracy, "whole": whole}
        for (items, context), (accuracy, whole) in shares.items()
    ]
    output = console.literal(file=io.StringIO(), width=100)
    output.print(cells.table(of, "items", str, ("accuracy", "whole")))
    rows = [" ".join(line.split()) for line in output.file.getvalue().splitlines()]
    assert "1 0.50 (0.25) 0.25 (not finite) 1.00 (1.00)" in rows
    assert "2 not finite 0.75 (0.50) -" in rows
    assert "mean not finite 0.50 (not finite) 1.00 (1.00)" in rows
