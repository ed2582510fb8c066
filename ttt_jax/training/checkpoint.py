"""Save and restore the checkpoints of a run: asynchronous, atomic, checked, in float32.

A checkpoint is a folder ``checkpoints/<step>`` with ``state`` (parameters, optimizer state, step), ``meta`` (JSON: the
data position, the config, the versions of the packages that wrote it) and the checksums of their files. Orbax writes
into a temporary folder and renames it once it is complete, so a run that is killed while saving leaves its earlier
checkpoints as they were.

Where a run has many processes, all of them make the same calls in the same order, and a call ends in the same way on
all of them: a failure on one process is a failure on all. Process 0 alone renames, deletes and prints.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from ttt_jax.distributed import agreement
from ttt_jax.distributed.agreement import Exchange
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.storage.workdir import Workdir, is_local
from ttt_jax.training.checkpoint_files import Reader, Writer

_SAVE_AGAIN_AFTER = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0)  # seconds
_POLL_STEPS = 10  # steps after which several processes ask each other whether a save has ended


class Restored(NamedTuple):
    """The step, the state and the ``meta`` of a checkpoint."""

    step: int
    state: Any
    meta: dict[str, Any]


def check_folder(workdir: Workdir) -> None:
    """Raise :class:`ConfigError` where no checkpoint can ever be saved in a local workdir."""
    folder = workdir / "checkpoints"
    if is_local(folder) and os.path.lexists(folder) and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(
            f"--workdir {workdir}: {folder} is not a folder that can be written to; expected one, or none"
        )


class Checkpoints:
    """The checkpoints of one run, under ``<workdir>/checkpoints``.

    Args:
      workdir: a folder, or a place on gs://.
      keep_last: number of the newest checkpoints that are kept.
      milestone_every: checkpoints at multiples of this many steps are kept for good; 0 for none.
      keep: a policy that chooses others to keep.
      read_only: whether to leave everything there as it is.
      save_again_after: seconds between the first failed save and the next attempt, the second and the next, and so on.
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
        policies = [checkpoint_managers.LatestN(keep_last), *([] if keep is None else [keep])]
        if milestone_every:
            policies.append(checkpoint_managers.EveryNSteps(milestone_every))
        is_url = "://" in os.fspath(workdir)
        self.directory = epath.Path(workdir if is_url else os.path.abspath(workdir)) / "checkpoints"
        self._read_only = read_only
        self._exchange = Exchange("checkpoints", CheckpointError)
        self._reader = Reader(self.directory, self._exchange)
        self._writer = Writer(self.directory, checkpoint_managers.AnyPreservationPolicy(policies), self._exchange)
        self._save_again_after = save_again_after
        self._failures = 0  # in a row
        self._due: float | None = None  # when to save again, after a failure

    # ---- List

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint; None where there is none."""
        return max(self.all_steps(), default=None)

    def all_steps(self) -> list[int]:
        """Return the steps of all complete checkpoints, sorted."""

        def find():
            if not self.directory.exists():
                return []
            return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory))

        return self._exchange.on_first(find)

    # ---- Save

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Start to write a checkpoint, and return once ``state`` may be changed.

        Do nothing if the checkpoint exists, or if a save has failed and the next attempt is not due yet. A failure is
        noticed, and printed on standard error, by the next call of a method of this class; see :meth:`wants_save`.

        Raises:
          CheckpointError: when all attempts have failed; it names the newest complete checkpoint.
        """
        self._end_of_save()
        if not self._is_due():
            return
        if step in self._known_steps():
            self._failures, self._due = 0, None
            return
        self._writer.start(step, state, meta)

    def wants_save(self, step: int) -> bool:
        """Return whether a save has failed and the current state should be saved instead. Call it after every step.

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
        """Save, in as many attempts as are allowed, and return when the checkpoint is complete.

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
        """Return when the save that is under way is complete, or has failed, which is printed."""
        try:
            self._end_of_save()
        except CheckpointError as error:
            agreement.print_once(str(error))

    def close(self) -> None:
        """Wait for the save that is under way, and close the writer."""
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
        agreement.print_once(f"{problem}; trying again in {seconds:g} s")

    def _known_steps(self) -> list[int]:
        """Return the steps of all complete checkpoints; none where the storage cannot be read."""
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
        """Return the newest checkpoint that is not damaged; None where there is no checkpoint.

        Newer checkpoints that are damaged are named on standard error and renamed to ``damaged-<step>``.

        Args:
          abstract_state: the shapes, dtypes and shardings of the state.

        Raises:
          CheckpointError: where all checkpoints are damaged (they stay as they are), or where one is as it was written
            but does not hold such a state.
        """
        self._end_of_save()
        damaged: dict[int, str] = {}
        for step in reversed(self.all_steps()):
            checked = False
            try:
                checked = self._reader.check(step)
                restored = Restored(step, self._reader.state(step, abstract_state), self._reader.meta(step))
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
        """Return the state of a checkpoint, with the shapes, dtypes and shardings of ``abstract_state``.

        Raises:
          CheckpointError: where it cannot be restored.
        """
        with self._checked(step):
            return self._reader.state(step, abstract_state)

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """Return the parameters alone, without the optimizer state; raise as :meth:`restore`."""
        with self._checked(step):
            return self._reader.state(step, {"params": abstract_params}, partial=True)["params"]

    def meta(self, step: int) -> dict[str, Any]:
        """Return the ``meta`` of a checkpoint; raise as :meth:`restore`."""
        with self._checked(step):
            return self._reader.meta(step)

    @contextlib.contextmanager
    def _checked(self, step: int) -> Iterator[None]:
        try:
            self._reader.check(step)
            yield
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory / str(step)}: cannot be restored: {error}") from None

    def _set_aside(self, step: int, problem: str, used: int) -> None:
        folder = self.directory / str(step)

        def rename():
            names = (f"damaged-{step}" + (f"-{i}" if i > 1 else "") for i in itertools.count(1))
            aside = next(path for path in map(self.directory.joinpath, names) if not path.exists())
            folder.rename(aside)
            return aside.name

        self._writer.close()
        aside = folder.name if self._read_only else self._exchange.on_first(rename)
        agreement.print_once(
            f"{folder} is damaged ({problem}), kept as {aside}; continuing with {self.directory / str(used)}"
        )


def describe_newest(workdir: str | os.PathLike) -> str:
    """Return a text that names the newest complete checkpoint of a workdir. In a bucket, this needs the network."""
    folder = epath.Path(os.fspath(workdir)) / "checkpoints"
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
    if not steps:
        return "no checkpoint is complete yet"
    return f"the newest complete checkpoint is {folder / str(max(steps))}"
