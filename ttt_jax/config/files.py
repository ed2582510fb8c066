"""From ``--config FILE[:ARG] --config.KEY=VALUE ...`` to a validated config, by way of ml_collections."""

import difflib
import re
import runpy
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from ttt_jax import json_files
from ttt_jax.config import renamed
from ttt_jax.config import tree as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.workdir import Workdir


def from_arguments(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Reads the config file that the arguments name, applies their overrides and validates the result.

    A config file is Python and runs as such; values on the command line are parsed by the type of their key and
    never run.

    Raises:
      ConfigError: one line, for whatever is wrong with the arguments, the file or the values.
    """
    path, argument, overrides = _split(arguments)
    config = _run(path, argument)
    overrides = _set_hidden(config, overrides)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["ttt", *overrides])
        rest = values(["ttt", *overrides])[1:]
        config = values.config.lock()
    except (flags.Error, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(_one_line(error, overrides).splitlines())) from error
    if rest:
        raise ConfigError(f"{rest[0]!r}: unexpected argument; expected --config.KEY=VALUE")
    config_lib.validate(config)
    return config


def from_json(path: Workdir) -> ml_collections.ConfigDict:
    """The config of an earlier run, from the ``config.json`` in its workdir. Keys that have been added since then
    have their defaults, and those that have been renamed (:mod:`ttt_jax.config.renamed`) their new names.

    Raises:
      ConfigError: when the file is missing, cannot be read, is not JSON, or does not hold a valid config.
    """
    try:
        return from_dict(json_files.read_object(path), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{path}: not found; expected the workdir of a run, with its config.json") from error


def from_dict(content: Any, path: Workdir) -> ml_collections.ConfigDict:
    """Return the config of an earlier run from what a file holds; raises as :func:`from_json`.

    Args:
      path: of the file, for messages.
    """
    config = config_lib.default()
    try:
        config.update(renamed.current(content))
        config_lib.validate(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the config of a run: {_said(error)}") from error
    return config


def _split(arguments: Sequence[str]) -> tuple[Path, list[str], list[str]]:
    """The config file, the argument of its ``get_config`` if there is one, and all other arguments."""
    named, overrides, left = "", [], list(arguments)
    while left:
        first = left.pop(0)
        if re.fullmatch("--?config(=.*)?", first):
            named = first.partition("=")[2] if "=" in first else (left.pop(0) if left else "")
        elif first.startswith("-") and not re.match("--?(no)?config[.]", first):
            raise ConfigError(f"{first!r}: unexpected argument; expected --config.KEY=VALUE")
        else:
            overrides.append(first)
    if not named:
        raise ConfigError("--config: missing; expected a config file, such as --config configs/quickstart.py")
    name, *argument = named.split(":", 1)
    if not Path(name).is_file():
        raise ConfigError(f"--config {name}: no such file; expected a Python file with get_config()")
    return Path(name), argument, overrides


def _set_hidden(config: ml_collections.ConfigDict, overrides: list[str]) -> list[str]:
    """Set the keys that a method of ConfigDict hides from its flags (``update``), and return the other overrides."""
    hidden = [key for key in config_lib.settings() if hasattr(ml_collections.ConfigDict, key.rpartition(".")[2])]
    others, left = [], list(overrides)
    while left:
        first = left.pop(0)
        key, separator, value = first.partition("=")
        if key.lstrip("-").removeprefix("config.") not in hidden or not key.startswith("-"):
            others.append(first)
            continue
        *sections, name = key.lstrip("-").removeprefix("config.").split(".")
        if not separator and not left:
            raise ConfigError(f"{'.'.join([*sections, name])}: expected a value, as in {key}=VALUE")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value if separator else left.pop(0)
    return others


def _run(path: Path, argument: list[str]) -> ml_collections.ConfigDict:
    """What ``get_config`` of the file returns; whatever fails in it is one line that names the place."""
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        config = get_config(*argument) if callable(get_config) else None
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from error
    except ConfigError:
        raise
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        place = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ConfigError(f"{place}: {_said(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{path}: expected a get_config() that returns a ConfigDict, as ttt_jax.config.default() does"
        )
    return config


def _said(error: Exception) -> str:
    """An error of ml_collections, or any other, in one line."""
    text = str(error.args[0] if error.args else error)
    if match := re.search(
        r'(?:Key )?["\'](\w+)["\'](?: does not exist|\n).*?(?:Did you mean "(\w+)"|$)', text, re.DOTALL
    ):
        if advice := renamed.advice_for_name(match[1]):
            return advice
        return f"{match[1]}: unknown key" + (f"; did you mean {match[2]}?" if match[2] else "")
    if match := re.match(r"Could not override field '(\w+)'.*?\. (.*) is of original type.*<class '([\w.]+)'>$", text):
        return f"{match[1]}={match[2]}: expected {_kind(match[3].split('.')[-1])}"
    return f"{type(error).__name__}: {' '.join(text.split())}"


def _one_line(error: Exception, arguments: Sequence[str]) -> str:
    """What was wrong, in the words of whoever typed it."""
    text = str(error).strip()
    overrides = [a.lstrip("-").removeprefix("config.") for a in arguments if re.match("--?(no)?config[.]", a)]
    known = list(config_lib.settings())
    sections = {key.rsplit(".", n)[0] for key in known for n in range(1, key.count(".") + 1)}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in sections:
            return f"{key}={value}: is a section; expected one of its keys, such as {_first(known, key)}"
        if advice := renamed.advice(key, value):
            return advice
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0) or known[:1]
            return f"{key}: unknown key; did you mean {close[0]}?"
    if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", text, re.DOTALL):
        return f"{match[1]}={match[2]}: expected {_kind(_type_of(match[1]))}"
    return text.splitlines()[0] if text else traceback.format_exception_only(error)[-1].strip()


def _first(known: list[str], section: str) -> str:
    return next(key for key in known if key.startswith(section + "."))


def _type_of(key: str) -> str:
    return config_lib.settings()[key].kind.__name__


def _kind(type_name: str) -> str:
    kinds = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string in quotes"}
    return kinds.get(type_name, type_name)
