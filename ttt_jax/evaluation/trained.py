"""Load a trained model from the workdir of its run onto the available devices."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding

from ttt_jax.distributed import agreement, sharding
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.models import pattern
from ttt_jax.models.language_model import LanguageModel
from ttt_jax.storage import checksums
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.training import run_config, validation
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.step import build_program, with_checked_kernels


class Trained(NamedTuple):
    """A model and the parameters of one of its checkpoints.

    Attributes:
      workdir: of the run.
      config: of the run.
      model, params: logits are ``model.apply({"params": params}, tokens)[0]``, traced within :func:`sharding.on_mesh`.
      step: the number of optimizer steps of the checkpoint.
      fingerprint: the hash of the checkpoint's checksums; empty if it has none.
      mesh, rules: how arrays are laid out over devices.
      batch_sharding: of arrays [B, T]; B is a multiple of :attr:`rows`.
    """

    workdir: workdir_lib.Workdir
    config: ml_collections.ConfigDict
    model: LanguageModel
    params: Any
    step: int
    fingerprint: str
    mesh: Mesh
    rules: sharding.ShardingRules
    batch_sharding: NamedSharding

    @property
    def name(self) -> str:
        """Return the run's name: the name of its folder."""
        return self.workdir.resolve().name

    @property
    def description(self) -> dict[str, Any]:
        """Return name, model, number of parameters and training context, as the files of results hold them."""
        return {
            "workdir": self.name,
            "model": pattern.describe(self.config.model),
            "parameters": sum(x.size for x in jax.tree.leaves(self.params)),
            "training_context": self.config.data.sequence_length,
        }

    @property
    def rows(self) -> int:
        """Return the number of devices that a batch is split over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def steps(workdir: workdir_lib.Workdir, wanted: str = "newest") -> list[int]:
    """Return the steps of a run's checkpoints.

    Args:
      wanted: ``newest``, ``best`` (the lowest validation loss during training), ``all``, or steps: ``100,200``.

    Raises:
      ConfigError: if there is no such checkpoint.
    """
    run_config.load(workdir)  # raises if this is not a workdir
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"--workdir {workdir}: holds no checkpoint yet")
    found = _all_steps(workdir)
    if not found:
        raise ConfigError(f"--workdir {workdir}: holds no checkpoint yet")
    if wanted == "newest":
        return found[-1:]
    if wanted == "all":
        return found
    if wanted == "best":
        losses = validation.read_losses(workdir)
        best = validation.best_step(losses, found)
        if best is None and losses:
            raise ConfigError(
                f"--step best: {workdir} has no checkpoint with a finite validation loss; expected newest, all or steps"
            )
        if best is None:
            raise ConfigError(
                f"--step best: {workdir} was trained without evaluation.every; expected newest, all or steps"
            )
        return [best]
    chosen = wanted.split(",")
    for step in chosen:
        if not step.isdecimal() or int(step) not in found:
            raise ConfigError(
                f"--step {step}: no such checkpoint in {workdir}; expected newest, best, all or some of "
                f"{', '.join(map(str, found))}"
            )
    return [int(step) for step in chosen]


def loaded(workdir: str | os.PathLike, wanted: str = "newest", *, fsdp: int = 1, tensor: int = 1) -> Iterator[Trained]:
    """Yield the model of each wanted checkpoint, restoring one at a time.

    A training that is still running may remove checkpoints. If the newest or the best is gone, the current newest or
    best is loaded instead. With ``all``, checkpoints that are gone are named on standard error and left out, unless
    none is left.

    Args:
      wanted, fsdp, tensor: as for :func:`steps` and :func:`load`.

    Raises:
      ConfigError, CheckpointError: as :func:`steps` and :func:`load`.
    """
    workdir = workdir_lib.at(workdir)
    waiting, any_loaded = steps(workdir, wanted), False
    while waiting:
        step = waiting.pop(0)
        try:
            found = _load(workdir, step, fsdp, tensor)
        except (ConfigError, CheckpointError):
            if step in _all_steps(workdir):
                raise
            if wanted not in ("newest", "best", "all"):
                raise
            if wanted == "all":
                agreement.print_once(f"{workdir}: the checkpoint of step {step} was removed; left out")
            if not waiting and not any_loaded:
                waiting = steps(workdir, wanted)
            continue
        any_loaded = True
        yield found


def load(workdir: str | os.PathLike, step: int | None = None, *, fsdp: int = 1, tensor: int = 1) -> Trained:
    """Restore a checkpoint of a run.

    Args:
      workdir: a local folder, or a path on gs://.
      step: of the checkpoint; None for the newest.
      fsdp, tensor: the numbers of devices along these axes of the mesh; the data axis has the rest.

    Raises:
      ConfigError: if the run or the checkpoint does not exist, or does not fit the devices.
      CheckpointError: if the checkpoint is damaged.
    """
    return next(loaded(workdir, "newest" if step is None else str(step), fsdp=fsdp, tensor=tensor))


def _load(workdir: workdir_lib.Workdir, step: int, fsdp: int, tensor: int) -> Trained:
    config = run_config.load(workdir).copy_and_resolve_references()
    run = build_program(config, sharding.make_mesh(_mesh_shape(config, fsdp, tensor)))
    with workdir_lib.explained(workdir):
        sums = workdir / "checkpoints" / str(step) / checksums.NAME
        fingerprint = hashlib.blake2b(sums.read_bytes(), digest_size=8).hexdigest() if sums.exists() else ""
    checkpoints = Checkpoints(workdir, read_only=True)
    params = checkpoints.restore_params(step, run.abstract_state.params)
    checkpoints.close()
    run = with_checked_kernels(run)
    return Trained(workdir, config, run.model, params, step, fingerprint, run.mesh, run.rules, run.batch_sharding)


def _all_steps(workdir: workdir_lib.Workdir) -> list[int]:
    checkpoints = Checkpoints(workdir, read_only=True)
    found = checkpoints.all_steps()
    checkpoints.close()
    return found


def _mesh_shape(config: ml_collections.ConfigDict, fsdp: int, tensor: int) -> dict[str, int]:
    devices = jax.device_count()
    if devices % (fsdp * tensor):
        raise ConfigError(f"--fsdp {fsdp}, --tensor {tensor}: their product does not divide the {devices} devices here")
    if config.model.num_heads % tensor:
        raise ConfigError(f"--tensor {tensor}: does not divide model.num_heads={config.model.num_heads}")
    return {"data": devices // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
