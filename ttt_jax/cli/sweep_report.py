"""Run ``ttt sweep status`` and ``ttt sweep results``: where the points of a sweep stand, and how they compare."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from ttt_jax.errors import ConfigError
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage import writing
from ttt_jax.terminal.stopping import DONE

STATUS = """\
Shows where the points of a sweep stand, from its files alone: on any machine that sees them.
"""
RESULTS = """\
Ranks the points of a sweep by a metric, with those that are not finished at the end.

Metrics are the numbers in metrics.jsonl, such as loss, grad_norm or tokens_per_second: their mean over the last 5 % of
the steps, or for a speed the median over all steps. Evaluations by ttt eval are metrics too, such as validation-2048
(its loss) or validation-2048/perplexity.
"""


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt sweep status``."""
    parser.add_argument("workdir", metavar="DIR", help="the workdir of the sweep")
    parser.add_argument("--watch", action="store_true", help="update the table until all points have ended")
    parser.add_argument("--every", type=float, metavar="S", help="seconds between updates (default: 2; gs://: 30)")


def add_results_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt sweep results``."""
    add = parser.add_argument
    add("workdir", metavar="DIR", help="the workdir of the sweep")
    add("--metric", default="loss", metavar="NAME", help="name of a metric (default: loss)")
    best = "(default: the highest for speeds, else the lowest)"
    add("--best", choices=["lowest", "highest"], help=f"value of rank 1 {best}")
    add("--csv", type=Path, metavar="FILE", help="write all points to this file")
    add("--json", action="store_true", help="print JSON")
    add("--plot", type=Path, metavar="FILE", help="draw the metric against --x: .png, .pdf, .svg")
    add("--x", metavar="KEY", help="key of the x axis (default: the first swept key)")
    add("--lines", metavar="KEY", help="draw a line for each value of this key (default: of all other swept keys)")


def status(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run ``ttt sweep status`` and return its exit status."""
    from rich.live import Live

    from ttt_jax.sweep import files
    from ttt_jax.sweep import status as status_lib
    from ttt_jax.terminal import console

    directory = workdir_lib.at(options.workdir)
    screen = console.output()
    standings = status_lib.of_sweep(directory)
    if not options.watch:
        screen.print(status_lib.table(standings))
        return DONE
    every = options.every or (2.0 if workdir_lib.is_local(directory) else 30.0)
    with Live(status_lib.table(standings, active_first=True), console=screen, auto_refresh=False) as live:
        while any(each.state not in (files.DONE, files.FAILED, files.STOPPED_EARLY) for each in standings):
            time.sleep(every)
            standings = status_lib.of_sweep(directory)
            live.update(status_lib.table(standings, active_first=True), refresh=True)
    return DONE


def results(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run ``ttt sweep results`` and return its exit status."""
    from ttt_jax.sweep import results as results_lib
    from ttt_jax.terminal import console

    if options.plot is None and (options.x or options.lines):
        raise ConfigError("--x, --lines: are of a picture; expected --plot FILE too")
    highest = None if options.best is None else options.best == "highest"
    found = results_lib.of_sweep(workdir_lib.at(options.workdir), options.metric, highest=highest)
    if options.plot is not None:
        from ttt_jax.figures import sweep_metric

        x = options.x or next(iter(found.keys), None)
        if x is None:
            raise ConfigError("--plot: no key is swept; expected --x KEY")
        sweep_metric.against(found, options.metric, options.plot, x=x, lines=options.lines)
    if options.csv is not None:
        writing.write_output(options.csv, results_lib.as_csv(found, options.metric))
    if options.json:
        print(results_lib.as_json(found, options.metric))
        return DONE
    console.output().print(results_lib.table(found, options.metric))
    if not_finite := sum(each.is_not_finite for each in found.results):
        print(f"{not_finite} of {len(found.results)} points: {options.metric} is NaN or infinite; they have no rank")
    for path in (options.csv, options.plot):
        if path is not None:
            print(path)
    return DONE
