"""Write checkpoints in the background and read them, by Orbax, with the checksums of their files.

The last function keeps off the terminal what Orbax prints about saves: :mod:`ttt_jax.training.checkpoint` reports
failures, once.
"""

import contextlib
import functools
import itertools
import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from ttt_jax.distributed.agreement import Exchange, barrier_that_fails_together, describe
from ttt_jax.errors import CheckpointError
from ttt_jax.storage import checksums

_TIMEOUT = 1800  # seconds in which a checkpoint must be on disk
_LOOK_AGAIN_AFTER = (0.1, 0.3, 1.0)  # seconds until TensorStore has ended the files of a save that failed
_READ_AGAIN_AFTER = (1.0, 5.0, 15.0)  # seconds
_numbers = itertools.count()

T = TypeVar("T")


class Writer:
    """Write checkpoints below a folder, and delete those that the policy does not keep.

    All processes call its methods alike.

    Attributes:
      step: the step of the checkpoint that is being written; None where none is.
    """

    def __init__(self, directory: epath.Path, policy: checkpoint_managers.PreservationPolicy, exchange: Exchange):
        silence_orbax()
        self._directory, self._policy, self._exchange = directory, policy, exchange
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._manager: ocp.CheckpointManager | None = None
        self._end: Future[None] = Future()
        self.step: int | None = None

    def start(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Start to write, and return once ``state`` may be changed. :meth:`end` returns what failed."""
        self.step = step
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        try:
            self.open()
            assert self._manager is not None
            self._manager.save(step, args=args, force=True)
            self._end = self._thread.submit(self._manager.wait_until_finished)
        except Exception as error:
            self._end = self._thread.submit(self._fail, error)

    def is_done(self) -> bool:
        """Return whether :meth:`end` would return without waiting."""
        return all(done == "done" for done in self._exchange("done" if self._end.done() else "busy"))

    def end(self) -> str | None:
        """Wait until all is written; return what failed on any of the processes, in one line.

        After a failure, files that are half written are removed, as they take space.
        """
        error = self._end.exception()
        self._end, self.step = Future(), None  # the error holds references to the arrays of the checkpoint
        problem = self._exchange.first_problem("" if error is None else describe(error))
        if problem is not None:
            self.close()  # the next save starts from what is on disk, not from what Orbax remembers
            with contextlib.suppress(CheckpointError):
                self._exchange.on_first(self._remove_half_written)
        return problem

    def open(self) -> None:
        """Create Orbax's manager, which removes what an earlier process left half written."""
        if self._manager is not None:
            return
        self._barrier = barrier_that_fails_together("save")
        several = jax.process_count() > 1
        processes = ocp.options.MultiprocessingOptions(
            # Orbax's barriers time out after minutes only where the processes are named.
            active_processes=set(range(jax.process_count())) if several else None,
            barrier_sync_key_prefix=f"ttt_jax_{next(_numbers)}",
        )
        background = ocp.options.AsyncOptions(
            timeout_secs=_TIMEOUT,
            barrier_sync_fn=self._barrier if several else None,
            post_finalization_callback=self._write_checksums,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            create=False,
            save_root_metadata=False,
            async_options=background,
            multiprocessing_options=processes,
        )
        self._exchange.on_first(lambda: self._directory.mkdir(parents=True, exist_ok=True))
        self._manager = self._exchange.on_all(lambda: ocp.CheckpointManager(self._directory, options=options))

    def close(self) -> None:
        """Close Orbax's manager. The writer may be opened again."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # it raises the error of a failed save once more
                manager.close()

    def _remove_half_written(self) -> None:
        """Remove half-written checkpoints until none comes back: TensorStore may still write some of their files."""
        for seconds in _LOOK_AGAIN_AFTER:
            half_written = ocp.utils.tmp_checkpoints(self._directory)
            if not half_written:
                return
            for path in half_written:
                with contextlib.suppress(OSError):  # files were added or removed meanwhile
                    path.get().rmtree()
            time.sleep(seconds)

    def _fail(self, error: Exception) -> None:
        if self._manager is not None and jax.process_count() > 1:
            with contextlib.suppress(Exception):  # this barrier fails, and so tells the other processes
                self._barrier(key=f"process {jax.process_index()} failed", timeout_ms=1000 * _TIMEOUT)
        raise error

    def _write_checksums(self) -> None:
        """Write the checksums of all files once they are complete, before the folder gets its final name."""
        temporary = self._directory / f"{self.step}{ocp.path.atomicity_types.TMP_DIR_SUFFIX}"
        final = self._directory / str(self.step)  # on gs:// nothing is renamed
        checksums.write(temporary if temporary.exists() else final, ("state", "meta"))


class Reader:
    """Read the checkpoints below a folder.

    All processes call its methods alike. Each process reads what it needs, without barriers at which the others would
    wait for it, and a failure on one process is a :class:`CheckpointError` on all.
    """

    def __init__(self, directory: epath.Path, exchange: Exchange):
        self._directory, self._exchange = directory, exchange

    def check(self, step: int) -> bool:
        """Check the files against their checksums, each process a share of them; return whether there are checksums."""
        folder = self._directory / str(step)

        def check_share():
            problem = checksums.first_difference(folder, jax.process_index(), jax.process_count())
            if problem is not None:
                raise CheckpointError(problem)

        self._exchange.on_all(lambda: _with_retries(check_share))
        return self._exchange.on_first((folder / checksums.NAME).exists)

    def state(self, step: int, abstract: Any, partial: bool = False) -> Any:
        """Return the state, with the shapes, dtypes and shardings of ``abstract``.

        Args:
          partial: whether ``abstract`` is only a part of the saved state.
        """
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_this_process_alone())
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        folder = self._directory / str(step) / "state"
        return self._exchange.on_all(lambda: _with_retries(lambda: handler.restore(folder, args=args)))

    def meta(self, step: int) -> dict[str, Any]:
        """Return the ``meta`` of a checkpoint."""
        handler = ocp.JsonCheckpointHandler(multiprocessing_options=_this_process_alone())
        folder = self._directory / str(step) / "meta"
        return self._exchange.on_all(lambda: _with_retries(lambda: handler.restore(folder)))


def _this_process_alone() -> ocp.options.MultiprocessingOptions:
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _with_retries(read: Callable[[], T]) -> T:
    """Read, and try again where the storage fails, but not where a file is missing."""
    for seconds in _READ_AGAIN_AFTER:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(seconds)
    return read()


@functools.cache
def silence_orbax() -> None:
    """Leave out, in this process, messages of Orbax about single files and about event loops that are closed.

    When a file of a checkpoint cannot be written, Orbax ends the event loop in which it waits for all files.
    TensorStore then finishes the other files, and its calls into the closed loop fail where nothing can catch them.
    Neither package has an option for that, so the public ``sys.unraisablehook`` leaves out this one message. Tested
    with orbax-checkpoint 0.12.8 and tensorstore 0.1.86 on Python 3.11.7.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def report_others(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others
