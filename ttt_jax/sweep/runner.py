"""Runs the points of a sweep as processes of this machine, some at a time, and writes down how each of them ends."""

import collections
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ttt_jax.exit_status import DONE, INTERRUPTED, RESTART
from ttt_jax.status_line import duration
from ttt_jax.stop_signals import StopSignals
from ttt_jax.sweep import record
from ttt_jax.sweep.points import Point
from ttt_jax.sweep.process import LOG, Busy, Process, in_words
from ttt_jax.sweep.record import Record
from ttt_jax.workdir import Workdir, explained, is_local

_POLL = 0.1  # seconds
_LONGEST_PAUSE = 60.0  # seconds before a point is started again


@dataclasses.dataclass
class _Attempt:
    """A point that waits for a process, or has one."""

    point: Point
    starts: int = 0
    due: float = 0.0  # of the monotonic clock
    said_busy: bool = False


@dataclasses.dataclass
class _Running:
    attempt: _Attempt
    process: Process
    record: Record


class Runner:
    """Runs points.

    Args:
      directory: of the sweep; each point has a folder in it.
      local: the same, or a folder of this machine for logs and locks where that is in a bucket.
      command: program and arguments of a point.
      environments: what to add to the environment of each of the processes that run at a time.
      restarts: how often a point is started again that ends with status 75.
      tell: is given a line of text now and then.
    """

    def __init__(
        self,
        directory: Workdir,
        local: Path,
        command: Callable[[Point], Sequence[str]],
        *,
        environments: Sequence[Mapping[str, str]] = ({},),
        restarts: int = 10,
        tell: Callable[[str], None] = print,
    ):
        self._directory, self._local, self._command = directory, local, command
        self._environments, self._restarts, self._tell = environments, restarts, tell
        self._running: dict[int, _Running] = {}  # by place in environments

    def run(self, points: Sequence[Point]) -> signal.Signals | None:
        """Runs them all; returns the signal that stopped it, if one did.

        The first SIGINT or SIGTERM is passed on to the points, which save; the second one ends all at once.
        """
        waiting = collections.deque(_Attempt(point) for point in points)
        passed_on = False
        with StopSignals() as stop:
            try:
                while (waiting and not stop.received) or self._running:
                    if stop.received and not passed_on:
                        passed_on = True
                        self._pass_on(stop.received)
                    for place in [place for place in range(len(self._environments)) if place not in self._running]:
                        if not stop.received:
                            self._start_next(place, waiting)
                    for place, running in list(self._running.items()):
                        status = running.process.poll()
                        if status is not None:
                            del self._running[place]
                            self._ended(running, status, waiting, stopping=stop.received is not None)
                    time.sleep(_POLL)
            finally:
                for running in self._running.values():
                    running.process.kill()
        return stop.received

    def _start_next(self, place: int, waiting: collections.deque[_Attempt]) -> None:
        """Starts the first of those that may be started."""
        for attempt in list(waiting):
            if attempt.due > time.monotonic():
                continue
            point = attempt.point
            try:
                process = Process(
                    self._command(point), self._local / point.name, {**os.environ, **self._environments[place]}
                )
            except Busy as busy:
                if not attempt.said_busy:
                    self._tell(f"{point.name}: waits for the end of {busy}, of an earlier sweep")
                attempt.said_busy, attempt.due = True, time.monotonic() + 1.0
                continue
            waiting.remove(attempt)
            attempt.starts += 1
            began = Record(record.RUNNING, point.steps, starts=attempt.starts)
            self._running[place] = _Running(attempt, process, began)
            self._write(point, began)
            again = f" (start {attempt.starts})" if attempt.starts > 1 else ""
            self._tell(f"{point.name}: started{again}; {self._local / point.name / LOG}")
            return

    def _ended(self, running: _Running, status: int, waiting: collections.deque[_Attempt], *, stopping: bool) -> None:
        attempt, point = running.attempt, running.attempt.point
        ended = dataclasses.replace(running.record, status=status, ended=time.time())
        took = duration(time.time() - ended.began)
        stopped = stopping and (status in (RESTART, INTERRUPTED) or status < 0)
        if status == DONE:
            ended = dataclasses.replace(ended, state=record.DONE)
            self._tell(f"{point.name}: done, {took}")
        elif stopped:
            ended = dataclasses.replace(ended, state=record.STOPPED)
            self._tell(f"{point.name}: stopped")
        elif status == RESTART and attempt.starts <= self._restarts:
            ended = dataclasses.replace(ended, state=record.STOPPED)
            attempt.due = time.monotonic() + min(2.0 ** (attempt.starts - 1), _LONGEST_PAUSE)
            waiting.append(attempt)
            self._tell(f"{point.name}: is to be started again: {running.process.said()}")
        else:
            ended = dataclasses.replace(ended, state=record.FAILED, said=running.process.said())
            self._tell(f"{point.name}: failed, {in_words(status)}: {ended.said}")
        self._write(point, ended)
        self._copy_log(point)

    def _pass_on(self, number: signal.Signals) -> None:
        self._tell(f"{number.name}: waits until {len(self._running)} points have saved; a second one does not wait")
        for running in self._running.values():
            running.process.stop(number)

    def _write(self, point: Point, what: Record) -> None:
        """Storage that fails does not end the other points; what is not written down is done again, and found done."""
        try:
            record.write(self._directory / point.name, what)
        except OSError as error:
            print(f"{self._directory / point.name / record.NAME}: cannot be written: {error}", file=sys.stderr)

    def _copy_log(self, point: Point) -> None:
        if is_local(self._directory):
            return
        there = self._directory / point.name / LOG
        try:
            with explained(there):
                there.write_bytes((self._local / point.name / LOG).read_bytes())
        except OSError as error:
            print(f"{there}: cannot be written: {error}", file=sys.stderr)
