"""``ttt plot``: pictures of evaluations."""

import argparse
from pathlib import Path

from ttt_jax import workdir as workdir_lib
from ttt_jax.cli_types import SPLITS, positive
from ttt_jax.exit_status import DONE

DESCRIPTION = """\
Draws the loss by token index of several runs on one figure, after ttt eval has been run on each with the same split
and context: a smoothed curve over the raw points, on a log axis.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ttt plot``."""
    add = parser.add_argument
    add("kind", choices=["loss-by-position"], metavar="loss-by-position")
    add("workdir", nargs="+", help="workdirs of evaluated runs")
    output = Path("loss-by-position.png")
    add("--output", type=Path, default=output, metavar="FILE", help=f".png, .pdf, .svg (default: {output})")
    add("--split", default="validation", choices=SPLITS, help="(default: validation)")
    add("--context", type=positive, metavar="T", help="of the evaluations (default: the longest)")
    add("--by-document", action="store_true", help="the evaluations that were made with this option")


def run(options: argparse.Namespace) -> int:
    """``ttt plot loss-by-position``"""
    from ttt_jax.evaluation import plot as plot_lib

    plot_lib.loss_by_position(
        [workdir_lib.at(workdir) for workdir in options.workdir],
        options.output,
        split=options.split,
        context=options.context,
        by_document=options.by_document,
    )
    print(options.output)
    return DONE
