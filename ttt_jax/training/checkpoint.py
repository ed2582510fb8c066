"""Checkpoints of a run: asynchronous, atomic, float32, with everything that a resume needs.

A checkpoint is two items under ``checkpoints/<step>``: ``state`` (parameters, optimizer state, step) and ``meta``
(JSON: the data position, the config, the versions of what wrote it). Orbax writes into a temporary folder and renames
it when all is there, so a run that is killed while saving leaves the checkpoints before it as they were.
"""

import importlib.metadata
import logging
import sys
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

import ttt_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Checkpoints:
    """The checkpoints of one run, under ``<workdir>/checkpoints``.

    Args:
      keep_last: how many of the newest are kept.
      milestone_every: checkpoints at multiples of this many steps are kept for good; 0 for none.
    """

    def __init__(self, workdir: Path, *, keep_last: int = 1, milestone_every: int = 0, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells of every file it touches
        policies = [checkpoint_managers.LatestN(keep_last)]
        if milestone_every:
            policies.append(checkpoint_managers.EveryNSteps(milestone_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Optimizer steps in the newest complete checkpoint; None where there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return list(self._manager.all_steps())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns once ``state`` may be changed. Does nothing if it is there already."""
        if step in self.all_steps():
            return
        self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        )

    def meta(self, step: int) -> dict[str, Any]:
        """The ``meta`` of a checkpoint."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, step: int, abstract_state: Any) -> Any:
        """The state of a checkpoint, with the shapes, dtypes and shardings of ``abstract_state``."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        return self._manager.restore(step, args=args).state

    def restore_params(self, step: int, abstract_params: Any) -> Any:
        """The parameters alone, without reading the optimizer state."""
        item = {"params": abstract_params}
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True))
        return self._manager.restore(step, args=args).state["params"]

    def wait(self) -> None:
        """Returns when what was saved is complete on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes what is being saved."""
        self._manager.close()


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it computes with."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": sys.version.split()[0], "ttt_jax": ttt_jax.__version__, **found}
