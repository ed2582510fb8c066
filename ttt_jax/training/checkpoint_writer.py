"""One checkpoint after the other, written in the background by Orbax, with the checksums of its files."""

import contextlib
import functools
import itertools
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from ttt_jax.distributed.agreement import Exchange, barrier_that_fails_together, describe
from ttt_jax.errors import CheckpointError
from ttt_jax.training import checksums

_TIMEOUT = 1800  # seconds in which a checkpoint must be on disk
_LOOK_AGAIN_AFTER = (0.1, 0.3, 1.0)  # seconds in which a save that failed comes to rest
_numbers = itertools.count()


class Writer:
    """Writes below a folder, and deletes what the policy does not keep. Its methods are called on all processes alike.

    Attributes:
      step: of the checkpoint that is being written; None where none is.
    """

    def __init__(self, directory: epath.Path, policy: checkpoint_managers.PreservationPolicy, exchange: Exchange):
        _pass_over_closed_loops()
        self._directory, self._policy, self._exchange = directory, policy, exchange
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._manager: ocp.CheckpointManager | None = None
        self._end: Future[None] = Future()
        self.step: int | None = None

    def start(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to write; returns once ``state`` may be changed. What fails is told by :meth:`end`."""
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
        """Whether :meth:`end` would return without waiting."""
        return all(done == "done" for done in self._exchange("done" if self._end.done() else "busy"))

    def end(self) -> str | None:
        """Waits until all is written; returns what failed on any of the processes, in one line.

        What is half written is removed then, for it takes space.
        """
        error = self._end.exception()
        self._end, self.step = Future(), None  # the error holds on to what was to be written
        problem = self._exchange.first_problem("" if error is None else describe(error))
        if problem is not None:
            self.close()  # what has failed half is best forgotten: the next one starts from what is on disk
            with contextlib.suppress(CheckpointError):
                self._exchange.on_first(self._remove_half_written)
        return problem

    def open(self) -> None:
        """Makes ready to write, and removes what an earlier process left half written."""
        if self._manager is not None:
            return
        self._barrier = barrier_that_fails_together("save")
        several = jax.process_count() > 1
        processes = ocp.options.MultiprocessingOptions(
            # Of processes that are named, Orbax's barriers end after minutes where one does not come.
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
        """Lets go of everything; may be opened again."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with contextlib.suppress(Exception):  # of a save that failed, once more
                manager.close()

    def _remove_half_written(self) -> None:
        """Until nothing comes back: TensorStore goes on for a moment with the other files of a save that failed."""
        for seconds in _LOOK_AGAIN_AFTER:
            half_written = ocp.utils.tmp_checkpoints(self._directory)
            if not half_written:
                return
            for path in half_written:
                with contextlib.suppress(OSError):  # a file came into the folder, or went, meanwhile
                    path.get().rmtree()
            time.sleep(seconds)

    def _fail(self, error: Exception) -> None:
        if self._manager is not None and jax.process_count() > 1:
            with contextlib.suppress(Exception):  # it tells the others, by failing
                self._barrier(key=f"process {jax.process_index()} failed", timeout_ms=1000 * _TIMEOUT)
        raise error

    def _write_checksums(self) -> None:
        """Of all files, when they are there, and before they are given their final name."""
        temporary = self._directory / f"{self.step}{ocp.path.atomicity_types.TMP_DIR_SUFFIX}"
        final = self._directory / str(self.step)  # on gs:// nothing is renamed
        checksums.write(temporary if temporary.exists() else final, ("state", "meta"))


@functools.cache
def _pass_over_closed_loops() -> None:
    """Keeps off the terminal what comes of the other files of a save that failed: by the time TensorStore is done with
    them, the event loop in which Orbax waited for them has ended."""
    tell = sys.unraisablehook

    def tell_all_else(unraisable: "sys.UnraisableHookArgs") -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = tell_all_else
