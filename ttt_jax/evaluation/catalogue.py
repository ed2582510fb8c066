"""Name and find the results of a run in one of its folders, ``eval`` or ``inspect``.

A result is NAME.json beside NAME.npz and NAME.csv, where NAME is ``[SOURCE-]SPLIT[-documents][-carried]-T[-at-STEP]``,
such as ``validation-2048``. NAME does not say everything: two datasets may share their last name, and the number of
windows is not in it. Where the folder already holds a result of this NAME and of other tokens, the new result is
``NAME-IDENTITY``, with a hash of all that its numbers depend on, and both are kept.
"""

import os
import re
import shlex
from typing import Any, NamedTuple

from ttt_jax.data import named_sources
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.evaluation import result_files
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.json_files import DamagedFile, warn_once
from ttt_jax.storage.workdir import Workdir, explained
from ttt_jax.terminal.console import first_few

_MOST_LISTED = 8
_NOUNS = {"eval": "evaluation", "inspect": "inspection"}  # by command, which is also the name of the folder
_IDENTITY = ("fingerprint", "split", "of", "carried", "chains", "context", "windows")


class Entry(NamedTuple):
    """A result: its NAME, its context, and the content of its JSON file (empty where that is damaged)."""

    stem: str
    context: int
    about: dict[str, Any]


def name(
    split: str,
    context: int,
    *,
    by_document: bool = False,
    carried: bool = False,
    source: str | None = None,
    step: int | None = None,
) -> str:
    """Return the NAME of a result.

    Args:
      source: the dataset, if it is not that of the run.
      step: the step of the checkpoint, if it was asked for by its step rather than as the newest.
    """
    kind = "-documents" * by_document + "-carried" * carried
    return f"{_prefix(source)}{split}{kind}-{context}" + ("" if step is None else f"-at-{step}")


def place(folder: Workdir, stem: str, about: dict[str, Any]) -> str:
    """Return the NAME to save a result under: ``stem``, or ``stem-IDENTITY`` where ``stem`` is of other tokens."""
    present = _about(folder / f"{stem}.json")
    if present and any(present[key] != about[key] for key in _IDENTITY if key in present and key in about):
        stem = f"{stem}-{result_files.short_hash([about.get(key) for key in _IDENTITY])}"
        present = _about(folder / f"{stem}.json")
    if present and present.get("step", about.get("step")) != about.get("step"):
        warn_once(f"{folder / stem}.json: in place of the result of step {present['step']}; --step keeps one of each")
    return stem


def absolute(source: str) -> str:
    """Return the absolute path of a dataset; leave URLs and names such as ``embedded`` as they are."""
    return os.path.realpath(source) if os.path.isdir(source) or os.path.isabs(source) else source.rstrip("/")


def find(folder: Workdir, split: str, context: int | None = None, **kind: Any) -> Entry | None:
    """Return the one result of a kind, or None; of the longest context in the folder if no context is given.

    Args:
      kind: the keyword arguments of :func:`entries`.

    Raises:
      ConfigError: where several results match, with their names.
    """
    found = entries(folder, split, context, **kind)
    longest = max((entry.context for entry in found), default=None)
    found = [entry for entry in found if entry.context == longest]
    if len({entry.about.get("fingerprint") for entry in found}) > 1:
        source = kind.get("source") or found[0].about.get("source_path")
        current = _fingerprint(source, split) if source else None  # the dataset may have been made anew in its place
        found = [entry for entry in found if current and entry.about.get("fingerprint") == current] or found
    if len(found) > 1:
        listed = ", ".join(f"{entry.stem} ({_words(entry.about)})" for entry in found)
        raise ConfigError(
            f"{folder}: {len(found)} results of the {split} split with context {longest}: {listed}; expected an option "
            "that tells them apart (--max-windows, --chains, --source), or only one of these files"
        )
    return found[0] if found else None


def require(workdir: Workdir, command: str, split: str, context: int | None = None, **kind: Any) -> Entry:
    """Return the result that :func:`find` finds, or raise an error that names the command to run.

    Args:
      command: ``eval`` or ``inspect``, which is also the name of the folder.

    Raises:
      ConfigError: if no result matches, or more than one.
    """
    entry = find(workdir / command, split, context, **kind)
    if entry is None:
        workdir_lib.check_exists(workdir)
        length = "" if context is None else f" with context {context}"
        raise ConfigError(
            f"{workdir}: no {_NOUNS[command]} of the {split} split{length}{known_results(workdir / command)}; run: "
            f"ttt {command} --workdir {shlex.quote(str(workdir))} --split {split} --context {context or 2048}"
            f"{_options(**kind)}"
        )
    return entry


def entries(
    folder: Workdir,
    split: str,
    context: int | None = None,
    *,
    source: str | None = None,
    windows: int | None = None,
    chains: int | None = None,
    **kind: Any,
) -> list[Entry]:
    """Return the results of a kind, of one context or of all.

    Args:
      source: a dataset other than that of the run, by its path; results without a path, or with another path, are
        compared by content.
      windows: the number of windows or documents, read or asked for with ``--max-windows``.
      chains: the number of chains of a carried state.
      kind: the other arguments of :func:`name`.
    """
    form = re.escape(name(split, 0, **kind)).replace("-0", r"-(\d+)", 1)
    pattern = re.compile(f"{'' if source is None else '(?:.+-)?'}{form}(?:-[0-9a-f]{{8}})?")
    found = []
    for stem in stems(folder):
        match = pattern.fullmatch(stem)
        if match and context in (None, int(match[1])):
            found.append(Entry(stem, int(match[1]), _about(folder / f"{stem}.json") or {}))
    if windows is not None:
        found = [e for e in found if windows in (e.about.get("windows"), e.about.get("max_windows"))]
    if chains is not None:
        found = [entry for entry in found if entry.about.get("chains") == chains]
    return found if source is None else _of_source(found, source, split)


def stems(folder: Workdir) -> list[str]:
    """Return the NAMEs of all results in a folder."""
    with explained(folder):
        return sorted(path.name.removesuffix(".json") for path in folder.glob("*.json"))


def known_results(folder: Workdir) -> str:
    """Return the names of the results in a folder as a part of a message: "; there is validation-2048", or ""."""
    known = stems(folder)
    return f"; there {'is' if len(known) == 1 else 'are'} {first_few(known, _MOST_LISTED)}" if known else ""


def _options(by_document=False, carried=False, source=None, step=None, windows=None, chains=None) -> str:
    chosen = " --carry-state" * carried or " --by-document" * by_document
    chosen += (f" --source {shlex.quote(source)}" if source else "") + ("" if step is None else f" --step {step}")
    chosen += "" if windows is None else f" --max-windows {windows}"
    return chosen + ("" if chains is None else f" --chains {chains}")


def _of_source(found: list[Entry], source: str, split: str) -> list[Entry]:
    of_path = [entry for entry in found if _path(entry.about, split) == absolute(source)]
    if of_path:
        return of_path
    comparable = any(entry.about.get("fingerprint") for entry in found)
    fingerprint = _fingerprint(source, split) if comparable else None  # which may read from a bucket
    if fingerprint:
        return [entry for entry in found if _same_content(entry, fingerprint, source)]
    return [e for e in found if _path(e.about, split) is None and e.stem.startswith(_prefix(source))]


def _same_content(entry: Entry, fingerprint: str, source: str) -> bool:
    known = entry.about.get("fingerprint")
    return known == fingerprint if known else entry.stem.startswith(_prefix(source))


def _path(about: dict[str, Any], split: str) -> str | None:
    """Return the absolute path of the dataset of a result; None if the result does not say it."""
    if "source_path" in about:
        return about["source_path"]
    typed = str(about.get("source", "")).removesuffix(f"/{split}")  # of earlier versions
    return absolute(typed) if os.path.isabs(typed) or "://" in typed else None


def _fingerprint(source: str, split: str) -> str | None:
    """Return the fingerprint of a dataset; None if it cannot be read."""
    try:
        return named_sources.load(source, split).fingerprint()
    except (ConfigError, DataError):
        return None


def _about(path: Workdir) -> dict[str, Any] | None:
    """Return the content of a JSON file; empty if it is damaged, None if it does not exist."""
    try:
        return result_files.about(path)
    except FileNotFoundError:
        return None
    except DamagedFile:  # reading the result itself reports the damage
        return {}


def _words(about: dict[str, Any]) -> str:
    chains = f" in {about['chains']} chains" if about.get("chains") else ""
    return f"{about.get('windows')} {about.get('of', 'windows')}{chains} of {about.get('source')}"


def _prefix(source: str | None) -> str:
    return "" if source is None else re.sub(r"[^\w.]+", "_", source.rstrip("/").rpartition("/")[2]) + "-"
