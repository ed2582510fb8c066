"""Write and check the checksums of a folder's files.

Arrays on disk carry no checksum of their own: a flipped bit in one would be read as another number. So the sizes and
checksums (CRC-32) of all files lie beside them in ``checksums.json``.
"""

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ttt_jax.storage.workdir import Workdir

NAME = "checksums.json"
_BLOCK = 1 << 22  # bytes read at once
_THREADS = 8


def write(folder: Workdir, subfolders: Iterable[str]) -> None:
    """Write the sizes and checksums of all files in ``subfolders`` of a folder."""
    paths = [path for name in subfolders for path in _files(folder / name)]
    names = [os.fspath(path.relative_to(folder)) for path in paths]
    with ThreadPoolExecutor(_THREADS) as threads:
        files = dict(zip(names, threads.map(_size_and_checksum, paths), strict=True))
    (folder / NAME).write_text(json.dumps({"algorithm": "crc32", "files": files}))


def first_difference(
    folder: Workdir, part: int = 0, parts: int = 1, *, names: Sequence[str] | None = None
) -> str | None:
    """Return what is wrong with one of the files; None where all are as written, or no checksums were written.

    Args:
      part: which of ``parts`` shares of the files to check.
      names: the files to check; None for all.

    Raises:
      OSError: where a file exists but cannot be read.
    """
    try:
        text = (folder / NAME).read_text()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        return f"{NAME} is damaged"
    try:
        files = json.loads(text)["files"]
        if names is not None:
            files = {name: files[name] for name in names}
        shares = sorted(files, key=lambda name: -files[name][0])[part::parts]
    except (ValueError, LookupError, TypeError):
        return f"{NAME} is damaged"
    with ThreadPoolExecutor(_THREADS) as threads:
        problems = threads.map(lambda name: _difference(folder / name, files[name]), shares)
        return next((f"{name} {problem}" for name, problem in zip(shares, problems, strict=True) if problem), None)


def _difference(path: Workdir, expected: list[int]) -> str | None:
    try:
        actual = _size_and_checksum(path)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    if actual[0] != expected[0]:
        return f"has {actual[0]} bytes instead of {expected[0]}"
    return None if actual == expected else "is damaged (its checksum differs)"


def _size_and_checksum(path: Workdir) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _files(folder: Any) -> list[Workdir]:
    files: list[Workdir] = []
    for path in sorted(folder.iterdir()):
        files += _files(path) if path.is_dir() else [path]
    return files
