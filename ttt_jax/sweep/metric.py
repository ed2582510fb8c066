"""Compute the number by which points are compared, from what a run has written.

Any number in ``metrics.jsonl`` is a metric: its mean over the last 5 % of the steps so far, as the loss of a single
batch is noisy; a speed is the median over all steps. ``SPLIT-T`` and ``SPLIT-T/NAME`` are numbers of an evaluation, in
``eval/SPLIT-T.json`` as ``ttt eval`` writes it; without ``NAME`` its loss.
"""

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from ttt_jax import finite
from ttt_jax.storage.workdir import Workdir, explained
from ttt_jax.sweep import files

_LAST = 0.05  # of the steps
_SPEEDS = ("tokens_per_second", "tokens_per_second_per_chip", "seconds_per_step", "model_flop_utilisation")
_HIGHER_IS_BETTER = ("tokens_per_second", "tokens_per_second_per_chip", "model_flop_utilisation", "goodput")
_NULL_IS_NOT_FINITE = ("loss", "perplexity")  # of evaluations; other numbers may not be known
_OF_TOKENS = ("fingerprint", "windows", "chains")  # all else stands in the name of the metric
_EVALUATION = re.compile(
    r"((?:[\w.]+-)?(?:train|validation|test)(?:-documents)?(?:-carried)?-\d+(?:-at-\d+)?(?:-[0-9a-f]{8})?)(?:/(\w+))?"
)


class Measured(NamedTuple):
    """A number of a run."""

    number: float | None  # None where the run has none; NaN where JSON holds null for a number that is not finite
    step: int  # of the run, or of the checkpoint that was evaluated
    tokens: Mapping[str, Any] = MappingProxyType({})  # what tells the tokens of an evaluation, as far as it is known


class Early(NamedTuple):
    """The rule to stop points early: asynchronous successive halving (ASHA, https://arxiv.org/abs/1810.05934).

    At each rung, ``grace * factor^k`` steps, a point continues if it is among the best ``1 / factor`` of those
    that have come there so far.
    """

    metric: str
    grace: int
    factor: float
    highest: bool

    def rungs(self, steps: int) -> list[float]:
        """Return the rungs of a run of so many steps."""
        rungs = (self.grace * self.factor**k for k in itertools.count())
        return list(itertools.takewhile(lambda rung: rung < steps, rungs))


def of_run(workdir: Workdir, metric: str) -> Measured:
    """Return the metric of a run."""
    evaluation = _EVALUATION.fullmatch(metric)
    if evaluation is None:
        return of_records(files.records(workdir), metric)
    about = files.json_object(workdir / "eval" / f"{evaluation[1]}.json") or {}
    step, name = about.get("step"), evaluation[2] or "loss"
    number = _number(about.get(name))
    if number is None and name in about and name in _NULL_IS_NOT_FINITE:
        number = math.nan
    tokens = {key: about[key] for key in _OF_TOKENS if key in about}
    return Measured(number, step if isinstance(step, int) else 0, tokens)


def of_records(records: Sequence[dict[str, Any]], metric: str) -> Measured:
    """Return the metric of a run with these records."""
    if not records:
        return Measured(None, 0)
    step, is_speed = records[-1]["step"], metric in _SPEEDS
    known = numbers((each for each in records if is_speed or each["step"] > step * (1 - _LAST)), metric)
    if not known:
        return Measured(None, step)
    if is_speed and all(map(math.isfinite, known)):
        return Measured(statistics.median(known), step)
    return Measured(finite.mean(known), step)  # NaN or infinite where one of them is


def numbers(records: Iterable[dict[str, Any]], name: str) -> list[float]:
    """Return the numbers of this name in the records that have one; NaN where JSON holds null for it."""
    found = [math.nan if record[name] is None else _number(record[name]) for record in records if name in record]
    return [number for number in found if number is not None]


def is_of_evaluation(metric: str) -> bool:
    """Return whether a metric is a number of ``ttt eval``, which may be of an earlier step than the last."""
    return _EVALUATION.fullmatch(metric) is not None


def higher_is_better(metric: str) -> bool:
    """Return whether more is better, as for speeds and goodput."""
    return metric in _HIGHER_IS_BETTER


def available(workdir: Workdir) -> list[str]:
    """Return the metrics that a run has."""
    newest = files.records(workdir, newest=True)
    recorded = {name for record in newest for name in record if numbers([record], name)}
    with explained(workdir):
        evaluated = {path.name.removesuffix(".json") for path in (workdir / "eval").glob("*.json")}
    return [*sorted(recorded - {"step"}), *sorted(evaluated)]


def at_step(records: Sequence[dict[str, Any]], metric: str, step: float) -> tuple[int, float | None] | None:
    """Return step and metric at the first record at or after a step; None before there is one.

    A value that is not finite is the worst: comparisons with NaN would call it good.
    """
    for count, record in enumerate(records, 1):
        if record["step"] >= step:
            number = of_records(records[:count], metric).number
            if number is not None and not math.isfinite(number):
                number = -math.inf if higher_is_better(metric) else math.inf
            return record["step"], number
    return None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
