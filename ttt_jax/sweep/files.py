"""Files of many points, several read at a time, for each takes a while in a bucket; and records that are cut short."""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ttt_jax.workdir import Workdir, explained, is_local

_AT_A_TIME = 16
_TAIL = 1 << 16  # bytes: more than a hundred records

T = TypeVar("T")
R = TypeVar("R")


def on_each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``[function(item) for item in items]``, several at a time."""
    with ThreadPoolExecutor(_AT_A_TIME, "files") as pool:
        return list(pool.map(function, items))


def json_object(path: Workdir) -> dict[str, Any] | None:
    """What a file holds; None where there is none, or where it is not of JSON."""
    try:
        with explained(path):
            content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def records(path: Workdir, *, newest: bool = False) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, without lines that are cut short; none where there is no file.

    Args:
      newest: only the last ones, as many as stand in the last 64 KiB.
    """
    try:
        with explained(path):
            content = _end(path) if newest else path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in content.decode(errors="replace").split("\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


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
