"""Functions of the user's own by import path, ``MODULE:NAME``: found, hashed and imported, never evaluated.

A module is looked for where Python looks for modules (installed packages, ``PYTHONPATH``) and then in the folder that
the command runs in. Its source file is found and hashed without running anything: neither the module, nor the packages
that it is in.
"""

import difflib
import hashlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from ttt_jax.errors import ConfigError

FORM = "MODULE:NAME, such as mylab.learners:gated"


def is_import_path(text: str) -> bool:
    """Return whether a text is spelled ``MODULE:NAME``, with dots in the module and none in the name."""
    module, _, name = text.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), name))


def load(text: str, key: str, expected_hash: str = "") -> Callable[..., Any]:
    """Import a module and return a function of it.

    Args:
      text: the import path.
      key: of the config, for messages.
      expected_hash: of the module's source, as :func:`source_hash` gives it. Where the source has another one, the
        module is not imported. Empty: any source will do.

    Raises:
      ConfigError: where the text is no import path, the module is missing, has changed or cannot be imported, or the
        name is not that of something that can be called.
    """
    if expected_hash:
        check_unchanged(text, key, expected_hash)
    spec, name = _spec(text, key), text.rpartition(":")[2]
    try:
        module = importlib.import_module(spec.name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}={text!r}: importing {spec.name} fails: {said(error, spec.origin)}") from error
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, [each for each in vars(module) if callable(vars(module)[each])], 1)
        expected = f"did you mean {spec.name}:{close[0]}?" if close else "expected the name of a function in it"
        raise ConfigError(f"{key}={text!r}: {spec.origin} defines no {name}; {expected}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"{key}={text!r}: is of type {type(found).__name__}; expected a function")
    return found


def source_file(text: str, key: str) -> Path:
    """Return the source file of the module of an import path, which is not imported.

    Raises:
      ConfigError: where the text is no import path, or there is no such module, or it has no source.
    """
    spec = _spec(text, key)
    if not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(f"{key}={text!r}: module {spec.name} has no source file; expected a module in a .py file")
    return Path(spec.origin).resolve()


def source_hash(text: str, key: str) -> str:
    """Return the SHA-256 of a module's source file, in hexadecimal digits; raises as :func:`source_file`."""
    return hashlib.sha256(source_file(text, key).read_bytes()).hexdigest()


def check_unchanged(text: str, key: str, expected_hash: str) -> None:
    """Raise :class:`ConfigError` where the source of a module is another than that of a hash."""
    if (found := source_hash(text, key)) != expected_hash:
        raise ConfigError(
            f"{key}={text!r}: {source_file(text, key)} has changed since the run began (its SHA-256 was "
            f"{expected_hash[:12]}..., it is {found[:12]}...); expected the file as it was, a new run, or "
            "ttt train --accept-changed-learner, with which this run goes on with the new one"
        )


def check_outside(text: str, key: str, folder: str | os.PathLike) -> None:
    """Raise :class:`ConfigError` where a module lies in a folder, such as the workdir of a run. One that is missing
    lies nowhere."""
    module, inside = text.partition(":")[0], Path(folder).resolve()
    for spec in _specs(module):
        places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())
        for place in places:
            if Path(place).resolve().is_relative_to(inside):
                raise ConfigError(
                    f"{key}={text!r}: {place} is inside the workdir {folder}, from which nothing is imported; expected "
                    "a module elsewhere"
                )


def check_sent(text: str, key: str, root: Path, sent: Collection[Path] | None = None) -> None:
    """Raise :class:`ConfigError` where a module would not be found on another machine, on which the command runs in a
    copy of a folder.

    Args:
      root: the folder.
      sent: the files of it that are there, by their paths in it; None for all.
    """
    file, module = source_file(text, key), Path(*text.partition(":")[0].split("."))
    expected = [root / f"{module}.py", root / module / "__init__.py"]
    places = [place for place in expected if place.resolve() == file]
    if not places or (sent is not None and places[0].relative_to(root) not in sent):
        raise ConfigError(
            f"{key}={text!r}: {file} would be missing on other machines; expected the module at {expected[0]}, which "
            "they get (a folder that git ignores, and tests, are not sent)"
        )


def _spec(text: str, key: str) -> ModuleSpec:
    """Return how a module is found."""
    if not is_import_path(text):
        raise ConfigError(f"{key}={text!r}: is no import path; expected {FORM}")
    module = text.partition(":")[0]
    found = _specs(module)
    if not found or found[-1].name != module or found[-1].loader is None:
        raise ConfigError(
            f"{key}={text!r}: no module {module} here; expected one that is installed, in a folder of PYTHONPATH, or "
            f"in {os.getcwd()}"
        )
    return found[-1]


def _specs(module: str) -> list[ModuleSpec]:
    """Return how each package that a module is in and the module itself are found, up to the first that is missing.

    As :func:`importlib.util.find_spec`, which imports the packages, does it.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides nothing
    importlib.invalidate_caches()
    found: list[ModuleSpec] = []
    path: list[str] | None = None
    parts = module.split(".")
    for i in range(len(parts)):
        spec = _one_spec(".".join(parts[: i + 1]), path)
        if spec is None:
            break
        found.append(spec)
        if spec.submodule_search_locations is None:
            break
        path = list(spec.submodule_search_locations)
    return found


def _one_spec(name: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Return how a module is found in the folders of its package; ``path`` is None where it is in none."""
    try:
        specs = (finder.find_spec(name, path, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        return next((spec for spec in specs if spec is not None), None)
    except KeyError:  # a namespace package within another one, which Python wants to have been imported
        spec, part = ModuleSpec(name, None, is_package=True), name.rpartition(".")[2]
        spec.submodule_search_locations = [
            str(Path(place) / part) for place in path or () if (Path(place) / part).is_dir()
        ]
        return spec


def said(error: BaseException, file: str | os.PathLike | None) -> str:
    """Return what was raised and where, by the line of a file of the user's own if it can be."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen importlib")]
    mine = [frame for frame in frames if file is not None and frame.filename == os.fspath(file)]
    place = (mine or frames)[-1]
    said = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return f"{place.filename}, line {place.lineno}: {said}"
