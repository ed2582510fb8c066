"""Write files as a whole or line by line, on disks and in buckets."""

import os
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from ttt_jax.storage.workdir import Workdir, explained, is_local

_EVERY = 30.0  # seconds between copies
_FLUSH_LIMIT = 10.0  # seconds that a run waits for its records, no more
_CLOSE_LIMIT = 120.0
_BLOCK = 1 << 20


def write_atomically(path: Workdir, content: str | bytes) -> None:
    """Replace a file as a whole: a reader, or a crash, finds the old one or the new one."""
    data = content.encode() if isinstance(content, str) else content
    if not is_local(path):
        with explained(path):
            path.write_bytes(data)  # an object exists once all of it is written
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with explained(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def set_aside(path: Workdir) -> str:
    """Rename a file to ``NAME.damaged`` (or ``.damaged-2``, ...), so that it can be written anew; returns the name."""
    names = (f"{path.name}.damaged" + (f"-{i}" if i > 1 else "") for i in range(1, 10_000))
    aside = next(other for other in (path.with_name(name) for name in names) if not other.exists())
    with explained(path):
        path.rename(aside)
    return aside.name


class AppendedFile:
    """A file to append lines to. Nothing is buffered, so that an error names the line's own call, and closing cannot
    fail."""

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, text: str) -> None:
        """Append text; raises OSError that names the file."""
        content = memoryview(text.encode())
        with explained(self._path):
            while content:
                content = content[self._file.write(content) :]

    def flush(self) -> None:
        """Do nothing: all is written already."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class BucketFile:
    """A text file that is written on local disk, without a name, and copied as a whole in the background.

    What fails there is told on standard error and tried again with the next copy; nothing is raised.

    Args:
      path: in the bucket.
      text: to begin with.
      every: seconds; the file is copied when something is written and the last copy is older than this.
    """

    def __init__(self, path: Workdir, text: str = "", *, every: float = _EVERY):
        self._path, self._every = path, every
        self._here = tempfile.TemporaryFile()  # noqa: SIM115
        self._size = self._copied = 0  # bytes
        self._thread = ThreadPoolExecutor(1, "bucket-file")
        self._copy: Future[None] = Future()
        self._copy.set_result(None)
        self._due = time.monotonic() + every
        self._failing = False
        self._append(text)

    def write(self, text: str) -> None:
        """Appends; complete lines, as a copy may be made after each call."""
        self._append(text)
        if self._copy.done() and time.monotonic() >= self._due:
            self._begin()

    def flush(self, limit: float = _FLUSH_LIMIT) -> bool:
        """Whether all is in the bucket; waits for it, at most so many seconds."""
        end = time.monotonic() + limit
        while True:
            wait([self._copy], max(end - time.monotonic(), 0))
            if self._copied == self._size or time.monotonic() >= end:
                return self._copied == self._size
            if self._failing:
                time.sleep(min(1.0, limit / 10))
            self._begin()

    def close(self, limit: float = _CLOSE_LIMIT) -> None:
        """Flushes, and tells where that cannot be done."""
        if not self.flush(limit):
            print(f"{self._path}: the last {self._size - self._copied} bytes could not be written", file=sys.stderr)
        self._thread.shutdown(wait=False)

    def _append(self, text: str) -> None:
        content = text.encode()
        self._here.write(content)
        self._here.flush()
        self._size += len(content)

    def _begin(self) -> None:
        if self._copy.done():
            self._due = time.monotonic() + self._every
            self._copy = self._thread.submit(self._copy_first, self._size)

    def _copy_first(self, size: int) -> None:
        try:
            with explained(self._path), self._path.open("wb") as there:
                for start in range(0, size, _BLOCK):
                    there.write(os.pread(self._here.fileno(), min(_BLOCK, size - start), start))
            self._copied, self._failing = size, False
        except OSError as error:
            if not self._failing:
                print(f"cannot write {self._path}: {error}; trying again from time to time", file=sys.stderr)
            self._failing = True
