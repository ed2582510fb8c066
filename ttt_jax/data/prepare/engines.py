"""Tokenize units in processes of this machine, or on a Ray cluster. Parts come back in the order of the units."""

import collections
import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ttt_jax import extras, ray_cluster
from ttt_jax.data.prepare.job import Job, Part, tokenize
from ttt_jax.data.prepare.records import Unit
from ttt_jax.errors import ConfigError, DataError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

# Takes a job, and units with their splits; yields the units with their parts.
Engine = Callable[[Job, Iterable[tuple[str, Unit]]], Generator[tuple[Unit, Part]]]


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(workers: int) -> Engine:
    """Return an engine of ``workers`` processes of this machine."""

    def run(job: Job, units: Iterable[tuple[str, Unit]]) -> Generator[tuple[Unit, Part]]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,)) as pool:

            def submit(split: str, unit: Unit) -> Any:
                # Ctrl-C reaches every process of a terminal. Workers, which may be started here, inherit that it is
                # blocked, and the parent ends them.
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    return pool.submit(_work, split, unit)
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)

            try:
                yield from _in_order(units, submit, lambda future: future.result(), workers)
            except BrokenProcessPool as error:
                raise DataError(
                    "a worker process was killed, perhaps because memory ran out; the same command goes on from here, "
                    "and fewer --workers need less memory"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)

    return run


def ray(address: str) -> Engine:
    """Return an engine of all CPUs of a Ray cluster.

    Args:
      address: of the cluster; ``auto`` is the cluster that this machine belongs to.

    Raises:
      ConfigError: if Ray is not installed or, when the engine is used, if there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(f"--engine ray: needs Ray; {extras.install_command('ray')}") from error

    def run(job: Job, units: Iterable[tuple[str, Unit]]) -> Generator[tuple[Unit, Part]]:
        ray_cluster.connect(address)
        try:
            remote = ray.remote(num_cpus=1, max_retries=5)(_tokenize_on_cluster)
            reference = ray.put(job)
            cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
            yield from _in_order(units, lambda split, unit: remote.remote(reference, split, unit), ray.get, cpus)
        except ray.exceptions.RayError as error:
            reason = ray_cluster.last_line(error)
            raise DataError(f"--engine ray: {reason}; the same command goes on from here") from error
        finally:
            ray.shutdown()

    return run


def _in_order(units, submit: Callable[[str, Unit], Any], result: Callable[[Any], Part], workers: int):
    """Yield units with their parts, in order.

    At most two units per worker are submitted at a time, so that memory stays bounded and no worker waits.
    """
    submitted: collections.deque[tuple[Unit, Any]] = collections.deque()
    for split, unit in units:
        submitted.append((unit, submit(split, unit)))
        if len(submitted) > 2 * workers:
            done, part = submitted.popleft()
            yield done, result(part)
    while submitted:
        done, part = submitted.popleft()
        yield done, result(part)


_jobs: list[Job] = []  # in a worker process: its latest job, whose tokenizer is loaded


def _start_worker(job: Job) -> None:
    _tune()
    _jobs[:] = [job]
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _work(split: str, unit: Unit) -> Part:
    return tokenize(_jobs[0], split, unit)


def _die_with_parent() -> None:
    """End this worker when its parent has ended: a parent that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_on_cluster(job: Job, split: str, unit: Unit) -> Part:
    _tune()
    return tokenize(_loaded(job), split, unit)


def _loaded(job: Job) -> Job:
    """Return the same job with its tokenizer loaded, if this worker has had it before."""
    if not _jobs or _jobs[0] != job:
        _jobs[:] = [job]
    return _jobs[0]


def _tune() -> None:
    """Make tokenizers faster in a process that does nothing else."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is faster than threads in each
    with contextlib.suppress(OSError, AttributeError):  # raised if the C library is not glibc
        # Returning the memory of every document, and faulting it in again for the next, takes a tenth of the time.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
