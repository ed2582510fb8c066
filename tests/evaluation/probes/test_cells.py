"""Wilson's interval, against SciPy's and against how often it holds."""

import numpy as np
import pytest
from scipy import stats

from ttt_jax.evaluation.probes.cells import wilson


@pytest.mark.parametrize(("correct", "samples"), [(0, 1), (0, 20), (20, 20), (7, 20), (1, 3), (500, 1000)])
def test_as_scipy_has_it(correct, samples):
    expected = stats.binomtest(correct, samples).proportion_ci(0.95, "wilson")
    assert wilson(correct, samples) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_it_holds_the_true_share_95_times_in_100():
    shares = np.random.default_rng(0).uniform(0.05, 0.95, 4000)
    found = [wilson(int(n), 25) for n in np.random.default_rng(1).binomial(25, shares)]
    held = np.mean([low <= share <= high for (low, high), share in zip(found, shares, strict=True)])
    assert held == pytest.approx(0.95, abs=0.01)
