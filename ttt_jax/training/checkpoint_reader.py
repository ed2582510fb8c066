"""Check and read the files of one checkpoint, by Orbax, on any number of processes."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from ttt_jax.distributed.agreement import Exchange
from ttt_jax.errors import CheckpointError
from ttt_jax.storage import checksums

_READ_AGAIN_AFTER = (1.0, 5.0, 15.0)  # seconds

T = TypeVar("T")


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
