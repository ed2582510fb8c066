"""Run ``ttt plot``: figures and tables from evaluations."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ttt_jax.cli.options import SPLITS, add_evaluation_kind, add_which_evaluation, evaluation_kind
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage import writing
from ttt_jax.terminal.console import count, counts, not_negative, positive
from ttt_jax.terminal.stopping import DONE

DESCRIPTION = """\
Draws figures and tables from the results of ttt eval and ttt inspect.

kinds:
  loss-by-position  loss by token index of several runs; paired differences
  flops             perplexity against training FLOPs, a line per kind of model
  context           perplexity against the context of training, a line per size
  mini-batch        perplexity and time of a step against the inner mini-batch
  inner-loss        the loss of the inner loop by token index, layer by layer
  table             an ablation: each run, and its difference to the one before

Help on each kind: ttt plot flops --help. A DIR is the workdir of a run, of a sweep, or a folder of those. Models and
settings of runs are read from their files, never from the names of folders.
"""
_MAX_WINDOWS = "the evaluation of N windows, if there are several"
_PUBLISHED = "add the perplexities that the text of the paper states (2407.04620)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the kinds of ``ttt plot``, and the options of each."""
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", help=argparse.SUPPRESS, prog=parser.prog)
    parser.usage = f"{parser.prog} [-h] KIND ..."

    def kind(name: str, draw: Callable[[argparse.Namespace], None], description: str):
        style = argparse.RawDescriptionHelpFormatter
        p = kinds.add_parser(name, description=description, formatter_class=style, allow_abbrev=False)
        default = [] if name == "table" else [Path(f"{name}.png")]
        p.set_defaults(draw=draw, default=default)
        accepted = ".tex, .csv or .txt" if name == "table" else f".png, .pdf or .svg (default: {default[0]})"
        several = f"{accepted}; may be given several times"
        p.add_argument("--output", type=Path, action="append", metavar="FILE", help=several)
        p.add_argument("--split", default="validation", choices=SPLITS, help="(default: validation)")
        return p

    p = kind("loss-by-position", _loss_by_position, _LOSS_BY_POSITION)
    p.add_argument("workdir", nargs="+", metavar="DIR", help="workdirs of evaluated runs")
    p.add_argument("--context", type=count, metavar="T", help="of the evaluations (default: the longest that all have)")
    add_evaluation_kind(p)
    add_which_evaluation(p)
    p.add_argument("--step", type=not_negative, help="evaluations of this step, made with --step")
    p.add_argument("--against", metavar="DIR", help="a run: also draw the paired difference of each other run to it")
    p.add_argument("--perplexity", action="store_true", help="the exponential of the mean loss, on a log axis")

    def which_evaluation(p: argparse.ArgumentParser) -> None:
        p.add_argument("--source", metavar="DIR", help="evaluations on a dataset other than that of training")
        p.add_argument("--max-windows", type=positive, metavar="N", help=_MAX_WINDOWS)

    contexts = {"type": counts, "metavar": "T,T", "help": "runs that were trained at these contexts (default: all)"}
    p = kind("flops", _flops, _FLOPS)
    p.add_argument("workdir", nargs="+", metavar="DIR", help="runs, sweeps, folders of them")
    which_evaluation(p)
    p.add_argument("--context", **contexts)
    p.add_argument("--published", action="store_true", help=_PUBLISHED)

    p = kind("context", _context, _CONTEXT)
    p.add_argument("workdir", nargs="+", metavar="DIR", help="runs, sweeps, folders of them")
    which_evaluation(p)
    p.add_argument("--context", **contexts)
    lines = "a line for each size, or for each kind of model (default: size)"
    p.add_argument("--lines", choices=["size", "model"], default="size", help=lines)

    p = kind("mini-batch", _mini_batch, _MINI_BATCH)
    p.add_argument("workdir", nargs="+", metavar="DIR", help="runs, sweeps, folders of them")
    which_evaluation(p)
    p.add_argument("--published", action="store_true", help=_PUBLISHED)

    p = kind("inner-loss", _inner_loss, _INNER_LOSS)
    p.add_argument("workdir", metavar="DIR", help="workdir of an inspected run")
    p.add_argument("--context", type=count, metavar="T", help="of the inspection (default: the longest)")
    p.add_argument("--max-windows", type=positive, metavar="N", help="the inspection of N windows, if several exist")
    p.add_argument("--layers", type=_layers, metavar="I,J", help="from 0: 0,1,2 or 0-2 (default: all)")
    p.add_argument("--window", type=positive, default=10, metavar="N", help="positions to average over (default: 10)")

    p = kind("table", _table, _TABLE)
    p.add_argument("workdir", nargs="+", metavar="DIR", help="runs, sweeps, folders of them, in the order of the rows")
    which_evaluation(p)
    p.add_argument("--published", action="store_true", help=_PUBLISHED)


def run(options: argparse.Namespace) -> int:
    """Run ``ttt plot``."""
    options.output = options.output or options.default
    options.draw(options)
    for path in options.output:
        print(path)
    return DONE


def _loss_by_position(options: argparse.Namespace) -> None:
    from ttt_jax.figures.by_position import loss_by_position

    loss_by_position(
        [workdir_lib.at(workdir) for workdir in options.workdir],
        options.output,
        split=options.split,
        context=options.context,
        against=options.against,
        perplexity=options.perplexity,
        step=options.step,
        **evaluation_kind(options),
    )


def _which(options: argparse.Namespace) -> dict[str, str | int | None]:
    return {"source": options.source, "windows": options.max_windows}


def _flops(options: argparse.Namespace) -> None:
    from ttt_jax.figures.perplexity import perplexity_by_flops

    chosen = {"split": options.split, "contexts": options.context, **_which(options)}
    perplexity_by_flops(options.workdir, options.output, published=options.published, **chosen)


def _context(options: argparse.Namespace) -> None:
    from ttt_jax.figures.perplexity import perplexity_by_context

    chosen = {"split": options.split, "contexts": options.context, **_which(options)}
    perplexity_by_context(options.workdir, options.output, lines=options.lines, **chosen)


def _mini_batch(options: argparse.Namespace) -> None:
    from ttt_jax.figures.perplexity import by_mini_batch

    chosen = {"split": options.split, **_which(options)}
    by_mini_batch(options.workdir, options.output, published=options.published, **chosen)


def _inner_loss(options: argparse.Namespace) -> None:
    from ttt_jax.figures.by_position import inner_loss

    chosen = {"split": options.split, "context": options.context, "layers": options.layers}
    inner_loss(options.workdir, options.output, window=options.window, windows=options.max_windows, **chosen)


def _table(options: argparse.Namespace) -> None:
    from ttt_jax.figures import ablation, style
    from ttt_jax.terminal import console

    style.check_output(*options.output, accepted=ablation.SUFFIXES)
    rows = ablation.rows(options.workdir, split=options.split, published=options.published, **_which(options))
    console.output().print(ablation.as_table(rows))
    for path in options.output:
        writing.write_output(path, ablation.as_text(rows, path.suffix))


def _layers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        chosen = range(not_negative(first), not_negative(last if dash else first) + 1)
        if not chosen:
            raise argparse.ArgumentTypeError(f"{part!r}: expected the lower number first")
        found += chosen
    return found


_LOSS_BY_POSITION = """\
Draws the loss by token index of several runs in one figure, after ttt eval has been run on each with the same split
and context: a smoothed curve over the raw points, on a log axis, with the 95 % interval of the mean in each bin.

--against adds the differences to one run on the same text. A difference has a smaller error than either loss, because
documents that are hard for one model are hard for the other.
"""
_FLOPS = """\
Draws the perplexity of runs, each at its training context, against the FLOPs of their training, both on log axes: a
panel for each context, a line for each kind of model through its sizes. Figures 10, 11, 15 of the paper.

FLOPs are computed from the config: matrix products, forward and backward, without recomputation. A run that started
from the parameters of another includes the FLOPs of both.
"""
_CONTEXT = """\
Draws the perplexity of runs against their training context, at which each was evaluated. Figure 16 of the paper is
--lines model.
"""
_MINI_BATCH = """\
Draws perplexity, and seconds per training step, against the mini-batch size of the inner loop: a sweep over
model.ttt.mini_batch. Figure 7 of the paper.
"""
_INNER_LOSS = """\
Draws the loss of the inner loop by token index, after ttt inspect has been run: at W0, at the weights before each
step, and at the weights after it; a panel for each layer. Figures 4 (--layers 0-2) and 14 of the paper.
"""
_TABLE = """\
Prints a table of runs: perplexity at the training context, the changes of each run to the run before it, and the paired
difference in perplexity with its standard error over documents. Table 1 of the paper.
"""
