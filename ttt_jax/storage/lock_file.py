"""Create, renew and remove the record by which one command holds a folder, in a file or in an object of a bucket.

In a local folder the holder also has the kernel's lock on the file, which ends with the process. Where the file system
has no locks, and in a bucket, the record alone counts: its holder renews it every few seconds.
"""

import contextlib
import errno
import fcntl
import json
import os
import sys
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_WRITING = (errno.EROFS, errno.EACCES, errno.EPERM)
_SETTLES = 0.3  # seconds after which, of two processes that wrote a record at the same time, one finds the other's
_SIZE = 512  # bytes of a record in a file, which is renewed in place
_ANSWER = 60.0  # seconds within which a bucket must answer


class Holder(NamedTuple):
    """The holder of a lock.

    Attributes:
      content: its record, as it was read.
      lives: whether its process is known to be alive; if false, it may have died.
    """

    content: bytes
    lives: bool


class LocalLock:
    """A lock file in a local folder.

    Args:
      path: the file.
      identity: bytes that all records of this holder contain, and no others.
      machine: bytes that all records of processes on this machine contain, and no others.
      command: the command that wants the lock, for messages.
    """

    def __init__(self, path: Path, identity: bytes, machine: bytes, command: str):
        self._path, self._identity, self._machine, self._command = path, identity, machine, command
        self._file: int | None = None
        self._has_locks = True
        _open_files.add(self)

    def take(self, record: bytes, dead: bytes | None) -> Holder | None:
        """Take the lock and return None, or return its holder. A record equal to ``dead`` is replaced."""
        while True:
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                if error.errno not in _NO_WRITING or self._path.exists():
                    raise
                self._say(f"cannot be written to ({error.strerror}); continues without a lock")
                return None
            try:
                holder = self._take(file, record, dead)
            except BaseException:
                os.close(file)
                raise
            if holder is None and self._is(file):
                self._file = file
                return None
            os.close(file)
            if holder is not None:
                return holder
            # The last holder has removed the file since it was opened: try again.

    def renew(self, record: bytes) -> bytes | None:
        """Write the record again and return None, or return the record of another holder that has replaced it."""
        if self._file is None:  # nothing can be written, or this process was forked
            return None
        if not self._path.exists():
            return b""
        content = self._path.read_bytes()
        if self._identity not in content or not self._is(self._file):
            return content
        self._write(self._file, record)
        return None

    def release(self) -> None:
        """Remove the file if it is still this holder's."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            if self._is(self._file) and self._identity in self._path.read_bytes():
                self._path.unlink()

    def close(self) -> None:
        """Close the file, without removing it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _take(self, file: int, record: bytes, dead: bytes | None) -> Holder | None:
        try:
            self._lock(file)
        except BlockingIOError:  # the holder may be another machine, on some network file systems, and have died
            content = _read(file)
            return Holder(content, lives=self._machine in content)
        content = _read(file)
        if content and content != dead and not self._is_over(content):
            return Holder(content, lives=_lives(content, self._machine) is True)
        if not self._is(file):
            return None
        self._write(file, record)
        if not self._has_locks:
            time.sleep(_SETTLES)
            content = _read(file)
        return None if self._has_locks or self._identity in content else Holder(content, lives=False)

    def _lock(self, file: int) -> None:
        if not self._has_locks:
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            self._has_locks = False
            self._say(
                f"its file system has no locks ({error.strerror}); other commands know by the signs of life in "
                f"{self._path.name} alone that this one works there"
            )

    def _write(self, file: int, record: bytes) -> None:
        content = record.ljust(_SIZE - 1) + b"\n"
        try:
            os.pwrite(file, content, 0)
            os.ftruncate(file, len(content))
            os.fsync(file)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self._path)) from error

    def _say(self, text: str) -> None:
        print(f"{self._command}: {self._path.parent}: {text}", file=sys.stderr, flush=True)

    def _is(self, file: int) -> bool:
        """Return whether the path still names this open file."""
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except FileNotFoundError:
            return False

    def _is_over(self, content: bytes) -> bool:
        """Return whether the holder that wrote a record is known to have ended."""
        if self._has_locks:  # this process has the kernel's lock, so no other process of this machine has it
            return parse_record(content) is None or self._machine in content
        return _lives(content, self._machine) is False


class BucketLock:
    """A lock in a bucket: an object that is changed only on condition that nobody else has changed it.

    Args:
      url: the folder.
      name: the name of the object in the folder.
      identity: as for :class:`LocalLock`.
      machine: as for :class:`LocalLock`.
    """

    def __init__(self, url: str, name: str, identity: bytes, machine: bytes):
        self._url, self._name, self._identity, self._machine = url, name, identity, machine
        self._store: Any = None
        self._generation = b""

    def take(self, record: bytes, dead: bytes | None) -> Holder | None:
        """Take the lock and return None, or return its holder. A record equal to ``dead`` is replaced."""
        with self._explained():
            current = self._read()
            content = bytes(current.value)
            lives = _lives(content, self._machine)
            if current.state != "missing" and content != dead and lives is not False:
                return Holder(content, lives is True)
            return None if self._replace(record, current.stamp.generation) else Holder(self._content(), lives=False)

    def renew(self, record: bytes) -> bytes | None:
        """Write the record again and return None, or return the record of another holder that has replaced it."""
        with self._explained():
            return None if self._replace(record, self._generation) else self._content()

    def release(self) -> None:
        """Delete the object if it is still this holder's."""
        with contextlib.suppress(OSError), self._explained():
            self._store.write(self._name, None, if_equal=self._generation).result(timeout=_ANSWER)

    def close(self) -> None:
        """Do nothing, as no file is open."""

    def _replace(self, record: bytes, generation: bytes) -> bool:
        written = self._store.write(self._name, record, if_equal=generation).result(timeout=_ANSWER)
        if written.generation:
            self._generation = written.generation
            return True
        current = self._read()  # the answer to a write may have been lost, and the write repeated
        if self._identity not in bytes(current.value):
            return False
        self._generation = current.stamp.generation
        return True

    def _content(self) -> bytes:
        return bytes(self._read().value)

    def _read(self) -> Any:
        if self._store is None:
            import tensorstore as ts

            self._store = ts.KvStore.open(f"{self._url.rstrip('/')}/").result()
        return self._store.read(self._name).result(timeout=_ANSWER)

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except (ValueError, OSError, NotImplementedError, RuntimeError) as error:
            reason = str(error).split(" [tensorstore_spec")[0].split(" [source locations")[0]
            raise OSError(f"cannot lock {self._url}/{self._name}: {' '.join(reason.split())}") from error


def parse_record(content: bytes) -> dict[str, Any] | None:
    """Return the content of a record; None where it is damaged."""
    try:
        record = json.loads(content)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def process_start(pid: int) -> int | None:
    """Return when a process of this machine began, in clock ticks since the machine's start; None if it ended.

    This tells a process from a later one with the same number.
    """
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(numbers[18])


def _lives(content: bytes, machine: bytes) -> bool | None:
    """Return whether the process of a record is alive; None where this machine cannot know."""
    record = parse_record(content)
    if record is None or machine not in content or not isinstance(record.get("pid"), int):
        return None
    try:
        return process_start(record["pid"]) == record.get("started") is not None
    except (OSError, ValueError, IndexError):  # a system without /proc, or with another format
        return None


def _read(file: int) -> bytes:
    return os.pread(file, 1 << 16, 0)


_open_files: weakref.WeakSet[LocalLock] = weakref.WeakSet()


def _close_in_child() -> None:
    """Close lock files in a forked process, which would otherwise hold the lock when its parent has ended."""
    for each in list(_open_files):
        each.close()


os.register_at_fork(after_in_child=_close_in_child)
