"""Which results a run has in a folder, ``eval`` or ``inspect``, told apart by all that their numbers depend on.

A result is NAME.json beside NAME.npz and NAME.csv, and NAME is ``[SOURCE-]SPLIT[-documents][-carried]-T[-at-STEP]``,
such as ``validation-2048``. It does not say everything: which SOURCE of this name, how many windows. Where a result of
this NAME is there already, and of other tokens, the new one is ``NAME-IDENTITY``: both are kept.
"""

import hashlib
import json
import os
import re
from typing import Any, NamedTuple

from ttt_jax.data import named_sources
from ttt_jax.errors import ConfigError, DataError
from ttt_jax.evaluation import result_files
from ttt_jax.storage.json_files import DamagedFile, warn_once
from ttt_jax.storage.workdir import Workdir, explained

_MOST_LISTED = 8
_IDENTITY = ("fingerprint", "split", "of", "carried", "chains", "context", "windows")


class Entry(NamedTuple):
    """A result: its NAME, its context, and what its JSON says of it (nothing, where that is damaged)."""

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
      source: where the data is another than that of the run.
      step: where the checkpoint was asked for by its step, rather than as the newest.
    """
    kind = "-documents" * by_document + "-carried" * carried
    return f"{_prefix(source)}{split}{kind}-{context}" + ("" if step is None else f"-at-{step}")


def place(folder: Workdir, stem: str, about: dict[str, Any]) -> str:
    """Return the NAME under which a result is saved: another than ``stem`` where that one is of other tokens."""
    there = _about(folder / f"{stem}.json")
    if there and any(there[key] != about[key] for key in _IDENTITY if key in there and key in about):
        stem = f"{stem}-{short_hash([about.get(key) for key in _IDENTITY])}"
        there = _about(folder / f"{stem}.json")
    if there and there.get("step", about.get("step")) != about.get("step"):
        warn_once(f"{folder / stem}.json: in place of the result of step {there['step']}; --step keeps one of each")
    return stem


def short_hash(identity: Any) -> str:
    """Return eight hexadecimal digits that warn_once JSON from other JSON."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()


def absolute(source: str) -> str:
    """Return the path of a dataset as it is from everywhere; URLs and names such as ``embedded`` are so already."""
    return os.path.realpath(source) if os.path.isdir(source) or os.path.isabs(source) else source.rstrip("/")


def find(folder: Workdir, split: str, context: int | None = None, **kind: Any) -> Entry | None:
    """Return the one result of this kind; of the longest context that there is, where none is given; None for none.

    Args:
      kind: as of :func:`entries`.

    Raises:
      ConfigError: where there are several, with their names.
    """
    found = entries(folder, split, context, **kind)
    longest = max((entry.context for entry in found), default=None)
    found = [entry for entry in found if entry.context == longest]
    if len({entry.about.get("fingerprint") for entry in found}) > 1:
        known = kind.get("source") or found[0].about.get("source_path")
        now = _fingerprint(known, split) if known else None  # of a dataset that was made anew in its place
        found = [entry for entry in found if now and entry.about.get("fingerprint") == now] or found
    if len(found) > 1:
        listed = ", ".join(f"{entry.stem} ({_words(entry.about)})" for entry in found)
        raise ConfigError(
            f"{folder}: {len(found)} results of the {split} split with context {longest}: {listed}; expected an option "
            "that tells them apart (--max-windows, --chains, --source), or only one of these files"
        )
    return found[0] if found else None


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
    """Return the results of a kind, of one context or all.

    Args:
      source: another dataset than that of the run, by its path; where results do not know the path, or another one, by
        its content.
      windows: windows or documents that were read, or that were asked for with ``--max-windows``.
      chains: of a carried state.
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


def there_are(folder: Workdir) -> str:
    """Return which results a folder holds, as the next part of a message; empty where it holds none."""
    found = stems(folder)
    if not found:
        return ""
    more = f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    return f"; {'there is' if len(found) == 1 else 'there are'} {', '.join(found[:_MOST_LISTED])}{more}"


def _of_source(found: list[Entry], source: str, split: str) -> list[Entry]:
    at = [entry for entry in found if _path(entry.about, split) == absolute(source)]
    if at:
        return at
    known = any(entry.about.get("fingerprint") for entry in found)
    fingerprint = _fingerprint(source, split) if known else None  # a bucket is asked only where the answer counts
    if fingerprint:
        return [entry for entry in found if _same_content(entry, fingerprint, source)]
    return [e for e in found if _path(e.about, split) is None and e.stem.startswith(_prefix(source))]


def _same_content(entry: Entry, fingerprint: str, source: str) -> bool:
    there = entry.about.get("fingerprint")
    return there == fingerprint if there else entry.stem.startswith(_prefix(source))


def _path(about: dict[str, Any], split: str) -> str | None:
    """Return the path of the dataset that a result is of; None where it is not known, or only from some folder."""
    if "source_path" in about:
        return about["source_path"]
    typed = str(about.get("source", "")).removesuffix(f"/{split}")  # of earlier versions
    return absolute(typed) if os.path.isabs(typed) or "://" in typed else None


def _fingerprint(source: str, split: str) -> str | None:
    """Return the fingerprint of a dataset; None where there is none to be read."""
    try:
        return named_sources.load(source, split).fingerprint()
    except (ConfigError, DataError):
        return None


def _about(path: Workdir) -> dict[str, Any] | None:
    """Return what a JSON file says; nothing where it is damaged, None where it is not there."""
    try:
        return result_files.about(path)
    except FileNotFoundError:
        return None
    except DamagedFile:  # whoever reads this result tells
        return {}


def _words(about: dict[str, Any]) -> str:
    chains = f" in {about['chains']} chains" if about.get("chains") else ""
    return f"{about.get('windows')} {about.get('of', 'windows')}{chains} of {about.get('source')}"


def _prefix(source: str | None) -> str:
    return "" if source is None else re.sub(r"[^\w.]+", "_", source.rstrip("/").rpartition("/")[2]) + "-"
