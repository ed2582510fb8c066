"""Config files, which are Python, and configs of earlier runs, which are JSON."""

import contextlib
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


def load(named: str) -> ml_collections.ConfigDict:
    """Return what ``get_config(ARG)`` of ``FILE[:ARG]`` returns. Whatever fails in it is one line that names the place.

    A file imports its neighbours as modules of a package do: ``from . import paper``.
    """
    name, *argument = named.split(":", 1)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--config {name}: no such file; expected a Python file with get_config()")
    try:
        with executed(path) as names:
            get_config = names.get("get_config")
            config = get_config(*argument) if callable(get_config) else None
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{_place(error, path)}: {_said(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ConfigError(
            f"{path}: expected a get_config() that returns a ConfigDict, as ttt_jax.config.default() does"
        )
    try:
        tree.check_keys(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config.lock()


@contextlib.contextmanager
def executed(path: Path) -> Iterator[dict[str, Any]]:
    """Run a config file in a context, and give what it defines.

    Its folder is a package for as long as the context lasts, of a name that no other has: files are read anew each
    time, and those of other folders may have the same names.
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


def names_of(path: Path) -> dict[str, Any]:
    """Return what a config file defines."""
    with executed(path) as names:
        return names


def from_json(path: Workdir) -> ml_collections.ConfigDict:
    """Return the config of an earlier run, from the ``config.json`` in its workdir.

    Keys that have been added since then have their defaults, and those that have been renamed
    (:mod:`ttt_jax.config.renamed`) their new names.

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
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not the config of a run; expected an object of its sections")
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
    """Return where in a config file, or in a neighbour that it imports, an error was raised."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    place = str(path)
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith(_PACKAGE):
            place = f"{frame.f_code.co_filename}, line {line}"
    return place


def _said(error: Exception) -> str:
    """Return an error in one line. Those of ml_collections are long, and call a key by its last part alone."""
    if isinstance(error, SyntaxError):
        return error.msg
    inner = error
    while inner.args and isinstance(inner.args[0], Exception):
        inner = inner.args[0]
    text = str(inner.args[0] if inner.args else inner)
    if match := re.match(r"(?:Key )?[\"'](\w+)[\"'](?: does not exist|\n|$)", text):
        if advice := renamed.advice_for_name(match[1]):
            return advice
        return f"{match[1]}: unknown key; did you mean {tree.nearest(match[1])}?"
    if match := re.match(r"Could not override field '(\w+)'.*?\. (.*) is of original type.*<class '([\w.]+)'>$", text):
        return f"{match[1]}={match[2]}: expected {kind_in_words(match[3].rpartition('.')[2])}"
    return f"{type(error).__name__}: {' '.join(text.split())}"
