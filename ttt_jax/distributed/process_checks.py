"""Check that the processes of a run fit together before they compute anything, and hold the lock of its folder.

A process that is missing or differs is found within a time limit, where a collective would hang.
"""

import contextlib
import json
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

from ttt_jax.distributed.agreement import Exchange
from ttt_jax.errors import ConfigError
from ttt_jax.settings import differing_keys
from ttt_jax.storage.workdir import Workdir
from ttt_jax.storage.workdir_lock import LockLostError, WorkdirLock

T = TypeVar("T")


def check_same(about: dict[str, Any], *, limit: float = 300) -> None:
    """Check that a value is the same on all processes.

    Args:
      about: the value: nested dicts, JSON.
      limit: seconds to wait for the last process.

    Raises:
      ConfigError: on every process, with the first process that differs and the keys that differ.
    """
    mine = {"host": socket.gethostname(), "about": about}
    first, *others = [json.loads(text) for text in Exchange("check_same")(json.dumps(mine), limit)]
    for process, other in enumerate(others, 1):
        if different := differing_keys(first["about"], other["about"]):
            listed = ", ".join(f"{key} {there!r} there, {here!r} here" for key, (there, here) in different.items())
            raise ConfigError(
                f"process {process} on {other['host']} differs from process 0 on {first['host']}: {listed}; expected "
                "the same command, code and packages on every host"
            )


def on_all(work: Callable[[], T]) -> T:
    """Do ``work`` on all processes and return its result on this one, once all have finished.

    Raises:
      Exception: the error that ``work`` raised on this process.
      ConfigError: where it failed on another process.
    """
    failure, result = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    problem = Exchange("preparation").first_problem("" if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    if problem is not None:
        raise ConfigError(problem)
    return result  # type: ignore[return-value]


class JobLock:
    """The lock of a folder, held by process 0 for all processes.

    Args:
      folder, command, options: the arguments of :class:`WorkdirLock`.
    """

    def __init__(self, folder: Workdir, command: str, **options: str):
        self._lock = WorkdirLock(folder, command, **options) if jax.process_index() == 0 else None
        self._exchange = Exchange(f"lock of {folder}", LockLostError)

    def enter(self, stack: contextlib.ExitStack) -> None:
        """Take the lock on process 0, to be released with the stack."""
        if self._lock is not None:
            stack.enter_context(self._lock)

    @property
    def lost(self) -> bool:
        """Return whether this process knows that another command has taken over."""
        return self._lock is not None and self._lock.lost

    def check(self) -> None:
        """Raise :class:`LockLostError` on all processes where another command has taken over."""
        self._exchange.on_all(self.check_here)

    def check_here(self) -> None:
        """Raise :class:`LockLostError` on process 0 alone where another command has taken over."""
        if self._lock is not None:
            self._lock.check()


@contextlib.contextmanager
def locked(folder: Workdir, command: str, **options: str) -> Iterator[JobLock]:
    """Hold the lock of a folder for all processes of this job.

    Raises:
      ConfigError: on all processes, where another command holds the lock.
    """
    job = JobLock(folder, command, **options)
    with contextlib.ExitStack() as stack:
        on_all(lambda: job.enter(stack))
        yield job


def check_shared(folder: Workdir, *, limit: float = 60) -> None:
    """Check that all processes see the same folder, which exists.

    Raises:
      ConfigError: on every process, with the processes that see another folder.
    """
    if jax.process_count() == 1:
        return
    exchange = Exchange("shared folder", ConfigError)
    mark = folder / exchange.on_first(lambda: f".seen-by-all-{uuid.uuid4().hex}")
    if jax.process_index() == 0:
        mark.touch()
    exchange("marked")
    deadline = time.monotonic() + limit  # a network file system may take a while to show a new file
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [str(process) for process, saw in enumerate(exchange(str(seen))) if saw != "True"]
    if jax.process_index() == 0:
        mark.unlink()
    if blind:
        raise ConfigError(
            f"--workdir {folder}: not the same folder for processes {', '.join(blind)}; expected one that all share"
        )


def print_once(text: str) -> None:
    """Print a line to standard error, once for all processes."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
