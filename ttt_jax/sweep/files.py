"""Files of many points, several read at a time, for each takes a while in a bucket; and records that are cut short."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ttt_jax.storage import json_files
from ttt_jax.storage.workdir import Workdir, explained, is_local

_AT_A_TIME = 16
_TAIL = 1 << 16  # bytes: more than a hundred records

T = TypeVar("T")
R = TypeVar("R")


def on_each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``[function(item) for item in items]``, several at a time."""
    with ThreadPoolExecutor(_AT_A_TIME, "files") as pool:
        return list(pool.map(function, items))


def json_object(path: Workdir) -> dict[str, Any] | None:
    """Return what a file holds; None where there is none, or where it is damaged, which is said on standard error."""
    try:
        return json_files.read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json_files.DamagedFile as error:
        json_files.warn_once(f"{error}; passed over")
        return None


def records(path: Workdir, *, newest: bool = False) -> list[dict[str, Any]]:
    """Return the records of a ``metrics.jsonl``; none where there is no file.

    Damaged lines are named and left out, and so is a file that cannot be read.

    Args:
      newest: only the last ones, as many as stand in the last 64 KiB; damaged lines are passed over without a word.
    """
    try:
        if not newest:
            return json_files.read_lines(path).records
        with explained(path):
            return json_files.parse_lines(_end(path)).records
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (IsADirectoryError, PermissionError) as error:
        json_files.warn_once(f"{path}: cannot be read: {error.strerror}; passed over")
        return []


def written(path: Workdir) -> float | None:
    """When a file was last written, in seconds since 1970; None where there is none."""
    try:
        with explained(path):
            status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return float(getattr(status, "st_mtime" if is_local(path) else "mtime")) or None


def _end(path: Workdir) -> bytes:
    """The last bytes of a file; the first line of them may be cut short."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        return file.read()
