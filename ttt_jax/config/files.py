"""Load config files, which are Python, and the configs of earlier runs, which are JSON."""

import contextlib
import difflib
import importlib
import itertools
import re
import runpy
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from ttt_jax.config import renamed, tree
from ttt_jax.errors import ConfigError
from ttt_jax.settings import flat, kind_in_words, set_value
from ttt_jax.storage import json_files
from ttt_jax.storage.workdir import Workdir

_PACKAGE, _COUNT = "config_files_", itertools.count()
# Messages of ml_collections.
_UNKNOWN_KEY = re.compile(r"(?:Key )?[\"'](\w+)[\"'](?: does not exist|\n|$)")
_WRONG_TYPE = re.compile(r"Could not override field '(\w+)'.*?\. (.*) is of original type.*<class '([\w.]+)'>$")


def load(named: str) -> ml_collections.ConfigDict:
    """Return the config that ``get_config(ARG)`` in ``FILE[:ARG]`` returns.

    A file may import others of its folder as a module of a package does: ``from . import paper``.

    Raises:
      ConfigError: for any error in the file: one line that names the file and, where it is known, the line.
    """
    name, *argument = named.split(":", 1)
    path = Path(name)
    if not path.is_file():
        close = difflib.get_close_matches(path.name, [each.name for each in path.parent.glob("*.py")], 1)
        advice = f"did you mean {path.parent / close[0]}?" if close else "expected a Python file with get_config()"
        raise ConfigError(f"--config {name}: no such file; {advice}")
    try:
        with executed(path) as names:
            get_config = names.get("get_config")
            config = get_config(*argument) if callable(get_config) else None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{_place(error, path)}: {_describe(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{path}: expected a function get_config() that returns a ConfigDict, such as that of "
            "ttt_jax.config.default()"
        )
    try:
        tree.check_keys(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config.lock()


@contextlib.contextmanager
def executed(path: Path) -> Iterator[dict[str, Any]]:
    """Run a config file and yield the names that it defines.

    Within the context its folder is a package with a unique name, so that files are read anew each time and files in
    different folders may have the same name.
    """
    package = types.ModuleType(f"{_PACKAGE}{next(_COUNT)}")
    package.__file__ = str(path.resolve().parent)  # for messages
    package.__path__ = [package.__file__]
    sys.modules[package.__name__] = package
    importlib.invalidate_caches()
    try:
        yield runpy.run_path(str(path), run_name=f"{package.__name__}.{path.stem.replace('.', '_')}")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
            del sys.modules[name]


def from_json(path: Workdir) -> ml_collections.ConfigDict:
    """Return the config of an earlier run, from the ``config.json`` in its workdir.

    Keys that have been added since that run get their defaults; renamed keys (:mod:`ttt_jax.config.renamed`) get their
    new names.

    Raises:
      ConfigError: where the file is missing, cannot be read, is not JSON, or does not hold a valid config.
    """
    try:
        return from_dict(json_files.read_object(path), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{path}: not found; expected the workdir of a run, with its config.json") from error


def from_dict(content: Any, path: Workdir) -> ml_collections.ConfigDict:
    """Return the config of an earlier run from the content of a JSON file; raises as :func:`from_json` does.

    Args:
      path: the file, for messages.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not the config of a run; expected a JSON object with the sections of a config")
    config = tree.default()
    try:
        for key, value in flat(renamed.current(content)).items():
            tree.setting(key, value).check(key, value)
            set_value(config, key, value)
        tree.validate(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def _place(error: Exception, path: Path) -> str:
    """Return the file and line of a config file, or of one that it imports, where an error was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    place = str(path)
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith(_PACKAGE):
            place = f"{frame.f_code.co_filename}, line {line}"
    return place


def _describe(error: Exception) -> str:
    """Return an error in one line, with what was expected where the error is about a key of the config.

    Errors of ml_collections carry nothing but a long message that calls a key by its last part. This is the only
    function that reads these messages. It is tested with ml_collections 1.1; other messages are passed on as they are.
    """
    if isinstance(error, SyntaxError):
        return error.msg
    inner = error
    while inner.args and isinstance(inner.args[0], Exception):  # ml_collections wraps a KeyError in an AttributeError
        inner = inner.args[0]
    text = str(inner.args[0] if inner.args else inner)
    if match := _UNKNOWN_KEY.match(text):
        name = match[1]
        return renamed.advice_for_name(name) or f"{name}: unknown key; did you mean {tree.nearest(name)}?"
    if match := _WRONG_TYPE.match(text):
        name, value, kind = match.groups()
        keys = [key for key in tree.settings() if key.rpartition(".")[2] == name]
        if len(keys) == 1:  # else the message does not say which key it is
            return f"{keys[0]}={value}: expected {kind_in_words(tree.setting(keys[0]).kind.__name__)}"
        return f"{name}={value}: expected {kind_in_words(kind.rpartition('.')[2])}"
    return f"{type(error).__name__}: {' '.join(text.split())}"
