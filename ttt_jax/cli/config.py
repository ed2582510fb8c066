"""Run ``ttt config``, and show the keys of the config in the help of verbs that take one."""

import argparse
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from ttt_jax import config as config_lib
from ttt_jax.cli.options import CONFIG_USAGE
from ttt_jax.errors import ConfigError
from ttt_jax.settings import Duration
from ttt_jax.terminal.stopping import DONE, REFUSED

DESCRIPTION = """\
Prints the config that a command with the same arguments would use, and runs nothing: a line of TOML for each key, with
its meaning, and its default where it differs. With --json, the same as the config.json of a run.
"""
USAGE = f"ttt config {CONFIG_USAGE} [--changed | --json]"
_HEADER = """\
config:
  --config FILE[:ARG]   a Python file with get_config(ARG), which starts from ttt_jax.config.default()
  --config.KEY=VALUE    sets a key; """


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with the keys of the config, for verbs that take one."""

    takes_config = False
    _arguments: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):
        """Parse arguments, and keep them for the help and for messages about missing ones."""
        self._arguments = () if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """Return the help, in which keys have the values that the command gives them."""
        if not self.takes_config:
            return super().format_help()
        arguments = config_lib.about_config(self._arguments)
        try:
            config = config_lib.from_arguments(arguments) if config_lib.count_files(arguments) == 1 else None
        except ConfigError as error:
            self.exit(REFUSED, f"{self.prog}: {error}\n")
        return f"{super().format_help()}\n{manual(config)}\n"

    def error(self, message: str):
        """End with a message; where arguments are missing, name --config among them."""
        start = "the following arguments are required: "
        if self.takes_config and message.startswith(start) and not config_lib.count_files(self._arguments):
            message = f"{start}--config, {message.removeprefix(start)}"
        super().error(message)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ttt config``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--changed", action="store_true", help="print only what is not the default")
    group.add_argument("--json", action="store_true", help="print JSON, as in the config.json of a run")


def run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run ``ttt config`` and return its exit status."""
    config = config_lib.from_arguments(rest)
    if options.json:
        print(json.dumps(config.to_dict(), indent=2))
        return DONE
    print("\n".join(as_toml(config, changed=options.changed, width=_width())))
    return DONE


def as_toml(config: ml_collections.ConfigDict, *, changed: bool = False, width: int | None = None) -> Iterator[str]:
    """Yield lines ``key = value  # meaning``, with ``#*`` and the default where the value is not the default.

    Keys that are unset are comments, and durations in other units are also given in steps.

    Args:
      changed: leave out keys that have their default.
      width: longest line, in characters; longer comments are continued on lines of their own. None is no limit.
    """
    settings = config_lib.settings()
    values = {key: config_lib.value_of(config, key) for key in settings}
    altered = [key for key, each in settings.items() if values[key] != each.default]
    if not changed:
        yield f"# {len(altered)} of {len(settings)} keys are not the defaults, marked #*; --changed prints these alone"
    section = None
    for key in altered if changed else settings:
        if key.rpartition(".")[0] != section and not changed:
            yield ""
        section = key.rpartition(".")[0]
        value, each = values[key], settings[key]
        line = f"# {key} is unset" if value is None else f"{key} = {_shown(value)}"
        notes = [f"default: {_shown(each.default)}"] if key in altered else []
        if value and each.kind is Duration and not re.fullmatch(r"\s*\d+( steps?)?\s*", value):
            notes.insert(0, f"{config_lib.steps(config, key):,} steps")
        mark = "*" if key in altered else " "
        yield from _aligned(f"{line:<44}  #{mark} ", f"{'':<44}  #  ", "; ".join([*notes, each.meaning]), width)


def manual(config: ml_collections.ConfigDict | None) -> str:
    """Return the part of a verb's help about the config: all keys, with the values of ``config`` or the defaults."""
    lines = [_HEADER + "the keys, with their defaults:", ""]
    if config is not None:
        lines = [_HEADER + "the keys, with the values of this command; * marks what is not the default:", ""]
    for key, each in config_lib.settings().items():
        default = each.default
        value = default if config is None else config_lib.value_of(config, key)
        changed = config is not None and value != default
        setting = f"{'*' if changed else ' '} --config.{key}={_shown(value)}"
        usual = f" (default: {_shown(default)})" if changed else ""
        lines += _aligned(f"{setting:<46} ", " " * 47, f"{each.meaning}{usual}", _width())
    return "\n".join(lines)


def _aligned(start: str, indent: str, comment: str, width: int | None) -> Iterator[str]:
    """Yield a line with a comment, wrapped where it is wider than ``width``; further lines begin with ``indent``."""
    lines = [start + comment]
    if width is not None:
        lines = textwrap.wrap(
            comment, max(width, len(start) + 30), initial_indent=start, subsequent_indent=indent, break_on_hyphens=False
        )
    return (line.rstrip() for line in lines)


def _width() -> int | None:
    """Return the width of the terminal; None for a file or another program."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
