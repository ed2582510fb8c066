"""Run ``ttt harness``: evaluate a trained model on tasks of EleutherAI's lm-evaluation-harness."""

import argparse
import hashlib
import importlib.util
import json
import logging
from pathlib import Path

from ttt_jax import finite
from ttt_jax.cli.options import check_file
from ttt_jax.errors import ConfigError
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir_lock import WorkdirLock
from ttt_jax.terminal.console import not_negative, positive
from ttt_jax.terminal.stopping import DONE

DESCRIPTION = """\
Runs tasks of EleutherAI's lm-evaluation-harness that ask for likelihoods, on a trained model with the tokenizer of its
data. Writes DIR/harness/TASK.json for each task and prints a table. Needs: pip install 'lm-eval>=0.4.13'

Options other than the defaults are part of the name of the file: TASK-at-500-first-100-5-shot-windows-2048.json.

Texts of any length are read whole, each token with everything before it; --max-length N reads windows, as the harness
does for other models.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt harness``."""
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="workdir of a run")
    add("--tasks", required=True, type=lambda text: text.split(","), metavar="A,B", help="tasks, groups or tags")
    add("--include-path", type=Path, metavar="DIR", help="folder with more tasks, as YAML files")
    add("--num-fewshot", type=not_negative, metavar="N", help="examples in the context (default: set by the task)")
    add("--limit", type=positive, metavar="N", help="only the first N documents of each task, for a trial")
    add("--step", default="newest", metavar="STEP", help="checkpoint: newest (the default), best or a number")
    add("--tokenizer", metavar="FILE", help="byte, .model or .json; needed where the data has none")
    add("--max-length", type=positive, metavar="N", help="read windows of N tokens (default: whole texts)")
    prefix = "token before each text (default: the one that begins, or else ends, documents of the training data)"
    add("--prefix-token", type=not_negative, metavar="ID", help=prefix)
    add("--batch-size", type=positive, metavar="B", help="texts to read at a time, each of the training context")
    add("--output", type=Path, metavar="FILE", help="also write all results of the harness, with each answer, as JSON")


def run(options: argparse.Namespace) -> int:
    """Run ``ttt harness`` and return its exit status."""
    workdir = workdir_lib.at(options.workdir)
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed; pip install 'lm-eval>=0.4.13'")
    if options.output:
        check_file(options.output, "--output")
    from ttt_jax.distributed import startup
    from ttt_jax.interop import harness, harness_tasks
    from ttt_jax.storage.writing import write_output
    from ttt_jax.terminal import console

    startup.use_compilation_cache()
    startup.keep_freed_memory()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    reading = {name: getattr(options, name) for name in ("tokenizer", "max_length", "prefix_token")}
    model = harness.TTTModel(str(workdir), options.step, batch_size=options.batch_size, **reading)
    asked = {"num_fewshot": options.num_fewshot, "limit": options.limit}
    named_by = {**reading, **asked, "step": None if options.step == "newest" else model.trained.step}
    named_by["tokenizer"] = model.tokenizer_of_run.sha256 if options.tokenizer else None
    same = hashlib.blake2b(repr((options.tasks, named_by)).encode(), digest_size=8).hexdigest()
    with WorkdirLock(workdir / "harness", "ttt harness", name=f".{same}.running") as lock:
        results = harness_tasks.evaluate(
            model, options.tasks, include_path=options.include_path, log_samples=options.output is not None, **asked
        )
        by_task = harness_tasks.by_task(results, model)
        lock.check()
        for task, about in by_task.items():
            print(harness_tasks.save(workdir / "harness", harness_tasks.file_name(task, **named_by), about))
    if options.output:
        content, missing = finite.for_json(results)
        write_output(options.output, json.dumps(content, indent=2, default=str, allow_nan=False) + "\n")
        print(f"{options.output}" + f" ({missing} numbers that are not finite are null in it)" * bool(missing))
    console.output().print(_table(by_task))
    return DONE


def _table(by_task):
    """Return a table of metrics, from :func:`ttt_jax.interop.harness_tasks.by_task`."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for column in ("value", "error", "shots", "documents"):
        table.add_column(column, justify="right")
    for task, about in by_task.items():
        documents = (about["documents"] or {}).get("effective", "")
        for name, metric in about["metrics"].items():
            known = (metric.get("not_finite", metric["value"]), metric["standard_error"])
            value, error = (f"{x:.4f}" if isinstance(x, float) else "" if x is None else str(x) for x in known)
            table.add_row(task, name, value, error, str(about["num_fewshot"]), str(documents))
    return table
