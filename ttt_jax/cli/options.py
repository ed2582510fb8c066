"""What options of commands may be: types for argparse, and files that can be written."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ttt_jax.errors import ConfigError

SPLITS = ("train", "validation", "test")


def at_least(least: int) -> Callable[[str], int]:
    """A parser of integers that are not below ``least``."""

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {least} or more")
        return int(text)

    return parse


positive, not_negative = at_least(1), at_least(0)


def counts(text: str) -> list[int]:
    """Positive integers with commas between them; ``k`` is 1024 of them: ``2048,8k``."""
    found = []
    for part in text.split(","):
        number, factor = (part[:-1], 1024) if part.endswith("k") else (part, 1)
        if not number.strip().isdecimal() or int(number) < 1:
            raise argparse.ArgumentTypeError(f"{part!r}: expected integers from 1, such as 2048 or 2k,8k")
        found.append(int(number) * factor)
    return found


def count(text: str) -> int:
    """One of :func:`counts`: ``2048`` or ``2k``."""
    if "," in text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one integer from 1, such as 2048 or 2k")
    return counts(text)[0]


def add_evaluation_kind(parser: argparse.ArgumentParser) -> None:
    """The options that say which kind of evaluation is meant; :func:`evaluation_kind` is what they say."""
    add = parser.add_argument
    add("--by-document", action="store_true", help="whole documents, each from its beginning, not windows")
    add("--carry-state", action="store_true", help="whole documents, the state carried from one to the next")
    add("--source", metavar="DIR", help="another dataset than that of training")


def add_which_evaluation(parser: argparse.ArgumentParser) -> None:
    """Add the options that tell evaluations of one kind apart; :func:`evaluation_kind` is what they say."""
    add = parser.add_argument
    add("--max-windows", type=positive, metavar="N", help="the evaluation of so many, where there are several")
    add("--chains", type=positive, metavar="N", help="that of so many chains, where there are several")


def evaluation_kind(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options as :func:`ttt_jax.evaluation.evaluations.read` takes them."""
    return {
        "by_document": options.by_document or options.carry_state,
        "carried": options.carry_state,
        "source": options.source,
        "windows": options.max_windows,
        "chains": options.chains,
    }


def add_processes(parser: argparse.ArgumentParser) -> None:
    """The options that say how several processes find each other."""
    several = parser.add_argument_group("several processes, where the environment does not tell of them")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="a free port of process 0")
    several.add_argument("--processes", type=positive, metavar="N", help="how many")
    several.add_argument("--process", type=not_negative, metavar="I", help="which one this is, from 0")
    limit = "seconds to wait (default: 300)"
    several.add_argument("--start-limit", type=positive, default=300, metavar="S", help=limit)


def check_file(path: Path, option: str) -> None:
    """Raise ConfigError where a file cannot be written, before the work that it is going to hold."""
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder; expected a file")
    check_folder(path.absolute().parent, f"{option} {path}")


def check_folder(folder: Path, what: str) -> None:
    """Raise ConfigError where a folder cannot be written to, or cannot be made."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"{what}: {there} is no folder that can be written to; expected one")
