"""Find, hash and import functions of the user's own by import path, ``MODULE:NAME``. Nothing is evaluated.

A module is looked for where Python looks for modules (installed packages, ``PYTHONPATH``) and then in the folder that
the command runs in. Its source file is found and hashed without running the module or the packages that it is in.
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
    """Import a module and return one of its functions.

    Args:
      text: the import path.
      key: the key of the config that holds it, for messages.
      expected_hash: the hash of the module's source, from :func:`source_hash`. A module with another hash is not
        imported. Empty: any source is accepted.

    Raises:
      ConfigError: where the text is no import path, the module is missing, has changed or cannot be imported, or it
        defines no such function.
    """
    if expected_hash:
        check_unchanged(text, key, expected_hash)
    spec, name = _spec(text, key), text.rpartition(":")[2]
    try:
        module = importlib.import_module(spec.name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{key}={text!r}: importing {spec.name} fails: {describe_error(error, spec.origin)}"
        ) from error
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, [each for each in vars(module) if callable(vars(module)[each])], 1)
        expected = f"did you mean {spec.name}:{close[0]}?" if close else "expected the name of a function in it"
        raise ConfigError(f"{key}={text!r}: {spec.origin} defines no {name}; {expected}")
    function = getattr(module, name)
    if not callable(function):
        raise ConfigError(f"{key}={text!r}: is of type {type(function).__name__}; expected a function")
    return function


def source_file(text: str, key: str) -> Path:
    """Return the source file of the module of an import path, without importing it.

    Raises:
      ConfigError: where the text is no import path, the module does not exist, or it has no source file.
    """
    spec = _spec(text, key)
    if not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(f"{key}={text!r}: module {spec.name} has no source file; expected a module in a .py file")
    return Path(spec.origin).resolve()


def source_hash(text: str, key: str) -> str:
    """Return the SHA-256 of a module's source file, in hexadecimal digits; raises as :func:`source_file`."""
    return hashlib.sha256(source_file(text, key).read_bytes()).hexdigest()


def check_unchanged(text: str, key: str, expected_hash: str) -> None:
    """Raise :class:`ConfigError` where the source of a module does not have the expected hash."""
    if (found := source_hash(text, key)) != expected_hash:
        raise ConfigError(
            f"{key}={text!r}: {source_file(text, key)} has changed since the run began (its SHA-256 was "
            f"{expected_hash[:12]}..., it is {found[:12]}...); expected the file as it was, a new run, or "
            "ttt train --accept-changed-learner to continue this run with the changed file"
        )


def check_outside(text: str, key: str, folder: str | os.PathLike) -> None:
    """Raise :class:`ConfigError` where a module lies in a folder, such as the workdir of a run.

    A module that is missing raises nothing.
    """
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
    """Raise :class:`ConfigError` where a module would be missing on a machine that gets a copy of a folder.

    Args:
      root: the folder, in whose copy the command runs.
      sent: the files that are copied, by their paths in the folder; None for all.
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
    """Return the spec of the module of an import path, without importing it."""
    if not is_import_path(text):
        raise ConfigError(f"{key}={text!r}: not an import path; expected {FORM}")
    module = text.partition(":")[0]
    found = _specs(module)
    if not found or found[-1].name != module or found[-1].loader is None:
        raise ConfigError(
            f"{key}={text!r}: no module {module} here; expected one that is installed, in a folder of PYTHONPATH, or "
            f"in {os.getcwd()}"
        )
    return found[-1]


def _specs(module: str) -> list[ModuleSpec]:
    """Return the specs of the packages that a module is in and of the module, up to the first that is missing.

    They are those of :func:`importlib.util.find_spec`, which would import the packages.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it hides no other module
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
    """Return the spec of a module in the folders of its package; ``path`` is None for a module outside of packages."""
    try:
        specs = (finder.find_spec(name, path, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        return next((spec for spec in specs if spec is not None), None)
    except KeyError:  # a namespace package within one that has not been imported, which Python requires
        spec, part = ModuleSpec(name, None, is_package=True), name.rpartition(".")[2]
        spec.submodule_search_locations = [
            str(Path(place) / part) for place in path or () if (Path(place) / part).is_dir()
        ]
        return spec


def describe_error(error: BaseException, file: str | os.PathLike | None) -> str:
    """Return an error and where it was raised in one line; the place is in ``file`` where the traceback passes it."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen importlib")]
    mine = [frame for frame in frames if file is not None and frame.filename == os.fspath(file)]
    place = (mine or frames)[-1]
    message = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return f"{place.filename}, line {place.lineno}: {message}"
