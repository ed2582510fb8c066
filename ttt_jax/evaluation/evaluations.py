"""Evaluations as files: ``WORKDIR/eval/NAME.json``, ``.npz`` and ``.csv``.

NAME is ``[SOURCE-]SPLIT[-documents][-carried]-T[-at-STEP]``, such as ``validation-2048``.

``.json``  what was evaluated, the means of all tokens, and the config of the run
``.npz``   by position: position, loss, standard_error, count [T]; by bin: bin_first, bin_last (positions, from 1),
           bin_loss, bin_standard_error, bin_low, bin_high, bin_count [K]; document_sums, document_counts [documents, K]
``.csv``   a line for each position
"""

import csv
import dataclasses
import io
import json
import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from ttt_jax import finite
from ttt_jax import workdir as workdir_lib
from ttt_jax.config import ConfigError
from ttt_jax.evaluation import saved, statistics
from ttt_jax.training.metrics import write_atomically
from ttt_jax.workdir import Workdir, explained, is_local

_BY_POSITION = ("position", "loss", "standard_error", "count")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Loss by token index of one checkpoint, nats per token.

    Attributes:
      about: what it is of, as JSON holds it.
      position, loss, standard_error, count: [T], from position 1. A loss is NaN where ``count``, the number of tokens,
        is 0, and NaN or infinite where one of them has such a loss.
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
    """An evaluation with these statistics."""
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


def name(
    split: str,
    context: int,
    *,
    by_document: bool = False,
    carried: bool = False,
    source: str | None = None,
    step: int | None = None,
) -> str:
    """NAME of an evaluation.

    Args:
      source: where the data is another than that of the run.
      step: where the checkpoint was asked for by its step, rather than as the newest.
    """
    prefix = "" if source is None else re.sub(r"[^\w.]+", "_", source.rstrip("/").rpartition("/")[2]) + "-"
    kind = "-documents" * by_document + "-carried" * carried
    return f"{prefix}{split}{kind}-{context}" + ("" if step is None else f"-at-{step}")


def save(evaluation: Evaluation, folder: Workdir, stem: str) -> Workdir:
    """Writes the three files, each as a whole; returns the path of the ``.npz``. The ``.json`` is written last."""
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    arrays = {field.name: getattr(evaluation, field.name) for field in dataclasses.fields(evaluation)[1:]}
    table, content = io.StringIO(newline=""), io.BytesIO()
    writer = csv.writer(table)
    writer.writerow(_BY_POSITION)
    writer.writerows(zip(*(arrays[key] for key in _BY_POSITION), strict=True))
    np.savez_compressed(content, allow_pickle=False, **arrays)
    with explained(folder):
        (folder / f"{stem}.csv").write_bytes(table.getvalue().encode())
        (folder / f"{stem}.npz").write_bytes(content.getvalue())
        about = finite.for_json(evaluation.about)[0]
        write_atomically(folder / f"{stem}.json", json.dumps(about, indent=2, allow_nan=False) + "\n")
    return folder / f"{stem}.npz"


def read(workdir: str | os.PathLike, split: str, context: int | None = None, **kind: Any) -> Evaluation:
    """The evaluation of a run on a split; of the longest context that was evaluated, where none is given.

    Args:
      kind: the other arguments of :func:`name`.

    Raises:
      ConfigError: where there is none.
    """
    workdir = workdir_lib.at(workdir)
    if context is None:
        context = max(_contexts(workdir, split, **kind), default=None)
    stem = None if context is None else name(split, context, **kind)
    if stem is None or stem not in _stems(workdir):
        workdir_lib.check_exists(workdir)
        length = "" if context is None else f" with context {context}"
        raise ConfigError(
            f"{workdir}: no evaluation of the {split} split{length}; run: "
            f"ttt eval --workdir {shlex.quote(str(workdir))} --split {split} --context {context or 2048}"
            f"{_options(**kind)}"
        )
    return read_file(workdir / "eval" / f"{stem}.npz")


def read_all(
    workdirs: Sequence[str | os.PathLike], split: str, context: int | None = None, **kind: Any
) -> list[Evaluation]:
    """As :func:`read`, of several runs at one context; at the longest that all have, where none is given."""
    if context is None:
        known = [_contexts(workdir_lib.at(workdir), split, **kind) for workdir in workdirs]
        context = max(set.intersection(*known) or set.union(*known), default=None)
    return [read(workdir, split, context, **kind) for workdir in workdirs]


def read_of(about: dict[str, Any]) -> str:
    """What was read, in words: 256 windows of 2,048 tokens."""
    of = about.get("of", "windows")
    carried = ", the state carried" * about.get("carried", False)
    return f"{about['windows']:,} {of} of {'up to ' * (of == 'documents')}{about['context']:,} tokens{carried}"


def not_finite(about: dict[str, Any]) -> str:
    """Return in words how many losses are NaN or infinite; empty where none is."""
    if about.get("not_finite"):
        return f"{about['not_finite']:,} of {about['tokens']:,} tokens have a loss that is NaN or infinite"
    return "" if finite.known(about["loss"]) else "the loss is NaN or infinite"


def read_file(path: Workdir) -> Evaluation:
    """The evaluation in an ``.npz`` file and the ``.json`` beside it.

    Raises:
      ConfigError: where it is damaged, or of an older version of this package.
    """
    return saved.read(path, Evaluation, "ttt eval")


def listed(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """What each of a run's evaluations is of, by name."""
    workdir = workdir_lib.at(workdir)
    with explained(workdir):
        return [json.loads((workdir / "eval" / f"{stem}.json").read_text()) for stem in sorted(_stems(workdir))]


def _contexts(workdir: Workdir, split: str, **kind: Any) -> set[int]:
    pattern = re.compile(re.escape(name(split, 0, **kind)).replace("-0", r"-(\d+)", 1))
    return {int(match[1]) for stem in _stems(workdir) if (match := pattern.fullmatch(stem))}


def _stems(workdir: Workdir) -> set[str]:
    with explained(workdir):
        return {path.name.removesuffix(".json") for path in (workdir / "eval").glob("*.json")}


def _options(by_document=False, carried=False, source=None, step=None) -> str:
    chosen = " --carry-state" * carried or " --by-document" * by_document
    return chosen + (f" --source {shlex.quote(source)}" if source else "") + ("" if step is None else f" --step {step}")
