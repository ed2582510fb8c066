"""Who works on a sweep: one command at a time in a folder, and others can see that it lives."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from ttt_jax.config import ConfigError
from ttt_jax.sweep.files import json_object
from ttt_jax.training.metrics import write_atomically
from ttt_jax.workdir import Workdir, is_local

NAME = "running.json"
_LOCK = "sweep.lock"
_EVERY = 5.0  # seconds between signs of life; in a bucket
_EVERY_BUCKET = 20.0
_MISSED = 3  # so many of them are the end


class Presence:
    """While it is entered, this is the one command that works on a sweep.

    Another one on this machine is known by a lock, one on another machine by ``running.json``, which says every few
    seconds that it lives. Of one that was killed, nothing is left: after some seconds without a sign it is forgotten.

    Args:
      directory: of the sweep.
      local: a folder of this machine that belongs to the sweep.
    """

    def __init__(self, directory: Workdir, local: Path):
        self._path, self._local = directory / NAME, local
        self._every = interval(directory)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="presence", daemon=True)
        self._sign = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex, "every": self._every}

    def __enter__(self) -> "Presence":
        self._local.mkdir(parents=True, exist_ok=True)
        self._lock = (self._local / _LOCK).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_others()
        except BaseException as error:
            self._lock.close()
            if isinstance(error, BlockingIOError):
                raise ConfigError(f"--workdir {self._path.parent}: {_at_work(json_object(self._path))}") from None
            raise
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # it will be seen to be old
            self._path.unlink(missing_ok=True)
        self._lock.close()

    def _check_others(self) -> None:
        other = json_object(self._path)
        if other is None or other.get("host") == self._sign["host"]:
            return  # of this machine, it would hold the lock
        seen, began = other.get("time"), time.monotonic()
        if not is_live(other):
            return
        while time.monotonic() - began < _MISSED * self._every:
            time.sleep(min(1.0, self._every))
            other = json_object(self._path)
            if other is None:
                return
            if other.get("time") != seen:
                raise ConfigError(f"--workdir {self._path.parent}: {_at_work(other)}")

    def _live(self) -> None:
        while not self._end.wait(self._every):
            self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # storage that fails for a while ends no run
            write_atomically(self._path, json.dumps({**self._sign, "time": time.time()}) + "\n")


def interval(directory: Workdir) -> float:
    """Seconds between signs of life."""
    return _EVERY if is_local(directory) else _EVERY_BUCKET


def lives(directory: Workdir) -> bool:
    """Whether a command works on the sweep, as far as can be seen from here."""
    sign = json_object(directory / NAME)
    return sign is not None and is_live(sign)


def is_live(sign: dict) -> bool:
    """Whether a sign of life is not too old; clocks of machines may differ by some seconds."""
    try:
        return time.time() - float(sign["time"]) < _MISSED * float(sign["every"])
    except (KeyError, TypeError, ValueError):
        return False


def _at_work(sign: dict | None) -> str:
    who = f" (process {sign.get('pid')} on {sign.get('host')})" if sign else ""
    return f"another ttt sweep{who} works on it; expected its end first"
