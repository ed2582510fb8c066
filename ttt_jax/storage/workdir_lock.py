"""One command at a time works in a folder, and others can see that it lives.

While a command holds a folder, a file in it (``running.json``) says which command, process and machine that is, since
when, and every few seconds that it lives. A holder that died on this machine is known to be dead at once; one of
another machine, once it has given no sign of life for a while. Readers do not lock.
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
from ttt_jax.storage.lock_file import BucketObject, Holder, LocalFile, parsed, started

NAME = "running.json"
_EVERY = 5.0  # seconds between signs of life
_EVERY_BUCKET = 20.0
_MISSED = 3  # so many missing ones are the end
_GRACE = 1.0  # seconds that a process which has just been killed may take to let go
_LEASE = 120.0  # seconds for which a file server may keep the lock of a machine that has died
_LETS_GO = 2.0  # seconds that an end waits for a sign of life that is being written
_CLOCKS = 120.0  # seconds by which the clocks of machines may differ


class LockLostError(Exception):
    """Another command has taken over the folder while this one gave no sign of life; it must not write on."""


class WorkdirLock:
    """The right to change what lies in a folder; a context manager.

    A forked process does not have it.

    Args:
      folder: a local one, which is made where it does not exist, or a URL.
      command: that wants it: ``ttt train``.
      name: of the lock's file in the folder.
      option: by which the folder was given, for messages.
    """

    def __init__(self, folder: str | os.PathLike, command: str, *, name: str = NAME, option: str = "--workdir"):
        self._folder, self._command, self._option = os.fspath(folder), command, option
        self._shown = f"{self._folder.rstrip('/')}/{name}"
        is_url = "://" in self._folder
        self._every = _EVERY_BUCKET if is_url else _EVERY
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._about = {"command": command, "host": socket.gethostname(), "pid": os.getpid(), "since": since}
        self._about |= {"machine": _machine(), "started": _started(), "id": uuid.uuid4().hex, "every": self._every}
        identity, here = (json.dumps(self._about[key]).encode() for key in ("id", "machine"))
        if is_url:
            self._file: BucketObject | LocalFile = BucketObject(self._folder.rstrip("/"), name, identity, here)
        else:
            self._file = LocalFile(Path(self._folder, name), identity, here, command)
        self._is_url, self._made, self._held = is_url, False, False
        self._renewing, self._end = threading.Lock(), threading.Event()
        self._lost_to: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._live, name="workdir-lock", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether another command is known to have taken over."""
        return self._lost_to is not None

    def acquire(self) -> "WorkdirLock":
        """Take the lock. Waits for a holder of whom it cannot be told whether it lives.

        Raises:
          ConfigError: where another command holds it, which is named.
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
                self._say(f"waits up to {self._patience(watched):.0f} s for a sign of life of {_who(watched)}")
            elif holder.content != watched or passed > self._patience(watched) + _LEASE:
                raise self._refused(holder)
            elif passed > self._patience(watched):
                dead = watched
            time.sleep(min(0.1 if holder.lives else 1.0, self._every / 5))
        if dead is not None:
            self._say(f"takes over from {_who(dead)}, which has given no sign of life")
        self._held = True
        self._thread.start()
        return self

    def check(self) -> None:
        """Raise :class:`LockLostError` where another command has taken over; to be called before what matters."""
        self._renew()
        if self._lost_to is not None:
            raise LockLostError(
                f"{self._option} {self._folder}: {_in_words(self._lost_to)} has taken it over, as this process gave no "
                f"sign of life or {self._shown} was deleted; stopped without writing on"
            )

    def release(self) -> None:
        """Let go of it, if it is held."""
        if not self._held or os.getpid() != self._about["pid"]:
            return
        self._end.set()
        if not self._renewing.acquire(timeout=_LETS_GO):  # storage hangs; the record will be seen to be old
            return
        self._held = False
        if not self.lost:
            self._file.release()
        self._file.close()
        self._renewing.release()
        if self._made:
            with contextlib.suppress(OSError):  # something was written
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
            except OSError:  # storage that fails for a while ends no run
                return
            if other is not None:
                self._lost_to = parsed(other) or {}

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
        age = _age(parsed(content) or {})
        return age is not None and age > self._patience(content) + _CLOCKS

    def _patience(self, content: bytes) -> float:
        return _MISSED * (_interval(parsed(content) or {}) or self._every)

    def _refused(self, holder: Holder) -> ConfigError:
        return ConfigError(
            f"{self._option} {self._folder}: {_who(holder.content)} is at work there; expected its end first. Once it "
            f"has died, the same command takes over (from another machine after {self._patience(holder.content):.0f} s "
            f"without a sign of life); to take over from one that hangs, delete {self._shown}"
        )

    def _say(self, text: str) -> None:
        print(f"{self._command}: {self._folder}: {text}", file=sys.stderr, flush=True)


def is_live(record: dict[str, Any]) -> bool:
    """Return whether the sign of life in a record is not too old; clocks of machines may differ by some seconds."""
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


def _who(content: bytes) -> str:
    return _in_words(parsed(content) or {})


def _in_words(record: dict[str, Any]) -> str:
    if "pid" not in record:
        return "another command"
    since = f", since {record['since']}" if "since" in record else ""
    return f"{record.get('command', 'another command')} (process {record['pid']} on {record.get('host')}{since})"


def _started() -> int | None:
    try:
        return started(os.getpid())
    except (OSError, ValueError, IndexError):
        return None


def _machine() -> str:
    """Return what tells apart where process numbers are counted: a machine since its start, a container in it."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
