"""Run ``ttt inspect``: losses, weights and learning rates of the inner loop of trained models."""

import argparse
from typing import TYPE_CHECKING

from ttt_jax import finite
from ttt_jax.cli.options import SPLITS, check_folder
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir_lock import WorkdirLock
from ttt_jax.terminal.console import StatusLine, counts, positive
from ttt_jax.terminal.stopping import DONE
from ttt_jax.training import run_config

if TYPE_CHECKING:
    from ttt_jax.evaluation.trained import Trained

DESCRIPTION = """\
The inner loop of a trained model, layer by layer: the self-supervised loss at W0, before and after each step, the
distance of W from W0, and the learning rates, by position. Writes DIR/inspect/SPLIT-T.npz, .csv and .json and prints a
line for each layer. The context may be longer than that of training; memory does not grow with it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt inspect``."""
    add = parser.add_argument
    add("--workdir", required=True, nargs="+", metavar="DIR", help="workdirs of runs")
    add("--context", type=counts, default=[2048], metavar="T,...", help="tokens: 2048 (the default), or 2k,8k,32k")
    add("--split", default="validation", choices=SPLITS, help="(default: validation)")
    add("--max-windows", type=positive, default=64, metavar="N", help="read at most N windows (default: 64)")
    add("--by-document", action="store_true", help="read the beginnings of documents with more than T tokens")
    add("--step", default="newest", metavar="STEP", help="which checkpoint: newest (the default), best, all or 100,200")
    add("--batch-size", type=positive, metavar="B", help="windows at a time (default: as many tokens as in training)")


def run(options: argparse.Namespace) -> int:
    """Run ``ttt inspect``."""
    workdirs = [workdir_lib.at(workdir) for workdir in options.workdir]
    from ttt_jax.distributed import startup
    from ttt_jax.evaluation import inner_loop, trained

    startup.use_compilation_cache()
    startup.keep_freed_memory()
    for workdir in workdirs:
        inner_loop.check(workdir, run_config.load(workdir).model)
        if workdir_lib.is_local(workdir):
            check_folder(workdir / "inspect", f"--workdir {workdir}")
    for workdir in workdirs:
        for model in trained.loaded(workdir, options.step):
            for context in options.context:
                _inspect(model, context, None if options.step == "newest" else model.step, options)
    return DONE


def _inspect(model: "Trained", context: int, named_step: int | None, options: argparse.Namespace) -> None:
    from ttt_jax.evaluation import inner_loop, inspections
    from ttt_jax.terminal import console

    stem = inspections.name(options.split, context, by_document=options.by_document, step=named_step)
    name = f"{model.name} {stem}"
    line = StatusLine(1000, text=name)
    with WorkdirLock(model.workdir / "inspect", "ttt inspect", name=f".{stem}.running") as lock:
        try:
            found = inner_loop.inspect(
                model,
                context=context,
                split=options.split,
                most_windows=options.max_windows,
                by_document=options.by_document,
                batch_size=options.batch_size,
                progress=lambda done, of: line.show(1000 * done // of, f"{name}: {done:,} of {of:,} tokens"),
            )
        finally:
            line.close()
        lock.check()
        path = inspections.save(found, model.workdir, stem)
    about = found.about
    data = f"{about['source']}, {about['windows']} {about['of']} of {about['context']} tokens"
    print(f"{about['workdir']}: {about['model']}, step {about['step']}, {data}")
    console.output().print(_table(found.blocks, inspections.summary(found), per_matrix=found.eta.ndim == 4))
    if bad := inspections.not_finite(found):
        print(f"the loss of the inner loop is NaN or infinite at {bad:,} of {found.loss_before.size:,} positions")
    print(f"  {path} (and .csv, .json)", flush=True)


def _table(blocks, layers, per_matrix=False):
    from rich import box
    from rich.table import Table

    rates_of = "heads and weight matrices" if per_matrix else "heads"
    caption = f"Losses: last quarter of the positions. eta: mean, lowest and highest of {rates_of}."
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_style="")
    table.caption_justify = "left"
    columns = {"layer": [str(block) for block in blocks]}
    for name, key in (("at W0", "loss_at_w0"), ("before", "loss_before"), ("after", "loss_after")):
        columns[name] = [finite.format_number(getattr(x, key), ".4g") for x in layers]
    if any(x.explained is not None for x in layers):
        columns["explained"] = [finite.format_number(x.explained, ".1%") for x in layers]
    if any(x.weight_change is not None for x in layers):
        columns["|W-W0|/|W0|"] = [
            "W0 = 0" if x.weight_change is None else finite.format_number(x.weight_change, ".3f") for x in layers
        ]
    for name, key in (("eta", "eta"), ("min", "eta_min"), ("max", "eta_max")):
        columns[name] = [finite.format_number(getattr(x, key), ".1e") for x in layers]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table
