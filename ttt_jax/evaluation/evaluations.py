"""Hold, save, read and compare evaluations: ``WORKDIR/eval/NAME.json``, ``.npz`` and ``.csv``.

NAME is, for example, ``validation-2048``; see :mod:`ttt_jax.evaluation.catalogue`.

``.json``  model, checkpoint and data of the evaluation, means over all tokens, and the config of the run
``.npz``   by position: position, loss, standard_error, count [T]; by bin: bin_first, bin_last (positions, from 1),
           bin_loss, bin_standard_error, bin_low, bin_high, bin_count [K]; document_sums, document_counts [documents, K]
``.csv``   a line for each position

Comparisons are paired. Documents that are hard for one model are hard for the other, so the error of the difference of
their losses on each document is far smaller than the error of either loss.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import finite
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import catalogue, result_files, statistics
from ttt_jax.evaluation.catalogue import name as name
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir, explained

NEEDED = (  # keys of the .json that comparisons and figures read
    *("workdir", "model", "parameters", "step", "source", "fingerprint", "split", "of", "context", "windows"),
    *("training_context", "training_flops", "documents", "tokens", "loss", "loss_standard_error", "config"),
)
_BY_POSITION = ("position", "loss", "standard_error", "count")
_SAME_TOKENS = ("fingerprint", "split", "of", "context", "windows", "tokens")  # keys that pairs must share


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss by token index of one checkpoint, nats per token.

    Attributes:
      about: the content of the ``.json``.
      position, loss, standard_error, count: [T], from position 1. ``count`` is the number of tokens. A mean loss is NaN
        where ``count`` is 0, and NaN or infinite where one of its tokens has such a loss.
      bin_first, bin_last: [K], the first and the last position of each bin.
      bin_loss, bin_standard_error, bin_low, bin_high, bin_count: [K]; ``low`` and ``high`` bound 95 %.
      document_sums, document_counts: [documents, K], loss and number of tokens of each document in each bin.
    """

    about: dict[str, Any]
    position: np.ndarray
    loss: np.ndarray
    standard_error: np.ndarray
    count: np.ndarray
    bin_first: np.ndarray
    bin_last: np.ndarray
    bin_loss: np.ndarray
    bin_standard_error: np.ndarray
    bin_low: np.ndarray
    bin_high: np.ndarray
    bin_count: np.ndarray
    document_sums: np.ndarray
    document_counts: np.ndarray


def from_summary(about: dict[str, Any], found: statistics.Summary) -> Evaluation:
    """Return an evaluation with these statistics."""
    positions = len(found.loss)
    edges = statistics.bin_edges(positions)
    return Evaluation(
        about,
        position=np.arange(1, positions + 1),
        loss=found.loss,
        standard_error=found.standard_error,
        count=found.tokens,
        bin_first=edges[:-1],
        bin_last=edges[1:] - 1,
        bin_loss=found.bins.mean,
        bin_standard_error=found.bins.standard_error,
        bin_low=found.bins.low,
        bin_high=found.bins.high,
        bin_count=found.bins.tokens,
        document_sums=found.document_sums,
        document_counts=found.document_counts,
    )


def save(evaluation: Evaluation, folder: Workdir, stem: str) -> Workdir:
    """Write the three files, the ``.json`` last; return the path of the ``.npz``.

    If ``stem`` is already the name of an evaluation of other tokens, keep both (:func:`catalogue.place`).
    """
    stem = catalogue.place(folder, stem, evaluation.about)
    rows = zip(*(getattr(evaluation, key) for key in _BY_POSITION), strict=True)
    return result_files.write(folder, stem, evaluation, evaluation.about, _BY_POSITION, rows)


def read(workdir: str | os.PathLike, split: str, context: int | None = None, **kind: Any) -> Evaluation:
    """Return the evaluation of a run on a split, of the longest context if none is given.

    Args:
      kind: the other arguments of :func:`catalogue.entries`.

    Raises:
      ConfigError: if no evaluation matches, or more than one.
    """
    workdir = workdir_lib.at(workdir)
    return read_file(workdir / "eval" / f"{catalogue.require(workdir, 'eval', split, context, **kind).stem}.npz")


def read_all(
    workdirs: Sequence[str | os.PathLike], split: str, context: int | None = None, **kind: Any
) -> list[Evaluation]:
    """Read evaluations of several runs at one context: the longest that all of them have, if none is given."""
    if context is None:
        folders = [workdir_lib.at(workdir) / "eval" for workdir in workdirs]
        known = [{entry.context for entry in catalogue.entries(folder, split, **kind)} for folder in folders]
        context = max(set.intersection(*known) or set.union(*known), default=None)
    evaluations = []
    for workdir in map(workdir_lib.at, workdirs):
        path = workdir / "eval" / f"{catalogue.require(workdir, 'eval', split, context, **kind).stem}.npz"
        evaluations.append(read_file(path))
        result_files.check(evaluations[-1].about, path.with_suffix(".json"), NEEDED)
    return with_distinct_names(workdirs, evaluations)


def with_distinct_names(workdirs: Sequence[str | os.PathLike], found: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the evaluations, with longer parts of the paths as names of runs where names are the same."""
    of_run = [each.about["workdir"] for each in found]
    longer = workdir_lib.names([workdir_lib.at(workdir) for workdir in workdirs])
    return [
        dataclasses.replace(each, about={**each.about, "workdir": name}) if of_run.count(name_of) > 1 else each
        for each, name_of, name in zip(found, of_run, longer, strict=True)
    ]


def read_of(about: dict[str, Any]) -> str:
    """Return what was read in words: 256 windows of 2,048 tokens."""
    of = about.get("of", "windows")
    carried = ", the state carried" * about.get("carried", False)
    return f"{about['windows']:,} {of} of {'up to ' * (of == 'documents')}{about['context']:,} tokens{carried}"


def not_finite(about: dict[str, Any]) -> str:
    """Return in words how many losses are NaN or infinite; empty if none is."""
    if about.get("not_finite"):
        return f"{about['not_finite']:,} of {about['tokens']:,} tokens have a loss that is NaN or infinite"
    return "" if finite.is_finite(about["loss"]) else "the loss is NaN or infinite"


def read_file(path: Workdir) -> Evaluation:
    """Return the evaluation in an ``.npz`` file and the ``.json`` beside it.

    Raises:
      ConfigError: if it is damaged, or of another version of this package.
    """
    return result_files.read(path, Evaluation, "ttt eval")


def listed(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the ``about`` of all evaluations of a run, in the order of their names."""
    folder = workdir_lib.at(workdir) / "eval"
    with explained(folder):
        stems = catalogue.stems(folder)
    return [result_files.about(folder / f"{stem}.json") for stem in stems]


class Difference(NamedTuple):
    """The loss of one model minus the loss of another, nats per token; negative if the first is better.

    A difference is NaN where no token counts, and NaN or infinite where a loss of one of the models is.

    Attributes:
      mean, standard_error, low, high: over all tokens; ``low`` and ``high`` bound 95 %.
      bins: the same by bin, [K].
    """

    mean: float
    standard_error: float
    low: float
    high: float
    bins: statistics.Estimate


def paired_difference(a: Evaluation, b: Evaluation) -> Difference:
    """Return the loss of ``a`` minus the loss of ``b``, with its error over documents.

    Raises:
      ConfigError: if they are not of the same tokens.
    """
    check_paired(a, b)
    with np.errstate(invalid="ignore"):  # infinity - infinity
        sums, counts = a.document_sums - b.document_sums, a.document_counts
    mean, error, low, high, _ = map(float, statistics.estimate(sums.sum(1), counts.sum(1)))
    return Difference(mean, error, low, high, statistics.estimate(sums, counts))


def check_paired(a: Evaluation, b: Evaluation) -> None:
    """Raise :class:`ConfigError` if two evaluations are not of the same tokens."""
    for key in _SAME_TOKENS:
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
