"""Two runs on the same text: their difference in loss, paired by document."""

from typing import NamedTuple

import numpy as np

from ttt_jax.config import ConfigError
from ttt_jax.evaluation.evaluations import Evaluation


class Difference(NamedTuple):
    """Of losses, in nats per token: that of the first less that of the second."""

    mean: float
    standard_error: float
    bin_loss: np.ndarray
    bin_low: np.ndarray
    bin_high: np.ndarray


def paired_difference(a: Evaluation, b: Evaluation) -> Difference:
    """The mean difference, and by bin."""
    if a.document_sums is None or b.document_sums is None or a.document_sums.shape != b.document_sums.shape:
        raise ConfigError("expected evaluations of the same text")
    counts = a.document_counts
    difference = a.document_sums - b.document_sums

    def ratio(sums, counts):
        mean = sums.sum(0) / counts.sum(0)
        error = np.sqrt(((sums - mean * counts) ** 2).sum(0) * len(sums) / (len(sums) - 1)) / counts.sum(0)
        return mean, error

    mean, error = ratio(difference.sum(1), counts.sum(1))
    with np.errstate(invalid="ignore"):
        bins, errors = ratio(difference, counts)
    return Difference(float(mean), float(error), bins, bins - 1.96 * errors, bins + 1.96 * errors)
