"""What the processes of a run make sure of before they compute anything together.

A process that is missing, or not the same, is found out by the end of a time limit, where a collective would hang.
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
    """That all processes say the same.

    Args:
      about: what has to be equal everywhere: nested dicts, JSON.
      limit: seconds for the last process to come.

    Raises:
      ConfigError: in every process, with the first process that differs, and where.
    """
    mine = {"host": socket.gethostname(), "about": about}
    said = [json.loads(text) for text in Exchange("peers")(json.dumps(mine), limit)]
    for process, other in enumerate(said):
        different = differing_keys(said[0]["about"], other["about"])
        if different:
            listed = ", ".join(f"{key} {first!r} there, {here!r} here" for key, (first, here) in different.items())
            raise ConfigError(
                f"process {process} on {other['host']} differs from process 0 on {said[0]['host']}: {listed}; expected "
                "the same command, code and packages on every host"
            )


def on_all(work: Callable[[], T]) -> T:
    """What ``work`` returns here, once it has returned on all processes.

    Raises:
      Exception: what ``work`` raised here.
      ConfigError: where it raised something on another process.
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
      folder, command, options: as of :class:`WorkdirLock`.
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
        """Whether this process knows that another command has taken over."""
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
    """Hold the lock of a folder for this job.

    Raises:
      ConfigError: on all processes, where another command holds it.
    """
    job = JobLock(folder, command, **options)
    with contextlib.ExitStack() as stack:
        on_all(lambda: job.enter(stack))
        yield job


def check_shared(folder: Workdir, *, limit: float = 60) -> None:
    """That all processes see the same folder, which exists.

    Raises:
      ConfigError: in every process, naming those that do not.
    """
    if jax.process_count() == 1:
        return
    exchange = Exchange("shared folder", ConfigError)
    mark = folder / exchange.on_first(lambda: f".seen-by-all-{uuid.uuid4().hex}")
    if jax.process_index() == 0:
        mark.touch()
    exchange("marked")
    deadline = time.monotonic() + limit  # a network file system may take a while to show it
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [str(process) for process, saw in enumerate(exchange(str(seen))) if saw != "True"]
    if jax.process_index() == 0:
        mark.unlink()
    if blind:
        raise ConfigError(
            f"--workdir {folder}: not the same folder for processes {', '.join(blind)}; expected one that all share"
        )


def say(text: str) -> None:
    """Prints a line to standard error, once for all processes."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
