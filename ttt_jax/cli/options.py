"""Share options between verbs, and check the files that options name before any work is done."""

import argparse
import os
from pathlib import Path
from typing import Any

from ttt_jax.errors import ConfigError
from ttt_jax.terminal.console import not_negative, positive

CONFIG_USAGE = "--config FILE[:ARG] [--config.KEY=VALUE ...]"
SPLITS = ("train", "validation", "test")


def add_evaluation_kind(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a kind of evaluation; :func:`evaluation_kind` reads them."""
    add = parser.add_argument
    add("--by-document", action="store_true", help="read whole documents, each from its beginning, instead of windows")
    add("--carry-state", action="store_true", help="read whole documents, and carry the state from one to the next")
    add("--source", metavar="DIR", help="evaluate on another dataset than that of training")


def add_which_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the options that tell evaluations of one kind apart; :func:`evaluation_kind` reads them."""
    add = parser.add_argument
    add("--max-windows", type=positive, metavar="N", help="the evaluation of N windows, if there are several")
    add("--chains", type=positive, metavar="N", help="the evaluation of N chains, if there are several")


def evaluation_kind(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as keyword arguments of :func:`ttt_jax.evaluation.evaluations.read`."""
    return {
        "by_document": options.by_document or options.carry_state,
        "carried": options.carry_state,
        "source": options.source,
        "windows": options.max_windows,
        "chains": options.chains,
    }


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add the options that tell several processes how to find each other."""
    group = parser.add_argument_group("several processes, where the environment does not describe them")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="a free port of process 0")
    group.add_argument("--processes", type=positive, metavar="N", help="number of processes")
    group.add_argument("--process", type=not_negative, metavar="I", help="number of this process, from 0")
    limit = "seconds to wait for the others (default: 300)"
    group.add_argument("--start-limit", type=positive, default=300, metavar="S", help=limit)


def check_file(path: Path, option: str) -> None:
    """Raise ConfigError where a file cannot be written, before the work whose result it will hold."""
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; expected a file")
    check_folder(path.absolute().parent, f"{option} {path}")


def check_folder(folder: Path, what: str) -> None:
    """Raise ConfigError where a folder cannot be made, or cannot be written to."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"{what}: {existing} is not a folder that can be written to; expected one")
