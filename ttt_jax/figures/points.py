"""Find the evaluated runs that figures compare, a point each, from what the runs have written about themselves."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from ttt_jax import config as config_lib
from ttt_jax import finite
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import catalogue, evaluations, result_files
from ttt_jax.figures import style
from ttt_jax.figures.style import Style
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir, explained
from ttt_jax.sweep import files
from ttt_jax.terminal.console import first_few
from ttt_jax.training import run_config


class Point(NamedTuple):
    """An evaluation of a run.

    Attributes:
      workdir: of the run.
      about: the ``.json`` of the evaluation, with the config of the run.
      stem: the name of the files of the evaluation.
    """

    workdir: Workdir
    about: dict[str, Any]
    stem: str

    @property
    def config(self) -> dict[str, Any]:
        """Return the config of the run."""
        return self.about["config"]

    @property
    def size(self) -> tuple[int, int]:
        """Return the number of blocks and the width, which are equal for models of one size with different mixers."""
        return self.config["model"]["num_layers"], self.config["model"]["width"]


def runs(places: Iterable[str]) -> list[Workdir]:
    """Return the runs in some places, each a workdir, a sweep, or a folder that contains either.

    Raises:
      ConfigError: for a place without runs.
    """
    found: dict[str, Workdir] = {}
    for place in places:
        runs_of_place = _runs_of(workdir_lib.at(place))
        if not runs_of_place:
            raise ConfigError(f"{place}: holds no run; expected a workdir of ttt train, or of ttt sweep")
        found.update((str(run), run) for run in runs_of_place)
    return list(found.values())


def of_places(places: Sequence[str], split: str, contexts: Sequence[int] | None = None, **which: Any) -> list[Point]:
    """Return the evaluation of each run on windows, at its training context.

    Args:
      contexts: leave out runs that were trained at other contexts.
      which: arguments of :func:`evaluations.read`, ``source`` and ``windows``, that choose evaluations.

    Raises:
      ConfigError: if a run was not evaluated, or no run was trained at one of the contexts.
    """
    points = files.on_each(lambda workdir: _of_run(workdir, split, which), runs(places))
    if contexts is None:
        return points
    known = sorted({point.about["training_context"] for point in points})
    for context in contexts:
        if context not in known:
            raise ConfigError(f"--context {context}: no run was trained at it; expected {' or '.join(map(str, known))}")
    return [point for point in points if point.about["training_context"] in contexts]


def model_label(about: dict[str, Any]) -> str:
    """Return the name of a model in figures: its mixer and backbone, and whether it was fine-tuned."""
    started = about.get("config", {}).get("training", {}).get("start_from")
    return about["model"] + (style.FINETUNED if started else "")


def styles(points: Iterable[Point]) -> dict[str, Style]:
    """Return a style for each line of a figure, by its name."""
    names = list(dict.fromkeys(model_label(point.about) for point in points))
    return dict(zip(names, style.distinct(names), strict=True))


def loss_of(point: Point) -> float:
    """Return the loss of an evaluation; NaN if it was not finite, for which JSON holds null."""
    loss = point.about["loss"]
    return math.nan if loss is None else loss


def perplexity_of(point: Point) -> float:
    """Return the perplexity of an evaluation, NaN or infinite if its loss is, and infinite if it overflows."""
    return finite.exp(loss_of(point))


def note_not_finite(axes: Axes, points: Sequence[Point]) -> None:
    """Name the runs without a finite perplexity, which cannot be drawn, in the panel."""
    of_all = workdir_lib.names([point.workdir for point in points])
    names = [name for name, point in zip(of_all, points, strict=True) if not math.isfinite(perplexity_of(point))]
    if names:
        text = f"{finite.NOT_FINITE}: {first_few(names, 3)}"
        axes.text(0.02, 0.02, style.literal(text), transform=axes.transAxes, ha="left", va="bottom", **style.NOTE)


def grouped(points: Iterable[Point], key: Callable[[Point], Any]) -> dict[Any, list[Point]]:
    """Return points by a key, with keys in the order of their first points."""
    groups: dict[Any, list[Point]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups


def joined(points: Sequence[Point], x: Callable[[Point], float]) -> list[tuple[float, float]]:
    """Return the line through points as pairs of x and perplexity.

    Runs that differ only in the seed become one pair, with the exponential of their mean loss. It is NaN, and leaves a
    gap, if one of the losses is not finite.

    Raises:
      ConfigError: if runs with the same x differ in more than the seed.
    """
    line = []
    for place, members in sorted(grouped(points, x).items()):
        first, *others = members
        for other in others:
            keys = differing(first.config, other.config)
            if keys:
                raise ConfigError(
                    f"{first.workdir}, {other.workdir}: would be one point of a line, and differ in {', '.join(keys)}; "
                    "expected one of them, or runs that differ in the seed"
                )
        line.append((place, finite.exp(finite.mean(loss_of(each) for each in members))))
    return line


def differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two runs differ, with both values, without seeds and keys that do not change results."""
    found = config_lib.differing_keys(a, b)
    return {key: values for key, values in found.items() if key != "seed" and config_lib.changes_results(key)}


def size_name(points: Sequence[Point]) -> str:
    """Return the numbers of parameters of models of one size: 125 M, or 125 M to 137 M."""
    counts = [point.about["parameters"] for point in points]
    low, high = style.millions(min(counts)), style.millions(max(counts))
    return high if low == high else f"{low} to {high}"


def data_name(points: Sequence[Point]) -> str:
    """Return the data that points were evaluated on, for titles."""
    return style.literal(", ".join(dict.fromkeys(point.about["source"] for point in points)))


def check_same_text(points: Sequence[Point]) -> None:
    """Raise :class:`ConfigError` if points of one panel were evaluated on different text."""
    first = points[0]
    for point in points[1:]:
        if point.about["fingerprint"] != first.about["fingerprint"]:
            raise ConfigError(
                f"{point.workdir}: was evaluated on {point.about['source']} {point.about['fingerprint']}, and "
                f"{first.workdir} on {first.about['source']} {first.about['fingerprint']}; expected the same text"
            )


def _runs_of(directory: Workdir, depth: int = 2) -> list[Workdir]:
    with explained(directory):
        if (directory / run_config.NAME).exists() or (directory / "checkpoints").is_dir():
            return [directory]
        sweep = files.find_sweep(directory)
        if sweep is not None:
            below = [directory / point.name for point in sweep.points]
        elif depth and directory.is_dir():
            below = sorted((path for path in directory.iterdir() if path.is_dir()), key=str)
        else:
            below = []
    return [run for each in files.on_each(lambda path: _runs_of(path, depth - 1), below) for run in each]


def _of_run(workdir: Workdir, split: str, which: dict[str, Any]) -> Point:
    context = run_config.load(workdir).data.sequence_length
    entry = catalogue.require(workdir, "eval", split, context, **which)
    path = workdir / "eval" / f"{entry.stem}.json"
    about = entry.about or result_files.about(path)
    result_files.check(about, path, evaluations.NEEDED)
    return Point(workdir, about, entry.stem)
