"""Tokenize units of records: one, or many in processes of this machine or on a Ray cluster.

Tokenizing a unit is a pure function of a job and the unit, so that any process or machine can do it. The results of an
engine come back in the order of the units.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from ttt_jax import extras, ray_cluster
from ttt_jax.data.prepare import records
from ttt_jax.data.prepare.records import Unit
from ttt_jax.data.prepare.tokenizer import Encode, Tokenizer
from ttt_jax.errors import ConfigError, DataError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclasses.dataclass(frozen=True)
class Job:
    """The options by which texts become tokens, the same for all units.

    Attributes:
      bos, eos: ids put before and after every document; None for none. If both are one token, as in GPT-2, it is put
        only after documents, and ``bos`` is None: documents are separated once, and their ends are targets.
      text_key: the key of the text in a record.
      validation_fraction, test_fraction: fractions of the documents of train files that go to these splits instead, by
        a hash of their text and ``split_seed``.
    """

    tokenizer: Tokenizer
    bos: int | None
    eos: int | None
    text_key: str = "text"
    validation_fraction: float = 0.0
    test_fraction: float = 0.0
    split_seed: int = 0

    def __post_init__(self) -> None:
        """Leave out a BOS that is the EOS."""
        if self.bos is not None and self.bos == self.eos:
            object.__setattr__(self, "bos", None)

    @property
    def dtype(self) -> str:
        """Return the smallest type that holds all tokens: uint16 or uint32."""
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    @functools.cached_property
    def encode(self) -> Encode:
        """Return the tokenizer's encoder, which is loaded once in each process."""
        return self.tokenizer.encoder()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def split_of(self, split: str, text: bytes) -> str:
        """Return the split of a document in a file of ``split``.

        The hash depends on the document and the seed alone, so that a document stays in its split whatever others come
        or go, and copies of a document are in one split.
        """
        if split != "train" or not self.validation_fraction + self.test_fraction:
            return split
        seeded = hashlib.blake2b(text, digest_size=8, salt=self.split_seed.to_bytes(16))
        hashed = int.from_bytes(seeded.digest()) / 2**64  # in [0, 1)
        if hashed < self.validation_fraction:
            return "validation"
        return "test" if hashed < self.validation_fraction + self.test_fraction else "train"


class Piece(NamedTuple):
    """Documents of one split, one after another.

    Attributes:
      tokens: [N].
      lengths: [documents], the number of tokens of each.
      text_bytes: size of the texts.
      unknown: number of tokens that stand for characters without a token.
      empty: number of documents whose text has no tokens.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    unknown: int = 0
    empty: int = 0


class Part(NamedTuple):
    """The tokens of a unit by split, and the records that could not be read."""

    pieces: dict[str, Piece]
    problems: list[records.Problem]


def tokenize_unit(job: Job, split: str, unit: Unit) -> Part:
    """Return the tokens of the documents of a unit, by split."""
    found: dict[str, tuple[list[np.ndarray], list[int], list[int], list[int], list[bool]]] = {}
    problems = []
    encode, unknown = job.encode, job.tokenizer.unknown
    first, last = ([] if token is None else [np.array([token], job.dtype)] for token in (job.bos, job.eos))
    for record in records.texts(unit, job.text_key):
        if isinstance(record, records.Problem):
            problems.append(record)
            continue
        number, content = record
        try:
            encoded = encode(content).astype(job.dtype)
        except MemoryError:
            raise
        except Exception as error:  # tokenizers raise errors of many types
            problems.append(records.Problem(number, f"the tokenizer failed: {error}"))
            continue
        text = content.encode()
        tokens, lengths, sizes, unknowns, empty = found.setdefault(job.split_of(split, text), ([], [], [], [], []))
        document = [*first, encoded, *last]
        tokens += document
        lengths.append(sum(map(len, document)))
        sizes.append(len(text))
        unknowns.append(0 if unknown is None else int(np.count_nonzero(encoded == unknown)))
        empty.append(not len(encoded))
    pieces = {
        name: Piece(np.concatenate(tokens), np.array(lengths, np.int64), sum(sizes), sum(unknowns), sum(empty))
        for name, (tokens, lengths, sizes, unknowns, empty) in found.items()
        if lengths
    }
    return Part(pieces, problems)


# ---- Engines

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
                    "a worker process was killed, perhaps because memory ran out; the same command continues from "
                    "here, and fewer --workers need less memory"
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
            raise DataError(f"--engine ray: {reason}; the same command continues from here") from error
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
    return tokenize_unit(_jobs[0], split, unit)


def _die_with_parent() -> None:
    """End this worker when its parent has ended: a parent that was killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_on_cluster(job: Job, split: str, unit: Unit) -> Part:
    _tune()
    return tokenize_unit(_loaded(job), split, unit)


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
