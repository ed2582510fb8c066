"""What the processes of a run tell each other beside arrays: short texts, by way of JAX's coordination service.

No device takes part, so steps that run or wait to run are not held up, and it may be done in a thread of its own.
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
from jax._src import distributed  # the client has no public name; Orbax takes it from here too
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_HOUR = 3600.0
_ALL_ARE_WELL = ""
_rows: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)

T = TypeVar("T")


class Exchange:
    """A row of exchanges in which all processes take part, each in the same order.

    Args:
      name: of the row. Processes that make several rows of one name make them in the same order.
      error: what is raised when something failed on one of the processes; takes a message.
    """

    def __init__(self, name: str, error: Callable[[str], Exception] = RuntimeError):
        self._error = error
        self._place = f"ttt_jax/{name}/{next(_rows[name])}"
        self._count = 0

    def __call__(self, text: str, timeout: float = _HOUR) -> list[str]:
        """Gives ``text`` to all processes; returns what each of them gave, in the order of their indices.

        Args:
          timeout: seconds after which it is an error that a process has not come here.

        Raises:
          jax.errors.JaxRuntimeError: when one did not come.
        """
        if jax.process_count() == 1:
            return [text]
        client: Any = distributed.global_state.client
        place = f"{self._place}/{self._count}"
        client.key_value_set(f"{place}/{jax.process_index()}", text)
        client.wait_at_barrier(place, round(timeout * 1000))
        said = {int(key.rsplit("/", 1)[1]): value for key, value in client.key_value_dir_get(f"{place}/")}
        if self._count and jax.process_index() == 0:  # all have come here, so nobody reads the one before any more
            client.key_value_delete(f"{self._place}/{self._count - 1}/")
        self._count += 1
        return [said[i] for i in range(jax.process_count())]

    def on_all(self, work: Callable[[], T]) -> T:
        """What ``work`` returns here, if it returns on all processes; otherwise the error of one of them on all."""
        problem, result, cause = _ALL_ARE_WELL, None, None
        try:
            result = work()
        except Exception as error:
            problem, cause = str(error) if type(error) is self._error else describe(error), error
        first = self.first_problem(problem)
        if first is not None:
            raise self._error(first) from cause
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on process 0, in JSON, or the error that it raises there."""
        text = self.on_all(lambda: json.dumps(work()) if jax.process_index() == 0 else "")
        return json.loads(self(text)[0])

    def first_problem(self, problem: str, timeout: float = _HOUR) -> str | None:
        """What failed on one of the processes, each of which gives its problem; empty where there is none."""
        problems = {i: problem for i, problem in enumerate(self(problem, timeout)) if problem != _ALL_ARE_WELL}
        if not problems:
            return None
        # What went wrong first is not that another process failed.
        process = min(problems, key=lambda i: (OTHER_FAILED in problems[i], i))
        return problems[process] + (f" (process {process})" if jax.process_count() > 1 else "")


OTHER_FAILED = "another process failed"


def barrier_that_fails_together(name: str) -> Callable[..., None]:
    """A barrier for Orbax's background threads: once one process failed, it fails on all of them, at once.

    Orbax's own lets the others wait until their time is over, for a process that failed leaves out some barriers. Here
    all meet at whichever is next, and see that they are not at the same.
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


class Agreement:
    """The largest of the numbers that the processes vote for.

    A vote is a tiny program on the devices, in line with the steps: cast before a step, its outcome is known once the
    step before that has ended, and is the same everywhere.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._devices = mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, wish: Callable[[], int]) -> Callable[[], int]:
        """Votes for the number that ``wish`` gives now; what it returns waits for the outcome.

        A lone process need not ask, and its outcome is what it wishes at that time.
        """
        if self._alone:
            return wish
        mine = np.array([wish()], np.int32)
        outcome = self._largest(jax.make_array_from_callback((self._devices,), self._place, lambda _: mine))
        return lambda: int(outcome)


def describe(error: BaseException, length: int = 400) -> str:
    """The error at the root of an error, in one line; of a long one, beginning and end."""
    while inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = inner
    text = re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0]  # what TensorStore adds for its authors
    text = re.sub(r'"([^"]{80})[^"]+"', r'"\1..."', text)
    text = " ".join(f"{type(error).__name__}: {text}".split()).removesuffix(":")
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"
