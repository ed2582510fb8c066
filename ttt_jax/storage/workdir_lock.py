"""Let one command at a time change a folder, and show others that it is alive.

While a command holds a folder, a file in it (``running.json``) names the command, its process and machine and when it
began, and is renewed every few seconds. A holder on this machine is known to be dead as soon as it dies; a holder on
another machine, once it has not renewed the file for a while. Readers do not lock.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ttt_jax.errors import ConfigError
from ttt_jax.storage.lock_file import BucketLock, Holder, LocalLock, parse_record, process_start

NAME = "running.json"
_EVERY = 5.0  # seconds between signs of life
_EVERY_BUCKET = 20.0
_MISSED = 3  # missing signs of life after which a holder counts as dead
_GRACE = 1.0  # seconds that a process which has just been killed may take to release the lock
_LEASE = 120.0  # seconds for which a file server may keep the lock of a machine that has died
_RELEASE_LIMIT = 2.0  # seconds that a release waits for a sign of life that is being written
_CLOCKS = 120.0  # seconds by which the clocks of machines may differ


class LockLostError(Exception):
    """Another command has taken over the folder, because this one gave no sign of life; this one must stop writing."""


class WorkdirLock:
    """A context manager that holds the right to change the files of a folder.

    A process that is forked meanwhile does not have this right.

    Args:
      folder: a local folder, which is made where it does not exist, or a URL.
      command: the command that wants the lock, such as ``ttt train``.
      name: the name of the lock's file in the folder.
      option: the option that named the folder, for messages.
    """

    def __init__(self, folder: str | os.PathLike, command: str, *, name: str = NAME, option: str = "--workdir"):
        self._folder, self._command, self._option = os.fspath(folder), command, option
        self._shown = f"{self._folder.rstrip('/')}/{name}"
        is_url = "://" in self._folder
        self._every = _EVERY_BUCKET if is_url else _EVERY
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._about = {"command": command, "host": socket.gethostname(), "pid": os.getpid(), "since": since}
        self._about |= {"machine": _machine(), "started": _started(), "id": uuid.uuid4().hex, "every": self._every}
        identity, machine = (json.dumps(self._about[key]).encode() for key in ("id", "machine"))
        if is_url:
            self._file: BucketLock | LocalLock = BucketLock(self._folder.rstrip("/"), name, identity, machine)
        else:
            self._file = LocalLock(Path(self._folder, name), identity, machine, command)
        self._is_url, self._made, self._held = is_url, False, False
        self._renewing, self._end = threading.Lock(), threading.Event()
        self._lost_to: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._live, name="workdir-lock", daemon=True)

    @property
    def lost(self) -> bool:
        """Return whether another command is known to have taken over."""
        return self._lost_to is not None

    def acquire(self) -> "WorkdirLock":
        """Take the lock, after a wait for signs of life where its holder may have died.

        Raises:
          ConfigError: where another command holds the lock; names that command.
          OSError: where the lock's file cannot be written.
        """
        self._make_folder()
        began = time.monotonic()
        watched: bytes | None = None
        dead: bytes | None = None
        while (holder := self._file.take(self._record(), dead)) is not None:
            passed = time.monotonic() - began
            if holder.lives:
                if passed > _GRACE:
                    raise self._refused(holder)
            elif watched is None:
                watched, began = holder.content, time.monotonic()
                if self._is_old(watched):
                    dead = watched
                    continue
                self._say(
                    f"waits up to {self._patience(watched):.0f} s for a sign of life of {_describe_content(watched)}"
                )
            elif holder.content != watched or passed > self._patience(watched) + _LEASE:
                raise self._refused(holder)
            elif passed > self._patience(watched):
                dead = watched
            time.sleep(min(0.1 if holder.lives else 1.0, self._every / 5))
        if dead is not None:
            self._say(f"takes over from {_describe_content(dead)}, which has given no sign of life")
        self._held = True
        self._thread.start()
        return self

    def check(self) -> None:
        """Raise :class:`LockLostError` where another command has taken over. Call it before important writes."""
        self._renew()
        if self._lost_to is not None:
            raise LockLostError(
                f"{self._option} {self._folder}: {_describe(self._lost_to)} has taken it over, as this process gave no "
                f"sign of life or {self._shown} was deleted; stopped without writing on"
            )

    def release(self) -> None:
        """Release the lock, if it is held."""
        if not self._held or os.getpid() != self._about["pid"]:
            return
        self._end.set()
        if not self._renewing.acquire(timeout=_RELEASE_LIMIT):  # storage hangs: others will find an old record
            return
        self._held = False
        if not self.lost:
            self._file.release()
        self._file.close()
        self._renewing.release()
        if self._made:
            with contextlib.suppress(OSError):  # the folder is not empty
                os.rmdir(self._folder)

    def __enter__(self) -> "WorkdirLock":
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    def _live(self) -> None:
        while not self._end.wait(self._every) and not self.lost:
            self._renew()

    def _renew(self) -> None:
        if os.getpid() != self._about["pid"]:
            return
        with self._renewing:
            if not self._held or self.lost:
                return
            try:
                other = self._file.renew(self._record())
            except OSError:  # storage that fails for a while does not end a run
                return
            if other is not None:
                self._lost_to = parse_record(other) or {}

    def _record(self) -> bytes:
        return json.dumps({**self._about, "time": time.time()}).encode()

    def _make_folder(self) -> None:
        if not self._is_url and not os.path.isdir(self._folder):
            try:
                os.makedirs(self._folder, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise ConfigError(f"{self._option} {self._folder}: is not a folder; expected one") from error
            self._made = True

    def _is_old(self, content: bytes) -> bool:
        age = _age(parse_record(content) or {})
        return age is not None and age > self._patience(content) + _CLOCKS

    def _patience(self, content: bytes) -> float:
        return _MISSED * (_interval(parse_record(content) or {}) or self._every)

    def _refused(self, holder: Holder) -> ConfigError:
        who, patience = _describe_content(holder.content), self._patience(holder.content)
        return ConfigError(
            f"{self._option} {self._folder}: {who} is at work there; expected its end first. Once it has died, the "
            f"same command takes over (from another machine after {patience:.0f} s without a sign of life); to take "
            f"over from one that hangs, delete {self._shown}"
        )

    def _say(self, text: str) -> None:
        print(f"{self._command}: {self._folder}: {text}", file=sys.stderr, flush=True)


def is_live(record: dict[str, Any]) -> bool:
    """Return whether the sign of life in a record is recent. Clocks of machines may differ by some seconds."""
    age, every = _age(record), _interval(record)
    return age is not None and every is not None and age < _MISSED * every


def _age(record: dict[str, Any]) -> float | None:
    try:
        return time.time() - float(record["time"])
    except (KeyError, TypeError, ValueError):
        return None


def _interval(record: dict[str, Any]) -> float | None:
    try:
        return min(max(float(record["every"]), 0.1), 60.0)
    except (KeyError, TypeError, ValueError):
        return None


def _describe_content(content: bytes) -> str:
    return _describe(parse_record(content) or {})


def _describe(record: dict[str, Any]) -> str:
    if "pid" not in record:
        return "another command"
    since = f", since {record['since']}" if "since" in record else ""
    return f"{record.get('command', 'another command')} (process {record['pid']} on {record.get('host')}{since})"


def _started() -> int | None:
    try:
        return process_start(os.getpid())
    except (OSError, ValueError, IndexError):
        return None


def _machine() -> str:
    """Return an identity of the space of process numbers: this machine since its start, or a container on it."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
