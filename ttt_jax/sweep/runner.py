"""Run points on this machine: start a process for each, restart it after status 75, and record how it ended."""

import contextlib
import dataclasses
import fcntl
import glob
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ttt_jax.errors import ConfigError
from ttt_jax.storage.json_files import warn_once
from ttt_jax.storage.lock_file import NO_LOCKS
from ttt_jax.storage.workdir import Workdir, is_local
from ttt_jax.storage.writing import write_atomically
from ttt_jax.sweep import files, supervisor
from ttt_jax.sweep.files import Record
from ttt_jax.sweep.points import Point
from ttt_jax.terminal.console import duration
from ttt_jax.terminal.stopping import DONE, INTERRUPTED, RESTART, StopSignals

PROGRAM = (sys.executable, "-m", "ttt_jax")
_LOG, _LOCK = "output.log", "process.lock"
_TAIL = 1 << 14  # bytes
_POLL = 0.1  # seconds
_LONGEST_PAUSE, _BUSY_PAUSE = 60.0, 1.0  # seconds before a point is started again


def run(points: Sequence["PointRun"], environments: Sequence[Mapping[str, str]]) -> signal.Signals | None:
    """Run points, as many at a time as there are ``environments``; return the signal that stopped them, if one did.

    The first SIGINT or SIGTERM is passed on to the points, which save; the second one ends all at once.
    """
    waiting, free, running = list(points), list(environments), list["PointRun"]()
    passed_on = False
    with StopSignals() as stop:
        try:
            while running or (waiting and not stop.received):
                if stop.received and not passed_on:
                    passed_on = True
                    say(f"{stop.received.name}: waits until {len(running)} points have saved; a second one does not")
                    for each in running:
                        each.stop(stop.received)
                while free and waiting and not stop.received:
                    running.append(waiting.pop(0))
                    running[-1].environment = free.pop(0)
                for each in [each for each in running if each.poll() is not None]:
                    running.remove(each)
                    free.append(each.environment)
                time.sleep(_POLL)
        finally:
            for each in running:
                each.kill()
    return stop.received


def say(line: str) -> None:
    """Print a line about the course of a sweep."""
    print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass
class PointRun:
    """Run the process of a point, and again where it ends with status 75; nothing happens but in :meth:`poll`.

    The process holds a lock on the folder for as long as it lives, whatever becomes of the sweep. It is a session of
    its own, so that Ctrl-C reaches it through the sweep alone.
    """

    point: Point
    workdir: Workdir
    folder: Path  # the same, or a folder of this machine for log and lock where ``workdir`` is in a bucket
    command: Sequence[str]  # program and arguments
    restarts: int
    cwd: Path  # where the command runs, on machines that have this folder
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)  # added to that of this process
    ended: Record | None = None  # the record of its end; None so far
    stopped_as: str = ""  # the state that it is in after it was asked to stop

    def __post_init__(self):
        self._process: subprocess.Popen | None = None
        self._record = Record(files.RUNNING, self.point.steps)
        self._due = 0.0  # by the monotonic clock

    def poll(self) -> Record | None:
        """Do what is due: start the process, or note its end. Return :attr:`ended`."""
        if self._process is not None:
            if (status := self._process.poll()) is not None:
                self._note_end(status)
        elif self.ended is None and self.stopped_as:
            self._end(self.stopped_as)
        elif self.ended is None and time.monotonic() >= self._due:
            self._start()
        return self.ended

    def stop(self, number: int = signal.SIGTERM, state: str = files.STOPPED) -> None:
        """Ask the process to save and to end; the point is then in this state, unless it is done or has failed."""
        self.stopped_as = state
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the process at once, with all that it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("a+") as lock, (self.folder / _LOG).open("ab") as output:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                warn_once(f"{self.point.name}: waits for the end of {holder}, of an earlier sweep")
                self._due = time.monotonic() + _BUSY_PAUSE
                return
            except OSError as error:
                if error.errno not in NO_LOCKS:  # without them, ttt train's own record in the folder is enough
                    raise
            self._log_start = output.seek(0, os.SEEK_END)
            read, self._pipe = os.pipe()  # its end tells the supervisor that this process has died
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", supervisor.__file__, str(read), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self.environment},
                cwd=self.cwd if self.cwd.is_dir() else None,
                pass_fds=[read, lock.fileno()],
                start_new_session=True,
            )
            os.close(read)
            lock.truncate(0)
            lock.write(f"process {self._process.pid} on {socket.gethostname()}\n")
        self._record = Record(files.RUNNING, self.point.steps, starts=self._record.starts + 1)
        self._write(self._record)
        again = f" (start {self._record.starts})" if self._record.starts > 1 else ""
        self._say(f"started{again}; {self.folder / _LOG}")

    def _note_end(self, status: int) -> None:
        os.close(self._pipe)
        self._process = None
        said = self._last_line()
        self._record = dataclasses.replace(self._record, status=status, ended=time.time())
        if status == DONE:
            self._end(files.DONE)
        elif self.stopped_as and (status in (RESTART, INTERRUPTED) or status < 0):
            self._end(self.stopped_as)
        elif status == RESTART and self._record.starts <= self.restarts:
            self._due = time.monotonic() + min(2.0 ** (self._record.starts - 1), _LONGEST_PAUSE)
            self._write(dataclasses.replace(self._record, state=files.STOPPED))
            self._say(f"is to be started again: {said}")
        else:
            self._end(files.FAILED, said)
        if not is_local(self.workdir):
            log = (self.folder / _LOG).read_bytes()
            self._save(_LOG, lambda path: write_atomically(path, log))

    def _end(self, state: str, said: str = "") -> None:
        self.ended = dataclasses.replace(self._record, state=state, said=said)
        if self._record.starts:
            self._write(self.ended)
            took = duration(time.time() - self.ended.began)
            self._say(f"{state}, {f'{self.ended.describe_exit()}: {said}' if state == files.FAILED else took}")

    def _say(self, text: str) -> None:
        say(f"{self.point.name}: {text}")

    def _write(self, record: Record) -> None:
        self._save(files.POINT, lambda path: files.write_record(path.parent, record))

    def _save(self, name: str, write: Callable[[Workdir], object]) -> None:
        """Write a file. Failing storage must not end other points; a point without its record runs again, all done."""
        path = self.workdir / name
        try:
            write(path)
        except OSError as error:
            say(f"{path}: cannot be written: {error}")

    def _last_line(self) -> str:
        """Return the last line that ``ttt`` itself wrote, or the last line of all; empty where nothing was written."""
        with (self.folder / _LOG).open("rb") as file:
            file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - _TAIL))
            text = file.read().decode(errors="replace")
        lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        own = [line for line in lines if re.match(r"ttt \w+: ", line)]
        return (own or lines or [""])[-1]


def gpu_shares(jobs: int) -> list[dict[str, str]]:
    """Return variables that give each process an equal share of the GPUs: by itself, JAX takes all, and their memory.

    Raises:
      ConfigError: where there are more processes than GPUs.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        gpus = [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    else:
        gpus = [device.strip() for device in chosen.split(",") if device.strip()]
    if not gpus or jobs == 1 or os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return [{}] * jobs
    if jobs > len(gpus):
        raise ConfigError(f"--jobs {jobs}: this machine has {len(gpus)} GPUs; expected at most {len(gpus)}")
    each = len(gpus) // jobs
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[job * each : (job + 1) * each])} for job in range(jobs)]
