"""``ttt harness``: tasks of EleutherAI's lm-evaluation-harness."""

import argparse
import json
import logging
import re
from pathlib import Path

from ttt_jax import workdir as workdir_lib
from ttt_jax.cli_types import not_negative, positive
from ttt_jax.config import ConfigError
from ttt_jax.exit_status import DONE

DESCRIPTION = """\
Tasks of EleutherAI's lm-evaluation-harness that ask for likelihoods, by a trained model with the tokenizer of its data.
Writes DIR/harness/TASK.json of each task and prints the harness's table. Needs: pip install 'ttt_jax[harness]'

Texts of any length are read whole, each token with all that comes before it; --max-length gives the harness's windows.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``ttt harness``."""
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="of a run")
    add("--tasks", required=True, type=lambda text: text.split(","), metavar="A,B", help="tasks, groups or tags")
    add("--include-path", type=Path, metavar="DIR", help="more tasks, as YAML files")
    add("--num-fewshot", type=not_negative, metavar="N", help="examples in the context (default: as the task says)")
    add("--limit", type=positive, metavar="N", help="only the first N documents of each task, to try it")
    add("--step", default="newest", metavar="STEP", help="which checkpoint: newest (the default), best or a number")
    add("--tokenizer", metavar="FILE", help="byte, .model or .json, where the data does not hold its own")
    add("--max-length", type=positive, metavar="N", help="read windows of so many tokens (default: whole texts)")
    add("--batch-size", type=positive, metavar="B", help="texts of the training context at a time")
    add("--output", type=Path, metavar="FILE", help="also all that the harness tells, with each answer, as JSON")


def run(options: argparse.Namespace) -> int:
    """``ttt harness``"""
    workdir = workdir_lib.at(options.workdir)
    if options.output and options.output.is_dir():
        raise ConfigError(f"--output {options.output}: is a folder; expected a file")
    from rich.console import Console

    from ttt_jax.interop import harness
    from ttt_jax.parallel import startup
    from ttt_jax.training.metrics import write_atomically

    startup.use_compilation_cache()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = harness.TTTModel(
        str(workdir),
        options.step,
        tokenizer=options.tokenizer,
        max_length=options.max_length,
        batch_size=options.batch_size,
    )
    results = harness.evaluate(
        model,
        options.tasks,
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        log_samples=options.output is not None,
    )
    folder = workdir / "harness"
    if workdir_lib.is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    found = harness.by_task(results, model)
    for task, about in found.items():
        stem = re.sub(r"[^\w.-]+", "_", task)
        stem += "" if options.step == "newest" else f"-at-{model.trained.step}"
        stem += "" if options.limit is None else f"-first-{options.limit}"
        write_atomically(folder / f"{stem}.json", json.dumps(about, indent=2, default=str) + "\n")
        print(folder / f"{stem}.json")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output, json.dumps(results, indent=2, default=str) + "\n")
        print(options.output)
    Console().print(_table(found))
    return DONE


def _table(found):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for column in ("value", "error", "shots", "documents"):
        table.add_column(column, justify="right")
    for task, about in found.items():
        documents = (about["documents"] or {}).get("effective", "")
        for name, metric in about["metrics"].items():
            value, error = (f"{x:.4f}" if isinstance(x, float) else str(x or "") for x in metric.values())
            table.add_row(task, name, value, error, str(about["num_fewshot"]), str(documents))
    return table
