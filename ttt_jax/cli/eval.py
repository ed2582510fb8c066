"""Run ``ttt eval`` and ``ttt eval compare``: loss and perplexity of trained models by token index, and differences."""

import argparse
import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ttt_jax import finite
from ttt_jax.cli.options import (
    SPLITS,
    add_evaluation_kind,
    add_processes,
    add_which_evaluation,
    check_file,
    evaluation_kind,
)
from ttt_jax.errors import ConfigError
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage import writing
from ttt_jax.terminal.console import StatusLine, count, counts, duration, not_negative, positive
from ttt_jax.terminal.stopping import DONE
from ttt_jax.training import run_config

if TYPE_CHECKING:
    from ttt_jax.evaluation.evaluations import Evaluation

DESCRIPTION = """\
Loss and perplexity of trained models on a split, and loss by token index. For each run and context, writes
DIR/eval/SPLIT-T.npz, .csv and .json (described in docs/evaluation.md). Errors are over documents. The context may be
longer than that of training: it is read in pieces, the state carried from one to the next, so that TTT reads a book of
any length in the same memory. A command that was stopped resumes where it was.

By default, reads windows of T tokens, regardless of documents, as in training. With --by-document, reads documents,
each from its beginning and a fresh state, to its end or to T tokens. With --carry-state, reads the same documents, but
each starts from the state that its predecessor left.

ttt eval compare shows how much runs differ, on the same tokens: ttt eval compare --help
"""
_CHAINS = 8
COMPARE = """\
The loss of runs minus the loss of the first run, on the same tokens, by token index, after ttt eval has been run on
each. The error is the error of the difference, over documents, which is much smaller than the error of either loss.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt eval``."""
    add = parser.add_argument
    add("--workdir", required=True, nargs="+", metavar="DIR", help="workdirs of runs")
    add("--context", type=counts, default=[2048], metavar="T,...", help="tokens: 2048 (the default), or 2k,8k,32k")
    add("--split", default="validation", choices=SPLITS, help="(default: validation)")
    add_evaluation_kind(parser)
    add("--max-windows", type=positive, default=256, metavar="N", help="windows or documents at most (default: 256)")
    add("--chains", type=positive, metavar="N", help=f"with --carry-state: chains of documents (default: {_CHAINS})")
    add("--step", default="newest", metavar="STEP", help="which checkpoint: newest (the default), best, all or 100,200")
    add("--batch-size", type=positive, metavar="B", help="sequences at a time (default: as many tokens as in training)")
    add("--piece-length", type=positive, metavar="N", help="tokens at a time (default: the context of training)")
    add("--csv", type=Path, metavar="FILE", help="also write all evaluations in one table, by bins of positions")
    several = parser.add_argument_group("several devices")
    for axis, what in (("fsdp", "parameters"), ("tensor", "heads")):
        several.add_argument(
            f"--{axis}", type=positive, default=1, metavar="N", help=f"split {what} over N (default: 1)"
        )
    add_processes(parser)


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt eval compare``."""
    add = parser.add_argument
    add("workdir", nargs="+", metavar="DIR", help="workdirs of evaluated runs; compares the others with the first")
    add("--context", type=count, metavar="T", help="(default: the longest that all have)")
    add("--split", default="validation", choices=SPLITS, help="(default: validation)")
    add_evaluation_kind(parser)
    add_which_evaluation(parser)
    add("--step", type=not_negative, help="evaluations of this step, made with --step")


def run(options: argparse.Namespace) -> int:
    """Run ``ttt eval``."""
    workdirs = [workdir_lib.at(workdir) for workdir in options.workdir]
    for workdir in workdirs:  # raises for a wrong workdir before any run is evaluated
        run_config.load(workdir)
    if options.chains and not options.carry_state:
        raise ConfigError(f"--chains {options.chains}: expected --carry-state with it")
    if options.csv:
        check_file(options.csv, "--csv")
    from ttt_jax.distributed import startup

    startup.use_compilation_cache()
    startup.keep_freed_memory()
    startup.start(options.coordinator, options.processes, options.process, limit=options.start_limit)
    import jax

    from ttt_jax.distributed import agreement
    from ttt_jax.evaluation import evaluate, evaluations, trained

    first_process = jax.process_index() == 0
    found, of_runs = [], []
    for workdir in workdirs:
        trained.steps(workdir, options.step)
    for workdir in workdirs:
        for model in trained.loaded(workdir, options.step, fsdp=options.fsdp, tensor=options.tensor):
            named_step = None if options.step == "newest" else model.step
            for context in options.context:
                selection = evaluate.Selection(
                    context,
                    options.split,
                    options.max_windows,
                    options.by_document,
                    (options.chains or _CHAINS) if options.carry_state else 0,
                    options.source,
                )
                stem = selection.stem(named_step)
                progress = _Progress(f"{workdir.name} {stem}", first_process)
                with agreement.locked(workdir / "eval", "ttt eval", name=f".{stem}.running") as lock:
                    try:
                        evaluation = evaluate.evaluate(
                            model,
                            selection,
                            batch_size=options.batch_size,
                            piece_length=options.piece_length,
                            stem=stem,
                            progress=progress,
                            check=lock.check_here,
                        )
                    finally:
                        progress.close()
                    lock.check()
                    path = None if evaluation is None else evaluations.save(evaluation, workdir / "eval", stem)
                if evaluation is not None and path is not None:
                    beside = f"; {stem} is of other data or windows" if path.name != f"{stem}.npz" else ""
                    print(f"{_words(evaluation)}\n  {path} (and .csv, .json{beside})", flush=True)
                    found.append(evaluation)
                    of_runs.append(workdir)
    if options.csv and first_process:
        _write_table(options.csv, evaluations.with_distinct_names(of_runs, found))
        print(options.csv)
    return DONE


def compare(options: argparse.Namespace) -> int:
    """Run ``ttt eval compare``."""
    from rich.table import Table

    from ttt_jax.evaluation import evaluations, statistics
    from ttt_jax.terminal import console

    if len(options.workdir) < 2:
        raise ConfigError(f"{options.workdir[0]}: alone; expected two workdirs or more")
    chosen = {**evaluation_kind(options), "step": options.step}
    base, *others = evaluations.read_all(options.workdir, options.split, options.context, **chosen)
    differences = [evaluations.paired_difference(other, base) for other in others]
    about = base.about
    print(f"Loss minus that of {about['workdir']} ({about['model']}), nats per token, +- standard error")
    print(f"{about['source']}, {evaluations.read_of(about)}; errors over {about['documents']:,} documents")
    table = Table()
    table.add_column("positions")
    table.add_column(f"{about['workdir']}", justify="right")
    for other in others:
        table.add_column(other.about["workdir"], justify="right")
    table.add_row(
        "all",
        finite.format_number(about["loss"], ".4f"),
        *(_with_error(d.mean, d.standard_error) for d in differences),
        end_section=True,
    )
    for first, last in statistics.octaves(base.bin_last):
        row = [f"{base.bin_first[first]:,} - {base.bin_last[last - 1]:,}"]
        where = slice(first, last)
        counts = base.document_counts[:, where].sum(1)
        if not counts.any():
            table.add_row(*row, *["-"] * len(options.workdir))
            continue
        row.append(finite.format_number(base.document_sums[:, where].sum() / counts.sum(), ".4f"))
        for other in others:
            with np.errstate(invalid="ignore"):  # infinity - infinity
                sums = (other.document_sums - base.document_sums)[:, where].sum(1)
            found = statistics.estimate(sums, counts)
            row.append(_with_error(float(found.mean), float(found.standard_error)))
        table.add_row(*row)
    console.output().print(table)
    for each in (base, *others):
        if problem := evaluations.not_finite(each.about):
            print(f"{each.about['workdir']}: {problem}")
    return DONE


def _with_error(difference: float, error: float) -> str:
    if not np.isfinite(difference):
        return finite.NOT_FINITE
    return f"{difference:+.4f}" + (f" +- {error:.4f}" if np.isfinite(error) else "")


class _Progress:
    """A line that shows how much of an evaluation is done, from the second call on."""

    def __init__(self, name: str, shown: bool):
        self._name, self._shown, self._began, self._start = name, shown, time.monotonic(), 0
        self._line: StatusLine | None = None

    def __call__(self, done: int, total: int) -> None:
        if not self._shown:
            return
        if self._line is None:
            self._line, self._start = StatusLine(total, done, self._name), done
            return
        rate = (done - self._start) / max(time.monotonic() - self._began, 1e-9)
        left = duration((total - done) / rate)
        self._line.show(done, f"{self._name}  {done:,}/{total:,} tokens  {rate:,.0f} tokens/s  {left} left")

    def close(self) -> None:
        if self._line is not None:
            self._line.close()


def _words(evaluation: "Evaluation") -> str:
    from ttt_jax.evaluation import evaluations

    a = evaluation.about
    of = f"{a['model']}, step {a['step']}, {a['source']}, {evaluations.read_of(a)}"
    skipped = (
        f"; {a['skipped']:,} {a.get('of', 'windows')} with nothing to predict left out" if a.get("skipped") else ""
    )
    if problem := evaluations.not_finite(a):
        return f"{of}: loss {finite.NOT_FINITE}: {problem}{skipped}"
    error = "" if a["loss_standard_error"] is None else f" +- {a['loss_standard_error']:.4f}"
    perplexity = "too large for a number" if a["perplexity"] is None else f"{a['perplexity']:.4f}"
    return f"{of}: loss {a['loss']:.4f}{error}, perplexity {perplexity}{skipped}"


def _write_table(path: Path, found: Sequence["Evaluation"]) -> None:
    """Write a line for each evaluation and bin."""
    of = ("workdir", "model", "parameters", "step", "source", "split", "of", "carried", "context")
    by_bin = ("first", "last", "loss", "standard_error", "low", "high", "count")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([*of, *(f"bin_{name}" for name in by_bin)])
    for evaluation in found:
        about = [evaluation.about[name] for name in of]
        columns = [getattr(evaluation, f"bin_{name}") for name in by_bin]
        writer.writerows([*about, *row] for row in zip(*columns, strict=True))
    writing.write_output(path, text.getvalue())
