"""Let the processes of a run exchange short texts, vote, and fail together.

Texts go through JAX's coordination service. No device takes part, so that an exchange does not wait for steps that run
or are queued, and may be made in a thread of its own. Votes are tiny programs on the devices, in line with the steps.

The client of that service has no public name, so this is the only module of the package that uses ``jax._src``. It was
tested with jax 0.10.2, 0.11.0 and 0.12.0. Orbax takes the client from the same place.
"""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

OTHER_FAILED = "another process failed"
_HOUR = 3600.0
_NO_PROBLEM = ""
_counters: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)

T = TypeVar("T")


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


class Agreement:
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
