"""Checkpoints of a run: asynchronous, atomic, checked, float32, with everything that a resume needs.

A checkpoint is a folder ``checkpoints/<step>`` with ``state`` (parameters, optimizer state, step), ``meta`` (JSON: the
data position, the config, the versions of what wrote it) and the checksums of their files. Orbax writes into a
temporary folder and renames it when all is there, so a run that is killed while saving leaves the checkpoints before it
as they were.

On many processes all of them make the same calls in the same order, and a call ends in the same way on all of them:
what failed on one has failed. Process 0 alone renames, deletes and speaks.
"""

import contextlib
import importlib.metadata
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

import ttt_jax
from ttt_jax.distributed import process_checks
from ttt_jax.distributed.agreement import Exchange
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.storage.workdir import Workdir, is_local
from ttt_jax.training import checksums
from ttt_jax.training.checkpoint_writer import Writer

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_SAVE_AGAIN_AFTER = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
_READ_AGAIN_AFTER = (1.0, 5.0, 15.0)
_POLL_STEPS = 10  # many processes ask each other so often whether a save has ended

T = TypeVar("T")


class Restored(NamedTuple):
    """What a run goes on from."""

    step: int
    state: Any
    meta: dict[str, Any]


def check_folder(workdir: Workdir) -> None:
    """Raise :class:`ConfigError` where no checkpoint can be saved in a local workdir, whatever is tried again."""
    folder = workdir / "checkpoints"
    if is_local(folder) and os.path.lexists(folder) and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(f"--workdir {workdir}: {folder} is no folder that can be written to; expected one, or none")


class Checkpoints:
    """The checkpoints of one run, under ``<workdir>/checkpoints``.

    Args:
      workdir: a folder, or a place on gs://.
      keep_last: how many of the newest are kept.
      milestone_every: checkpoints at multiples of this many steps are kept for good; 0 for none.
      keep: says which others are kept.
      read_only: whether nothing may be changed there.
      save_again_after: seconds between a save that failed and the next attempt, one after the other.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep_last: int = 1,
        milestone_every: int = 0,
        keep: checkpoint_managers.PreservationPolicy | None = None,
        read_only: bool = False,
        save_again_after: Sequence[float] = _SAVE_AGAIN_AFTER,
    ):
        for name in ("absl", "asyncio"):  # orbax tells of every file; what fails is told here, once
            logging.getLogger(name).setLevel(logging.CRITICAL)
        policies = [checkpoint_managers.LatestN(keep_last), *([] if keep is None else [keep])]
        if milestone_every:
            policies.append(checkpoint_managers.EveryNSteps(milestone_every))
        is_url = "://" in os.fspath(workdir)
        self.directory = epath.Path(workdir if is_url else os.path.abspath(workdir)) / "checkpoints"
        self._read_only = read_only
        self._exchange = Exchange("checkpoints", CheckpointError)
        self._writer = Writer(self.directory, checkpoint_managers.AnyPreservationPolicy(policies), self._exchange)
        self._save_again_after = save_again_after
        self._failures = 0  # in a row
        self._due: float | None = None  # when to save again, after a failure

    # ---- Which there are

    def latest_step(self) -> int | None:
        """Optimizer steps in the newest complete checkpoint; None where there is none."""
        return max(self.all_steps(), default=None)

    def all_steps(self) -> list[int]:
        """Steps of all complete checkpoints, in their order."""

        def find():
            if not self.directory.exists():
                return []
            return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory))

        return self._exchange.on_first(find)

    # ---- Save

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns once ``state`` may be changed.

        Does nothing if it is there already, nor between a failure and the time of the next attempt. That a save failed
        is seen by the next call of a method of this class, and told on standard error; see :meth:`wants_save`.

        Raises:
          CheckpointError: when all attempts have failed; names the newest checkpoint that is complete.
        """
        self._end_of_save()
        if not self._is_due():
            return
        if step in self._known_steps():
            self._failures, self._due = 0, None
            return
        self._writer.start(step, state, meta)

    def wants_save(self, step: int) -> bool:
        """Whether saving has failed and the state as it is now should be saved; to be asked after every step.

        Raises:
          CheckpointError: as :meth:`save`.
        """
        if self._writer.step is None and self._due is None:
            return False
        if jax.process_count() > 1 and step % _POLL_STEPS:
            return False
        if self._writer.step is not None:
            if not self._writer.is_done():
                return False
            self._end_of_save()
        return self._due is not None and self._is_due()

    def finish(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Saves, in as many attempts as are allowed, and returns when the checkpoint is complete.

        Raises:
          CheckpointError: as :meth:`save`.
        """
        while True:
            self.save(step, state, meta)
            self._end_of_save()
            if self._due is None:
                return
            time.sleep(max(self._due - time.monotonic(), 0.01))

    def wait(self) -> None:
        """Returns when what is being saved is complete, or has failed, which is told."""
        try:
            self._end_of_save()
        except CheckpointError as error:
            process_checks.say(str(error))

    def close(self) -> None:
        """Waits, and lets go of everything."""
        self.wait()
        self._writer.close()

    def _end_of_save(self) -> None:
        step = self._writer.step
        if step is None:
            return
        problem = self._writer.end()
        if problem is None or step in self._known_steps():  # it may have failed after it was complete
            self._failures, self._due = 0, None
            return
        self._failures += 1
        problem = f"cannot save {self.directory / str(step)}: {problem}"
        if self._failures > len(self._save_again_after):
            complete = [str(self.directory / str(step)) for step in self._known_steps()[-1:]]
            raise CheckpointError(
                f"{problem}; gave up after {self._failures} attempts. The newest complete checkpoint is "
                f"{(complete or ['none'])[0]}. Make room, or repair the storage, and run the same command again"
            )
        seconds = self._save_again_after[self._failures - 1]
        self._due = time.monotonic() + seconds
        process_checks.say(f"{problem}; trying again in {seconds:g} s")

    def _known_steps(self) -> list[int]:
        """All steps, as far as the storage tells."""
        try:
            return self.all_steps()
        except CheckpointError:
            return []

    def _is_due(self) -> bool:
        if self._due is None:
            return True
        return self._exchange("due" if time.monotonic() >= self._due else "later")[0] == "due"

    # ---- Restore

    def restore_newest(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is not damaged, with the shapes, dtypes and shardings of ``abstract_state``.

        Damaged ones that are newer are told of and renamed to ``damaged-<step>``. None where there is no checkpoint.

        Raises:
          CheckpointError: where all are damaged (they stay as they are), or the files of one are as they were written
            and do not give such a state.
        """
        self._end_of_save()
        damaged: dict[int, str] = {}
        for step in reversed(self.all_steps()):
            checked = False
            try:
                checked = self._check(step)
                restored = Restored(step, self._read_state(step, abstract_state), self._read_meta(step))
            except CheckpointError as error:
                if checked:
                    raise CheckpointError(f"{self.directory / str(step)}: cannot be restored: {error}") from None
                damaged[step] = str(error)
                continue
            for other, problem in damaged.items():
                self._set_aside(other, problem, step)
            return restored
        if damaged:
            listed = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
            raise CheckpointError(
                f"{self.directory}: no checkpoint can be restored ({listed}). Bring back a good copy of one of them, "
                "or begin again in a new workdir"
            )
        return None

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a checkpoint, with the shapes, dtypes and shardings of ``abstract_state``.

        Raises:
          CheckpointError: where it cannot be restored.
        """
        with self._checked(step):
            return self._read_state(step, abstract_state)

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone, without the optimizer state; raises as :meth:`restore`."""
        with self._checked(step):
            return self._read_state(step, {"params": abstract_params}, partial=True)["params"]

    def meta(self, step: int) -> dict[str, Any]:
        """The ``meta`` of a checkpoint; raises as :meth:`restore`."""
        with self._checked(step):
            return self._read_meta(step)

    @contextlib.contextmanager
    def _checked(self, step: int) -> Iterator[None]:
        try:
            self._check(step)
            yield
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory / str(step)}: cannot be restored: {error}") from None

    def _check(self, step: int) -> bool:
        """Whether there are checksums; raises where files differ. Every process reads a share of the files."""
        folder = self.directory / str(step)

        def check():
            problem = checksums.first_difference(folder, jax.process_index(), jax.process_count())
            if problem is not None:
                raise CheckpointError(problem)

        self._exchange.on_all(lambda: _patiently(check))
        return self._exchange.on_first((folder / checksums.NAME).exists)

    def _read_state(self, step: int, abstract: Any, partial: bool = False) -> Any:
        """Every process reads what it needs by itself, without barriers at which the others would wait for it."""
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        folder = self.directory / str(step) / "state"
        return self._exchange.on_all(lambda: _patiently(lambda: handler.restore(folder, args=args)))

    def _read_meta(self, step: int) -> dict[str, Any]:
        handler = ocp.JsonCheckpointHandler(multiprocessing_options=_alone())
        folder = self.directory / str(step) / "meta"
        return self._exchange.on_all(lambda: _patiently(lambda: handler.restore(folder)))

    def _set_aside(self, step: int, problem: str, used: int) -> None:
        folder = self.directory / str(step)

        def rename():
            names = (f"damaged-{step}" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
            aside = next(path for path in map(self.directory.joinpath, names) if not path.exists())
            folder.rename(aside)
            return aside.name

        self._writer.close()
        aside = folder.name if self._read_only else self._exchange.on_first(rename)
        process_checks.say(
            f"{folder} is damaged ({problem}), kept as {aside}; going on with {self.directory / str(used)}"
        )


def describe_newest(workdir: str | os.PathLike) -> str:
    """Return in words which checkpoint of a workdir is the newest complete one. For buckets, that takes an answer."""
    folder = epath.Path(os.fspath(workdir)) / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
    if not steps:
        return "no checkpoint is complete yet"
    return f"the newest complete checkpoint is {folder / str(max(steps))}"


def _alone() -> ocp.options.MultiprocessingOptions:
    me = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})


def _patiently(read: Callable[[], T]) -> T:
    """Reads again where it is the storage that fails, rather than what lies there."""
    for seconds in _READ_AGAIN_AFTER:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(seconds)
    return read()


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it computes with."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": sys.version.split()[0], "ttt_jax": ttt_jax.__version__, **found}
