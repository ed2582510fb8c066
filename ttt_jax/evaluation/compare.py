"""The difference between two models, on the same tokens.

Documents that are hard for one model are hard for the other, so the error of the difference of their losses on each
document is far smaller than that of either loss.
"""

from typing import NamedTuple

import numpy as np

from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import statistics
from ttt_jax.evaluation.evaluations import Evaluation

_SAME = ("fingerprint", "split", "of", "context", "windows", "tokens")


class Difference(NamedTuple):
    """Loss of a model minus that of another, nats per token; negative where it is the better one.

    A difference is NaN where nothing counts, and NaN or infinite where a loss of one of the models is.

    Attributes:
      mean, standard_error, low, high: over all tokens; ``low`` and ``high`` bound 95 %.
      bin_first, bin_last: [K], positions from 1.
      bin_loss, bin_standard_error, bin_low, bin_high: [K].
    """

    mean: float
    standard_error: float
    low: float
    high: float
    bin_first: np.ndarray
    bin_last: np.ndarray
    bin_loss: np.ndarray
    bin_standard_error: np.ndarray
    bin_low: np.ndarray
    bin_high: np.ndarray


def paired_difference(a: Evaluation, b: Evaluation) -> Difference:
    """The loss of ``a`` minus that of ``b``, with its error over documents.

    Raises:
      ConfigError: where they are not of the same tokens.
    """
    check_paired(a, b)
    with np.errstate(invalid="ignore"):  # infinity - infinity
        sums, counts = a.document_sums - b.document_sums, a.document_counts
    whole, bins = statistics.estimate(sums.sum(1), counts.sum(1)), statistics.estimate(sums, counts)
    mean, error, low, high, _ = map(float, whole)
    return Difference(mean, error, low, high, a.bin_first, a.bin_last, *bins[:4])


def check_paired(a: Evaluation, b: Evaluation) -> None:
    """Raises :class:`ConfigError` where two evaluations are not of the same tokens."""
    for key in _SAME:
        if a.about[key] != b.about[key]:
            raise ConfigError(
                f"{a.about['workdir']}: its evaluation has {key} {a.about[key]}, that of {b.about['workdir']} "
                f"{b.about[key]}; expected the same data, context and windows (see ttt eval --help)"
            )
    if not np.array_equal(a.document_counts, b.document_counts):
        raise ConfigError(
            f"{a.about['workdir']}: its evaluation counts other tokens than that of {b.about['workdir']}; "
            "expected both to be of one version of ttt_jax"
        )
