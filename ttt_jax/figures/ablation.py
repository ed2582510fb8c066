"""Write a table of runs that differ by one step each, an ablation, as text, LaTeX and CSV (Table 1)."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from ttt_jax import finite
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import evaluations
from ttt_jax.figures import points as points_lib
from ttt_jax.figures import published as published_lib
from ttt_jax.figures.points import Point
from ttt_jax.settings import flat
from ttt_jax.sweep.points import short_key, value_text
from ttt_jax.terminal import console as console_lib

SUFFIXES = (".tex", ".csv", ".txt")
_LATEX = {character: f"\\{character}" for character in "_%&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # after \\ it would begin an option
    "]": "{]}",
}
_EQUIVALENCE = "TTT equivalence"
_WORDS = {  # names of steps in the paper's Table 1, by key and value
    ("model.ttt.learned_w0", True): "learnable W0",
    ("model.ttt.output", "residual_norm"): "LN and residual in f",
    ("model.ttt.learned_eta", True): "learnable eta",
    ("model.ttt.backbone", "mamba"): "Mamba backbone",
    ("model.mixer", "ttt_linear"): _EQUIVALENCE,
}
_WITH_BIAS = {"model.ttt.output": "residual_norm", "model.ttt.bias": True}  # one step, explained in configs/ablation.py


class Row(NamedTuple):
    """A run.

    Attributes:
      name: the model, in the first row; the changes to the row above, in the others.
      perplexity: NaN or infinite if the loss is, and infinite if it overflows.
      difference: to the perplexity of the row above; None in the first row.
      standard_error: of the difference, over the documents that both were evaluated on; None if the evaluations cannot
        be paired.
      loss_difference, loss_standard_error: the same in nats per token.
      published: the perplexity that the paper states about such a model; None if it states none.
    """

    name: str
    perplexity: float
    difference: float | None
    standard_error: float | None
    loss_difference: float | None
    loss_standard_error: float | None
    published: float | None


def rows(places: Sequence[str], *, split: str = "validation", published: bool = False, **which: Any) -> list[Row]:
    """Return the rows of a table, a run each, in the order of ``places`` and within a sweep in its order.

    Args:
      places: workdirs, sweeps, or folders of them.
      published: add the perplexities that the paper states.
      which: arguments of :func:`points.of_places` that choose evaluations.

    Raises:
      ConfigError: if runs were not evaluated or are not of one text and context, or if the paper states nothing about
        them.
    """
    points = points_lib.of_places(places, split, **which)
    points_lib.check_same_text(points)
    contexts = {point.about["training_context"] for point in points}
    if len(contexts) > 1:
        raise ConfigError(f"runs of contexts {', '.join(map(str, sorted(contexts)))}; expected one")
    stated = [published_lib.of(flat(point.config)) if published else None for point in points]
    if published and not any(stated):
        raise ConfigError(
            "--published: the paper states the perplexities of the models of its Table 1, and none of these"
        )
    found = []
    for above, point, known in zip([None, *points[:-1]], points, stated, strict=True):
        perplexity = points_lib.perplexity_of(point)
        difference = None if above is None else perplexity - points_lib.perplexity_of(above)
        paired = (None, None) if above is None else _paired(above, point)
        error = None if above is None or paired[1] is None else _error_of_perplexity(above, point, paired[1])
        name = points_lib.model_label(point.about) if above is None else _step(above, point)
        found.append(Row(name, perplexity, difference, error, *paired, known.perplexity if known else None))
    return found


def as_text(found: Sequence[Row], suffix: str) -> str:
    """Return the content of a file with this suffix, one of :data:`SUFFIXES`."""
    if suffix == ".txt":
        console = console_lib.literal(width=100, file=io.StringIO(), record=True)
        console.print(as_table(found))
        return console.export_text()
    return as_latex(found) if suffix == ".tex" else as_csv(found)


def as_table(found: Sequence[Row]) -> Table:
    """Return a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("configuration", overflow="fold")
    for name in ("perplexity", "difference", *(["paper"] if _has_published(found) else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        published = [] if not _has_published(found) else [_number(row.published, ".2f")]
        table.add_row(row.name, finite.format_number(row.perplexity, ".3f"), _with_error(row, "±"), *published)
    return table


def as_latex(found: Sequence[Row]) -> str:
    """Return a LaTeX ``tabular`` with the rules of booktabs."""
    published = _has_published(found)
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{lr@{{\\hspace{{1.5em}}}}r{'r' if published else ''}}}",
        "\\toprule",
        f"Configuration & Ppl. & Diff.{' & Paper' if published else ''} \\\\",
        "\\midrule",
    ]
    for row in found:
        difference = "--" if row.difference is None else _with_error(row, "\\pm")
        if finite.is_finite(row.difference):
            difference = f"${difference}$"
        cells = [
            _escaped(row.name),
            finite.format_number(row.perplexity, ".3f"),
            difference,
            *([_number(row.published, ".2f")] * published),
        ]
        lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def as_csv(found: Sequence[Row]) -> str:
    """Return CSV with a header; unknown values are empty, values that are not finite ``nan`` or ``inf``."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Row._fields)
    writer.writerows([f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in found)
    return text.getvalue()


def _paired(above: Point, point: Point) -> tuple[float | None, float | None]:
    """Return the difference in loss to the row above and its standard error, None if they are not of the same text."""
    a, b = (evaluations.read_file(each.workdir / "eval" / f"{each.stem}.npz") for each in (point, above))
    try:
        difference = evaluations.paired_difference(a, b)
    except ConfigError:
        return points_lib.loss_of(point) - points_lib.loss_of(above), None
    return difference.mean, difference.standard_error if math.isfinite(difference.standard_error) else None


def _error_of_perplexity(above: Point, point: Point, of_loss: float) -> float | None:
    """Return the standard error of exp(x) - exp(y) to first order, None if it is not known.

    It follows from the standard errors of x, y and x - y, which determine the covariance.
    """
    (p, u), (q, v) = ((points_lib.perplexity_of(each), each.about["loss_standard_error"]) for each in (point, above))
    if u is None or v is None or not (math.isfinite(p) and math.isfinite(q)):
        return None
    u, v = u**2, v**2
    return math.sqrt(max(0.0, (p - q) * (p * u - q * v) + p * q * of_loss**2))


def _step(above: Point, point: Point) -> str:
    """Return what a run changes in the run above it, with the names of the paper for its steps."""
    before, after = flat(above.config), flat(point.config)
    changes = []
    differing = points_lib.differing(above.config, point.config)
    if all(after.get(key) == value and key in differing for key, value in _WITH_BIAS.items()):
        del differing["model.ttt.bias"]
    if "model.ttt.learner" in differing:
        differing.pop("model.ttt.learner_source", None)  # the hash of its file, which adds nothing to the name
    for key in differing:
        value = after.get(key)
        if key == "model.ttt.mini_batch" and value < before.get(key, 0) == before["data.sequence_length"]:
            changes.append(f"mini-batch TTT, b = {value}")
        else:
            changes.append(
                _WORDS.get((key, value), f"{short_key(key)}={'unset' if value is None else value_text(value)}")
            )
    if not changes:
        seed = after.get("seed")
        return f"seed={seed}" if seed != before.get("seed") else "the same again"
    return _EQUIVALENCE if changes == [_EQUIVALENCE] else f"+ {', '.join(changes)}"  # a reformulation, without a "+"


def _with_error(row: Row, sign: str) -> str:
    if row.difference is None:
        return "-"
    if not math.isfinite(row.difference):
        return finite.NOT_FINITE
    error = "" if row.standard_error is None else f" {sign} {row.standard_error:.3f}"
    return f"{row.difference:+.3f}{error}"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _has_published(found: Sequence[Row]) -> bool:
    return any(row.published is not None for row in found)


def _escaped(text: str) -> str:
    text = "".join(_LATEX.get(character, character) for character in text)
    return text.replace("learnable W0", "learnable $W_0$").replace("learnable eta", r"learnable $\eta$")
