"""Perplexity against training FLOPs, a line per kind of model through its sizes (Figures 2 left, 10, 11 and 15)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.evaluation import published as published_lib
from ttt_jax.figures import points as points_lib
from ttt_jax.figures import style
from ttt_jax.figures.points import Point
from ttt_jax.settings import flat
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir
from ttt_jax.training import run_config


def perplexity_by_flops(
    places: Sequence[str],
    outputs: Sequence[Path],
    *,
    split: str = "validation",
    contexts: Sequence[int] | None = None,
    published: bool = False,
    **which: Any,
) -> None:
    """Draw a panel for each training context, and saves the picture.

    Training FLOPs are those that the model needs, by its config (:mod:`ttt_jax.models.flops`), to the step that was
    evaluated; of a fine-tuned one, with those of the run that it started from. Points are joined, as in the paper,
    which found no line that would fit them.

    Args:
      places: workdirs, sweeps, or folders of them.
      outputs: paths that end in .png, .pdf or .svg.
      contexts: only these; None is all.
      published: with the perplexities that the paper states.

    Raises:
      ConfigError: for runs that were not evaluated, are not of one text, or that the paper states nothing about.
    """
    style.check_output(*outputs)
    points = points_lib.of_places(places, split, contexts, **which)
    by_context = dict(sorted(points_lib.grouped(points, lambda p: p.about["training_context"]).items()))
    if published and not any(_stated(members) for members in by_context.values()):
        raise ConfigError(
            f"--published: the paper states perplexities of the models of its Table 1 at {published_lib.CONTEXT} "
            "tokens, and of none of these runs"
        )
    styles = points_lib.styles(points)
    figure, panels = style.panels(len(by_context))
    for axes, (context, members) in zip(panels, by_context.items(), strict=True):
        points_lib.check_same_text(members)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for name, line in points_lib.grouped(members, lambda p: points_lib.line_of(p.about)).items():
            pairs = points_lib.joined(line, _training_flops)
            axes.plot(*zip(*pairs, strict=True), label=name, **styles[name].of_points)
        points_lib.note_not_finite(axes, members)
        if published:
            _draw_stated(axes, members)
        axes.set_title(f"{points_lib.data_name(members)}, {style.tokens(context)} tokens", fontsize=11)
        axes.set_xlabel("training FLOPs (log scale)")
        axes.set_ylabel("perplexity (log scale)")
        style.log_ticks(axes.xaxis)
        style.log_ticks(axes.yaxis)
        axes.grid(alpha=0.25)
    style.legend_below(figure)
    style.save(figure, *outputs)


def _training_flops(point: Point) -> float:
    started = point.config["training"].get("start_from")
    return point.about["training_flops"] + (_flops_of_run(started, point.workdir) if started else 0.0)


def _flops_of_run(location: str, asked_by: Workdir) -> float:
    """Of all steps of a run, or to the checkpoint that ``location`` is, and of what it started from itself."""
    from ttt_jax.models import flops

    place = workdir_lib.at(location)
    of_checkpoint = place.parent.name == "checkpoints"
    workdir = place.parent.parent if of_checkpoint else place
    try:
        config = run_config.load(workdir)
    except ConfigError as error:
        raise ConfigError(
            f"{asked_by}: started from {location}, whose training counts too, and cannot be read: {error}"
        ) from error
    steps = int(place.name) if of_checkpoint else config_lib.steps(config, "training.duration")
    before = config.training.start_from
    return steps * flops.per_step(config.model, config.data.sequence_length, config.data.batch_size) + (
        _flops_of_run(before, workdir) if before else 0.0
    )


def _stated(members: Sequence[Point]) -> list[tuple[str, published_lib.Stated]]:
    """Names of lines that the paper states a perplexity of, at this context."""
    if members[0].about["training_context"] != published_lib.CONTEXT:
        return []
    found = {points_lib.line_of(p.about): published_lib.of(flat(p.config)) for p in members}
    return [(name, stated) for name, stated in found.items() if stated is not None]


def _draw_stated(axes: Axes, members: Sequence[Point]) -> None:
    """Hollow points, at the training FLOPs of the paper's recipe by the count that is used here."""
    for name, stated in _stated(members):
        label = f"paper: {name}, {published_lib.WHERE}"
        axes.plot(published_lib.training_flops(stated), stated.perplexity, label=label, **style.of(name).hollow)
