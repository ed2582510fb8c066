"""Keep the results of an unfinished evaluation on disk, so that it resumes where it was stopped."""

import io
import json
import math
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ttt_jax.evaluation.catalogue import short_hash
from ttt_jax.storage import json_files
from ttt_jax.storage.workdir import Workdir, explained, is_local
from ttt_jax.storage.writing import write_atomically

_SECONDS_BETWEEN_PARTS = 10.0
_PLAN = "plan.json"  # the identity of the evaluation


class PartialResults:
    """The arrays that an evaluation has computed so far, in order, in a folder that :meth:`remove` deletes.

    Args:
      folder: where the arrays are; the files of another evaluation in it are removed.
      identity: JSON that contains everything the arrays depend on.
      lengths: of all arrays of the finished evaluation.
      check: called before a file is written; raises if none may be written.
    """

    def __init__(
        self,
        folder: Workdir,
        identity: dict[str, Any],
        lengths: Sequence[int],
        check: Callable[[], None] = lambda: None,
    ):
        self._check = check
        self._folder, self._identity, self._lengths = folder, json.loads(json.dumps(identity)), lengths
        self._waiting: list[np.ndarray] = []
        self._written, self._clock = 0, -math.inf  # write the first array at once

    def restore(self) -> list[np.ndarray]:
        """Return the arrays on disk, up to the first damaged one."""
        found: list[np.ndarray] = []
        with explained(self._folder):
            if self._has_same_identity():
                for path in sorted(self._folder.glob("*.npy")):
                    found += self._read(path, len(found))
            else:
                self.remove()
        self._written = len(found)
        return found

    def add(self, array: np.ndarray) -> None:
        """Add the next array; write it within some seconds."""
        self._waiting.append(array)
        if time.monotonic() - self._clock > _SECONDS_BETWEEN_PARTS:
            self.flush()

    def flush(self) -> None:
        """Write the arrays that are not on disk yet."""
        if not self._waiting:
            return
        self._check()
        content = io.BytesIO()
        np.save(content, np.concatenate(self._waiting), allow_pickle=False)
        crc = zlib.crc32(content.getvalue())
        name = f"{self._written:08}-{self._written + len(self._waiting):08}-{crc:08x}.npy"
        with explained(self._folder):
            if is_local(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
            if not self._written:
                json_files.write_object(self._folder / _PLAN, self._identity)
            write_atomically(self._folder / name, content.getvalue())
        self._written += len(self._waiting)
        self._waiting, self._clock = [], time.monotonic()

    def remove(self) -> None:
        """Remove the folder."""
        with explained(self._folder):
            if self._folder.is_dir():
                for path in self._folder.glob("*"):
                    path.unlink()
                if is_local(self._folder):  # in a bucket, the folder vanishes with its last file
                    self._folder.rmdir()

    def _has_same_identity(self) -> bool:
        path = self._folder / _PLAN
        try:
            if json_files.read_object(path) == self._identity:
                return True
            problem = f"{path}: is of another evaluation, such as one of an earlier checkpoint"
        except (FileNotFoundError, NotADirectoryError):
            return False
        except json_files.DamagedFile as error:
            problem = str(error)
        json_files.warn_once(f"{problem}; this evaluation begins anew")
        return False

    def _read(self, path: Workdir, first: int) -> Iterator[np.ndarray]:
        """Yield the arrays of one file, if it is the next one and whole."""
        match = re.fullmatch(r"(\d{8})-(\d{8})(?:-([0-9a-f]{8}))?", path.stem)  # earlier versions wrote no checksum
        if match is None or int(match[1]) != first:
            return
        lengths, content = self._lengths[first : int(match[2])], path.read_bytes()
        try:
            array = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError):
            array = np.empty(0)
        if array.shape != (sum(lengths),) or (match[3] and int(match[3], 16) != zlib.crc32(content)):
            json_files.warn_once(f"{path}: damaged; its losses, and those after them, are computed again")
            return
        yield from np.split(array, np.cumsum(lengths)[:-1])


def folder(parent: Workdir, name: str, identity: dict[str, Any], of_tokens: Sequence[str]) -> Workdir:
    """Return the folder of an unfinished evaluation: ``.NAME.unfinished``, or ``.NAME-HASH.unfinished``.

    Args:
      identity: as of :class:`PartialResults`.
      of_tokens: keys of the identity. If ``.NAME.unfinished`` is of an evaluation that differs in one of them, it is
        kept, and the other folder is used.
    """
    plain = parent / f".{name}.unfinished"
    own = parent / f".{name}-{short_hash([identity[key] for key in of_tokens])}.unfinished"
    with explained(parent):
        if own.is_dir():
            return own
        try:
            present = json_files.read_object(plain / _PLAN)
            return plain if all(present[key] == identity[key] for key in of_tokens) else own
        except (OSError, json_files.DamagedFile, KeyError):
            return plain
