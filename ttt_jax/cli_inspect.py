"""``ttt inspect``: what the inner loop of trained models does."""

import argparse

from ttt_jax import workdir as workdir_lib
from ttt_jax.cli_types import SPLITS, positive
from ttt_jax.exit_status import DONE

DESCRIPTION = """\
What the inner loop of a trained model does, layer by layer: the self-supervised loss at W0, before and after each step,
how far W goes from W0, and the learning rates, by position. Writes DIR/inspect/SPLIT-T.npz, .csv and .json and prints a
line for each layer. The context may be longer than that of training; memory does not grow with it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ttt inspect``."""
    add = parser.add_argument
    add("--workdir", required=True, nargs="+", metavar="DIR", help="of one run or several")
    add("--context", type=positive, default=2048, metavar="T", help="tokens per window (default: 2048)")
    add("--split", default="validation", choices=SPLITS, help="(default: validation)")
    add("--max-windows", type=positive, default=64, metavar="N", help="at most so many (default: 64)")
    add("--by-document", action="store_true", help="the beginnings of documents that have more than T tokens")
    add("--step", type=int, help="which checkpoint (default: the newest)")
    add("--batch-size", type=positive, metavar="B", help="windows at a time (default: as in training)")


def run(options: argparse.Namespace) -> int:
    """``ttt inspect``"""
    workdirs = [workdir_lib.at(workdir) for workdir in options.workdir]
    from ttt_jax.parallel import startup

    startup.use_compilation_cache()
    for workdir in workdirs:
        _inspect(workdir, options)
    return DONE


def _inspect(workdir: workdir_lib.Workdir, options: argparse.Namespace) -> None:
    from rich.console import Console

    from ttt_jax.evaluation import inner_loop, inner_loop_files
    from ttt_jax.evaluation.trained import load
    from ttt_jax.status_line import StatusLine

    line = StatusLine(1000, text=str(workdir))
    try:
        found = inner_loop.inspect(
            load(workdir, options.step),
            context=options.context,
            split=options.split,
            most_windows=options.max_windows,
            by_document=options.by_document,
            batch_size=options.batch_size,
            progress=lambda done, of: line.show(1000 * done // of, f"{workdir}: {done:,} of {of:,} tokens"),
        )
    finally:
        line.close()
    stem = inner_loop_files.name(options.split, options.context, by_document=options.by_document, step=options.step)
    path = inner_loop_files.save(found, workdir, stem)
    about = found.about
    print(
        f"{about['model']}, step {about['step']}, {about['source']}, {about['windows']} {about['of']} of "
        f"{about['context']} tokens"
    )
    Console().print(_table(inner_loop.summary(found)))
    print(f"  {path} (and .csv, .json)")


def _table(layers):
    from rich import box
    from rich.table import Table

    caption = "Losses: last quarter of the positions. eta: mean over heads, and the lowest and highest head."
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left", caption_style="")
    for column in ("layer", "at W0", "before", "after", "explained", "|W-W0|/|W0|", "eta", "min", "max"):
        table.add_column(column, justify="right", no_wrap=True)
    for i, x in enumerate(layers):
        losses = (f"{loss:.4g}" for loss in (x.loss_at_w0, x.loss_before, x.loss_after))
        etas = (f"{eta:.1e}" for eta in (x.eta, x.eta_min, x.eta_max))
        table.add_row(str(i), *losses, f"{x.explained:.1%}", f"{x.weight_change:.3f}", *etas)
    return table
