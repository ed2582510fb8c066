"""Write files as a whole or line by line, on disks and in buckets."""

import os
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from ttt_jax.storage.workdir import Workdir, explained, is_local

_EVERY = 30.0  # seconds between copies
_FLUSH_LIMIT = 10.0  # seconds that a run waits for its records at most
_CLOSE_LIMIT = 120.0
_BLOCK = 1 << 20


def write_atomically(path: Workdir, content: str | bytes) -> None:
    """Replace a file as a whole: a reader, or a restart after a crash, finds the old content or the new one."""
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


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file that the user named, and its folders: as a whole, but in place where it is not a regular file.

    So ``/dev/stdout`` and named pipes may be given, and a link keeps pointing at its file.
    """
    target = path.resolve()
    with explained(path):
        if path.exists() and not path.is_file():  # the target of a link to an open pipe has no path
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, content)


def set_aside(path: Workdir) -> str:
    """Rename a damaged file to ``NAME.damaged``, or ``.damaged-2`` and so on, and return its new name."""
    names = (f"{path.name}.damaged" + (f"-{i}" if i > 1 else "") for i in range(1, 10_000))
    aside = next(other for other in map(path.with_name, names) if not other.exists())
    with explained(path):
        path.rename(aside)
    return aside.name


class AppendedFile:
    """A file to append text to.

    Nothing is buffered, so that the call that cannot write its text is the one that fails.
    """

    def __init__(self, path: Path):
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, text: str) -> None:
        """Append text; raise an OSError that names the file where that fails."""
        content = memoryview(text.encode())
        with explained(self._path):
            while content:
                content = content[self._file.write(content) :]

    def flush(self) -> None:
        """Do nothing, as every text is written at once."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class BucketFile:
    """A file in a bucket to append text to, although objects in buckets cannot be appended to.

    The text is kept in a temporary file on local disk, which is copied as a whole in the background. A copy that fails
    is reported on standard error and made again later; nothing is raised.

    Args:
      path: the file in the bucket.
      text: its first content.
      every: seconds; a write starts a copy if the last copy is older than this.
    """

    def __init__(self, path: Workdir, text: str = "", *, every: float = _EVERY):
        self._path, self._every = path, every
        self._local = tempfile.TemporaryFile()  # noqa: SIM115
        self._size = self._copied = 0  # bytes
        self._thread = ThreadPoolExecutor(1, "bucket-file")
        self._copy: Future[None] = Future()
        self._copy.set_result(None)
        self._due = time.monotonic() + every
        self._failing = False
        self._append(text)

    def write(self, text: str) -> None:
        """Append complete lines: a copy may be made after each call."""
        self._append(text)
        if self._copy.done() and time.monotonic() >= self._due:
            self._begin()

    def flush(self, limit: float = _FLUSH_LIMIT) -> bool:
        """Wait, for at most so many seconds, until all text is in the bucket; return whether it is."""
        end = time.monotonic() + limit
        while True:
            wait([self._copy], max(end - time.monotonic(), 0))
            if self._copied == self._size or time.monotonic() >= end:
                return self._copied == self._size
            if self._failing:
                time.sleep(min(1.0, limit / 10))
            self._begin()

    def close(self, limit: float = _CLOSE_LIMIT) -> None:
        """Flush, and report on standard error what could not be written."""
        if not self.flush(limit):
            print(f"{self._path}: the last {self._size - self._copied} bytes could not be written", file=sys.stderr)
        self._thread.shutdown(wait=False)

    def _append(self, text: str) -> None:
        content = text.encode()
        self._local.write(content)
        self._local.flush()
        self._size += len(content)

    def _begin(self) -> None:
        if self._copy.done():
            self._due = time.monotonic() + self._every
            self._copy = self._thread.submit(self._copy_bytes, self._size)

    def _copy_bytes(self, size: int) -> None:
        try:
            with explained(self._path), self._path.open("wb") as copy:
                for start in range(0, size, _BLOCK):
                    copy.write(os.pread(self._local.fileno(), min(_BLOCK, size - start), start))
            self._copied, self._failing = size, False
        except OSError as error:
            if not self._failing:
                print(f"cannot write {self._path}: {error}; trying again from time to time", file=sys.stderr)
            self._failing = True
