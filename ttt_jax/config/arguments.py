"""Read the config of a command from its arguments: ``--config FILE[:ARG] --config.KEY=VALUE ...``.

This is the only module that knows how these arguments are spelled.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import ml_collections

from ttt_jax.config import files, renamed, tree
from ttt_jax.errors import ConfigError
from ttt_jax.settings import Setting, parse, set_value

_FLAG = re.compile(r"--?(?:config|(?P<no>no)?config[.](?P<key>[^=]*))(?P<equals>=(?P<text>.*))?", re.DOTALL)


class ConfigArguments(NamedTuple):
    """The arguments of a command that concern its config.

    Attributes:
      files: ``FILE[:ARG]`` of each ``--config``, in order.
      values: the dotted key and the text of each ``--config.KEY=VALUE``, in order.
    """

    files: tuple[str, ...]
    values: tuple[tuple[str, str], ...]


def from_arguments(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Return the config of the file that the arguments name, with their overrides, validated.

    Values are parsed by the type of their key, and never run. The last file counts, and the last value of each key.

    Raises:
      ConfigError: one line, for whatever is wrong with the arguments, the file or the values.
    """
    named, values = split_arguments(arguments)
    if not named or not named[-1]:
        raise ConfigError("--config: missing; expected a config file, such as --config configs/quickstart.py")
    config = files.load(named[-1])
    for key, text in values:
        set_value(config, key, parse(f"{key}={text}", tree.setting(key, text).kind, text))
    tree.validate(config)
    return config


def split_arguments(arguments: Sequence[str]) -> ConfigArguments:
    """Split arguments that are all about the config into files and values.

    A key that is true or false may stand without a value: ``--config.KEY`` is true and ``--noconfig.KEY`` false. The
    value of any other key may be the next argument, and so may the file.

    Raises:
      ConfigError: for an argument that is not about the config, an unknown key or a missing value.
    """
    named: list[str] = []
    values: list[tuple[str, str]] = []
    left = list(arguments)
    while left:
        first = left.pop(0)
        match = _FLAG.fullmatch(first)
        if match is None:
            raise ConfigError(f"{first!r}: unexpected argument; expected --config.KEY=VALUE")
        no, key, equals, text = match.group("no", "key", "equals", "text")
        if key is None:
            named.append(text if equals else (left.pop(0) if left else ""))
            continue
        kind = _setting(key, text or "").kind
        if kind is bool and not equals:
            values.append((key, "false" if no else "true"))
        elif no:
            raise ConfigError(f"{first!r}: unexpected argument; expected --config.{key}=VALUE")
        elif equals or left:
            values.append((key, text if equals else left.pop(0)))
        else:
            raise ConfigError(f"{key}: missing value; expected --config.{key}=VALUE")
    return ConfigArguments(tuple(named), tuple(values))


def about_config(arguments: Sequence[str]) -> list[str]:
    """Return those of a command's arguments that are about its config, whatever the others are."""
    found: list[str] = []
    left = list(arguments)
    while left:
        first = left.pop(0)
        match = _FLAG.fullmatch(first)
        if match is None:
            continue
        found.append(first)
        if not match["equals"] and left and not left[0].startswith("-"):
            found.append(left.pop(0))
    return found


def count_files(arguments: Sequence[str]) -> int:
    """Return how many config files the arguments of a command name."""
    return sum(match is not None and match["key"] is None for match in map(_FLAG.fullmatch, arguments))


def replace_files(arguments: Sequence[str], replace: Callable[[str], str]) -> list[str]:
    """Return the arguments of a command with ``replace(FILE)`` in place of FILE in each ``--config FILE[:ARG]``."""
    changed = list(arguments)
    for i, argument in enumerate(arguments):
        match = _FLAG.fullmatch(argument)
        if match is None or match["key"] is not None:
            continue
        if match["equals"]:
            changed[i] = f"{argument[: match.start('text')]}{_with_file(match['text'], replace)}"
        elif i + 1 < len(changed):
            changed[i + 1] = _with_file(changed[i + 1], replace)
    return changed


def _with_file(named: str, replace: Callable[[str], str]) -> str:
    file, colon, argument = named.partition(":")
    return f"{replace(file)}{colon}{argument}"


def _setting(key: str, text: str) -> Setting:
    """Return the setting of a key, or say what the key is called now."""
    if advice := renamed.advice(key, text):
        raise ConfigError(advice)
    return tree.setting(key, text)
