"""Let the processes of a run exchange short texts, vote, and fail together.

Texts go through JAX's coordination service. No device takes part, so that an exchange does not wait for steps that run
or are queued, and may be made in a thread of its own. Votes are tiny programs on the devices, in line with the steps.

The checks find processes that do not fit together before anything is computed: a process that is missing or differs is
found within a time limit, where a collective would hang.

The client of that service has no public name, so this is the only module of the package that uses ``jax._src``. It was
tested with jax 0.10.2, 0.11.0 and 0.12.0. Orbax takes the client from the same place.
"""

import contextlib
import itertools
import json
import re
import socket
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ttt_jax.errors import ConfigError
from ttt_jax.settings import differing_keys
from ttt_jax.storage.workdir import Workdir
from ttt_jax.storage.workdir_lock import LockLostError, WorkdirLock

OTHER_FAILED = "another process failed"
_HOUR = 3600.0
_NO_PROBLEM = ""
_counters: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)

T = TypeVar("T")


# ---- Texts, votes and barriers


class Exchange:
    """A sequence of exchanges in which all processes take part, each in the same order.

    Args:
      name: the name of the sequence. Processes that make several of one name make them in the same order.
      error: makes the exception to raise when something failed on one of the processes, from a message.
    """

    def __init__(self, name: str, error: Callable[[str], Exception] = RuntimeError):
        self._error = error
        self._place = f"ttt_jax/{name}/{next(_counters[name])}"
        self._count = 0

    def __call__(self, text: str, timeout: float = _HOUR) -> list[str]:
        """Give ``text`` to all processes and return the text of each, in the order of their indices.

        Args:
          timeout: seconds to wait for the last process.

        Raises:
          jax.errors.JaxRuntimeError: when a process did not come in time.
        """
        if jax.process_count() == 1:
            return [text]
        client: Any = distributed.global_state.client
        place = f"{self._place}/{self._count}"
        client.key_value_set(f"{place}/{jax.process_index()}", text)
        client.wait_at_barrier(place, round(timeout * 1000))
        texts = {int(key.rsplit("/", 1)[1]): value for key, value in client.key_value_dir_get(f"{place}/")}
        if self._count and jax.process_index() == 0:  # all are past the previous exchange, so nobody reads it any more
            client.key_value_delete(f"{self._place}/{self._count - 1}/")
        self._count += 1
        return [texts[i] for i in range(jax.process_count())]

    def on_all(self, work: Callable[[], T]) -> T:
        """Do ``work`` on all processes and return its result; where it fails on one, raise that error on all."""
        problem, result, cause = _NO_PROBLEM, None, None
        try:
            result = work()
        except Exception as error:
            problem, cause = str(error) if type(error) is self._error else describe(error), error
        first = self.first_problem(problem)
        if first is not None:
            raise self._error(first) from cause
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], T]) -> T:
        """Do ``work`` on process 0 and return its result, which is JSON, or raise its error, on all processes."""
        text = self.on_all(lambda: json.dumps(work()) if jax.process_index() == 0 else "")
        return json.loads(self(text)[0])

    def first_problem(self, problem: str, timeout: float = _HOUR) -> str | None:
        """Return the problem that came first, on all processes; None where no process has one.

        Args:
          problem: what failed on this process; empty for nothing.
          timeout: seconds to wait for the last process.
        """
        problems = {i: problem for i, problem in enumerate(self(problem, timeout)) if problem != _NO_PROBLEM}
        if not problems:
            return None
        # That another process failed is a consequence, not the first problem.
        process = min(problems, key=lambda i: (OTHER_FAILED in problems[i], i))
        return problems[process] + (f" (process {process})" if jax.process_count() > 1 else "")


class Votes:
    """The largest of the numbers that the processes vote for.

    A vote is a tiny program on the devices, in line with the steps: the outcome of a vote that is cast before a step is
    known once the previous step has ended, and is the same on all processes.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._devices = mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, wish: Callable[[], int]) -> Callable[[], int]:
        """Vote for the number that ``wish()`` returns now, and return a function that waits for the outcome.

        A single process does not vote: its outcome is what ``wish()`` returns when it is asked for.
        """
        if self._alone:
            return wish
        mine = np.array([wish()], np.int32)
        outcome = self._largest(jax.make_array_from_callback((self._devices,), self._place, lambda _: mine))
        return lambda: int(outcome)


def barrier_that_fails_together(name: str) -> Callable[..., None]:
    """Return a barrier for Orbax's background threads that fails on all processes at once after one has failed.

    With Orbax's own barrier the others wait until their time is over, because a process that failed skips some
    barriers. With this one all processes meet at whichever barrier is next, and see that they are not at the same.
    """
    exchange = Exchange(name)
    failed = False

    def barrier(*, key: str, timeout_ms: int) -> None:
        nonlocal failed
        if not failed:
            failed = len(set(exchange(key, timeout_ms / 1000))) > 1
        if failed:
            raise RuntimeError(OTHER_FAILED)

    return barrier


def describe(error: BaseException, length: int = 400) -> str:
    """Return the root cause of an error in one line; of a longer one, its beginning and its end."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    text = re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0]  # TensorStore's internals follow these
    text = re.sub(r'"([^"]{80})[^"]+"', r'"\1..."', text)
    text = " ".join(f"{type(error).__name__}: {text}".split()).removesuffix(":")
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


# ---- Checks before a run, and its lock


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
