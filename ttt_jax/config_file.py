"""From ``--config FILE[:ARG] --config.KEY=VALUE ...`` to a validated config, by way of ml_collections."""

import difflib
import json
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from ttt_jax import config as config_lib
from ttt_jax.config import ConfigError


def from_arguments(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """Reads the config file that the arguments name, applies their overrides and validates the result.

    A config file is Python and runs as such; values on the command line are parsed by the type of their key and
    never run.

    Raises:
      ConfigError: one line, for whatever is wrong with the arguments, the file or the values.
    """
    _check_file(arguments)
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["ttt", *arguments])
        rest = values(["ttt", *arguments])[1:]
        config = values.config
        config.lock()  # a file that failed to run raises here
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(_one_line(error, arguments)) from error
    if rest:
        raise ConfigError(f"{rest[0]!r}: unexpected argument")
    config_lib.validate(config)
    return config


def from_json(path: Path) -> ml_collections.ConfigDict:
    """The config of an earlier run, from the ``config.json`` in its workdir. Keys that have been added since then
    have their defaults.

    Raises:
      ConfigError: when the file is missing, is not JSON, or does not hold a valid config.
    """
    config = config_lib.default()
    try:
        config.update(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: not found; expected the workdir of a run, with its config.json") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not the config of a run: {str(error).splitlines()[0]}") from error
    config_lib.validate(config)
    return config


def _check_file(arguments: Sequence[str]) -> None:
    named = [i for i, argument in enumerate(arguments) if re.fullmatch("--?config(=.*)?", argument)]
    if not named or (named[-1] == len(arguments) - 1 and "=" not in arguments[-1]):
        raise ConfigError("--config: missing; expected a config file, such as --config configs/quickstart.py")
    first = arguments[named[0]]
    value = first.partition("=")[2] if "=" in first else "".join(arguments[named[0] + 1 : named[0] + 2])
    path = Path(value.split(":", 1)[0])
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file; expected a Python file with get_config()")


def _one_line(error: Exception, arguments: Sequence[str]) -> str:
    """What was wrong, in the words of whoever typed it."""
    text = str(error).strip()
    overrides = [a.lstrip("-").removeprefix("config.") for a in arguments if re.match("--?(no)?config[.]", a)]
    if match := re.search(r'Key "(\w+)" does not exist.*?(Did you mean "(\w+)"|$)', text, re.DOTALL):
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.name in ("get_config", "<module>")]
        place = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
        if place:
            return f"{place}{match[1]}: unknown key" + (f"; did you mean {match[3]}?" if match[3] else "")
    if "Error whilst parsing config file" in text or "earlier failure to load" in text:
        where = re.findall(r'File "([^"]+)", line (\d+), in (?:get_config|<module>)', text)
        place = f"{where[-1][0]}, line {where[-1][1]}: " if where else ""
        last = text.splitlines()[-1]
        if match := re.match(r".*override field '(\w+)'.*?\. (.*) is of original type.*<class '(\w+)'>$", last):
            return f"{place}{match[1]}={match[2]}: expected {_kind(match[3])}"
        return place + last
    known = [key for key, _, _ in config_lib.KEYS]
    sections = {key.rsplit(".", n)[0] for key in known for n in range(1, key.count(".") + 1)}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in sections:
            return f"{key}={value}: is a section; expected one of its keys, such as {_first(known, key)}"
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0) or known[:1]
            return f"{key}: unknown key; did you mean {close[0]}?"
    if match := re.match(r"flag --config\.([\w.]+)=(.*?): ", text, re.DOTALL):
        return f"{match[1]}={match[2]}: expected {_kind(_type_of(match[1]))}"
    return text.splitlines()[0] if text else traceback.format_exception_only(error)[-1].strip()


def _first(known: list[str], section: str) -> str:
    return next(key for key in known if key.startswith(section + "."))


def _type_of(key: str) -> str:
    value = next(value for name, value, _ in config_lib.KEYS if name == key)
    return (value if isinstance(value, type) else type(value)).__name__


def _kind(type_name: str) -> str:
    kinds = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string in quotes"}
    return kinds.get(type_name, type_name)
