"""The process of a point: its output in a file, one at a time in its folder, and gone when the sweep is gone."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ttt_jax.storage.lock_file import NO_LOCKS
from ttt_jax.sweep import supervisor

LOG = "output.log"
_LOCK = "process.lock"
_TAIL = 1 << 14  # bytes


class Busy(Exception):
    """A process of an earlier sweep is still at work on the point; the text says which."""


class Process:
    """Starts the command of a point.

    The process holds a lock on the folder for as long as it lives, whatever becomes of the sweep. It is a session of
    its own, so that Ctrl-C reaches it through the sweep alone.

    Args:
      command: program and arguments.
      folder: a local one, for the log and the lock.
      environment: of the process.
      cwd: where it runs; None is here.

    Raises:
      Busy: where such a process lives already.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str] = os.environ, cwd: Path | None = None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / LOG
        with (folder / _LOCK).open("a+") as lock, self._log.open("ab") as output:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if isinstance(error, BlockingIOError):
                    lock.seek(0)
                    raise Busy(lock.read().strip() or "another process") from None
                if error.errno not in NO_LOCKS:  # without them, ttt train's own record in the folder is enough
                    raise
            self._start = output.seek(0, os.SEEK_END)
            self._pipe: int | None
            read, self._pipe = os.pipe()  # the other side knows by it that this process has died
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(read), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=cwd,
                pass_fds=[read, lock.fileno()],
                start_new_session=True,
            )
            os.close(read)
            lock.truncate(0)
            lock.write(f"process {self._process.pid} on {socket.gethostname()}\n")

    def poll(self) -> int | None:
        """The exit status, once there is one."""
        status = self._process.poll()
        if status is not None and self._pipe is not None:
            os.close(self._pipe)
            self._pipe = None
        return status

    def stop(self, number: int) -> None:
        """Asks it to stop; it saves first."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end; raises :class:`subprocess.TimeoutExpired`."""
        self._process.wait(timeout)
        status = self.poll()
        assert status is not None
        return status

    def kill(self) -> None:
        """Ends it at once, with all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.wait()

    def said(self) -> str:
        """What it ended with: the last line of its own in the output, or the last line of all."""
        return last_line(self._log, self._start)


def last_line(log: Path, start: int = 0) -> str:
    """The last line of a log that ``ttt`` itself wrote, or the last of all; empty where nothing was written.

    Args:
      start: bytes from the beginning that are older, and do not count.
    """
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _TAIL))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    own = [line for line in lines if re.match(r"ttt \w+: ", line)]
    return (own or lines or [""])[-1]


def in_words(status: int) -> str:
    """An exit status, or the signal that ended a process."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
