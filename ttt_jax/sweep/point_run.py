"""One point, until it has ended: its processes one after the other, and what is written down of them."""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ttt_jax.storage.workdir import Workdir, explained, is_local
from ttt_jax.sweep import record
from ttt_jax.sweep.points import Point
from ttt_jax.sweep.process import LOG, Busy, Process, in_words
from ttt_jax.sweep.record import Record
from ttt_jax.terminal.console import duration
from ttt_jax.terminal.stopping import DONE, INTERRUPTED, RESTART

_LONGEST_PAUSE = 60.0  # seconds before a point is started again
_BUSY_PAUSE = 1.0


class PointRun:
    """Starts the process of a point, and again where it ends with status 75; nothing happens but in :meth:`poll`.

    Args:
      directory: of the sweep; the point has a folder in it.
      local: the same, or a folder of this machine for log and lock where that is in a bucket.
      command: program and arguments.
      environment: what to add to that of this process.
      cwd: where it runs; None is here.
      restarts: how often it is started again.
      tell: is given a line of text now and then.

    Attributes:
      ended: what is written down of it in the end; None so far.
    """

    def __init__(
        self,
        point: Point,
        directory: Workdir,
        local: Path,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        restarts: int = 10,
        tell: Callable[[str], None] = print,
    ):
        self._point, self._workdir, self._local = point, directory / point.name, local / point.name
        self._command, self._environment, self._cwd = command, {**os.environ, **(environment or {})}, cwd
        self._restarts, self._tell = restarts, tell
        self._process: Process | None = None
        self._record = Record(record.RUNNING, point.steps)
        self._due = 0.0  # of the monotonic clock
        self._said_busy = False
        self._stopped_as = ""
        self.ended: Record | None = None

    def poll(self) -> Record | None:
        """Does what is due: starts the process, or notes its end. Returns :attr:`ended`."""
        if self._process is not None:
            status = self._process.poll()
            if status is not None:
                self._note(self._process, status)
        elif self.ended is None and self._stopped_as:
            self._end(self._stopped_as)
        elif self.ended is None and time.monotonic() >= self._due:
            self._start()
        return self.ended

    def stop(self, number: int = signal.SIGTERM, state: str = record.STOPPED) -> None:
        """Asks the process to save and to end; the point is then in this state, unless it is done or has failed."""
        self._stopped_as = state
        if self._process is not None:
            self._process.stop(number)

    def kill(self) -> None:
        """Ends the process at once."""
        if self._process is not None:
            self._process.kill()

    def _start(self) -> None:
        try:
            self._process = Process(self._command, self._local, self._environment, self._cwd)
        except Busy as busy:
            if not self._said_busy:
                self._tell(f"{self._point.name}: waits for the end of {busy}, of an earlier sweep")
            self._said_busy, self._due = True, time.monotonic() + _BUSY_PAUSE
            return
        self._record = Record(record.RUNNING, self._point.steps, starts=self._record.starts + 1)
        self._write(self._record)
        again = f" (start {self._record.starts})" if self._record.starts > 1 else ""
        self._tell(f"{self._point.name}: started{again}; {self._local / LOG}")

    def _note(self, process: Process, status: int) -> None:
        self._process = None
        said = process.said()
        self._record = dataclasses.replace(self._record, status=status, ended=time.time())
        if status == DONE:
            self._end(record.DONE)
        elif self._stopped_as and (status in (RESTART, INTERRUPTED) or status < 0):
            self._end(self._stopped_as)
        elif status == RESTART and self._record.starts <= self._restarts:
            self._due = time.monotonic() + min(2.0 ** (self._record.starts - 1), _LONGEST_PAUSE)
            self._write(dataclasses.replace(self._record, state=record.STOPPED))
            self._tell(f"{self._point.name}: is to be started again: {said}")
        else:
            self._end(record.FAILED, said)
        self._copy_log()

    def _end(self, state: str, said: str = "") -> None:
        self.ended = dataclasses.replace(self._record, state=state, said=said)
        if not self._record.starts:
            return
        self._write(self.ended)
        took, status = duration(time.time() - self.ended.began), self.ended.status
        why = f", {in_words(status)}: {said}" if state == record.FAILED and status is not None else f", {took}"
        self._tell(f"{self._point.name}: {state}{why}")

    def _write(self, what: Record) -> None:
        """Storage that fails does not end the other points; what is not written down is done again, and found done."""
        try:
            record.write(self._workdir, what)
        except OSError as error:
            print(f"{self._workdir / record.NAME}: cannot be written: {error}", file=sys.stderr)

    def _copy_log(self) -> None:
        if is_local(self._workdir):
            return
        there = self._workdir / LOG
        try:
            with explained(there):
                there.write_bytes((self._local / LOG).read_bytes())
        except OSError as error:
            print(f"{there}: cannot be written: {error}", file=sys.stderr)
