"""A trained model, from the workdir of its run, laid out over the devices that are here."""

import os
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding

from ttt_jax import config as config_lib
from ttt_jax import config_file
from ttt_jax import workdir as workdir_lib
from ttt_jax.config import ConfigError
from ttt_jax.models.language_model import LanguageModel
from ttt_jax.parallel import sharding
from ttt_jax.training import program
from ttt_jax.training.checkpoint import Checkpoints


class Trained(NamedTuple):
    """A model and its parameters after some step.

    Attributes:
      workdir: of the run.
      config: of the run; its mesh is the one here.
      model, params: logits are ``model.apply({"params": params}, tokens)[0]``, traced within :func:`sharding.on_mesh`.
      step: optimizer steps behind it.
      mesh, rules: what lies where.
      batch_sharding: of arrays [B, T]; B is a multiple of :attr:`rows`.
    """

    workdir: workdir_lib.Workdir
    config: ml_collections.ConfigDict
    model: LanguageModel
    params: Any
    step: int
    mesh: Mesh
    rules: sharding.ShardingRules
    batch_sharding: NamedSharding

    @property
    def rows(self) -> int:
        """Devices that a batch is split over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def load(workdir: str | os.PathLike, step: int | None = None, *, fsdp: int = 1, tensor: int = 1) -> Trained:
    """Restores a checkpoint of a run.

    Args:
      workdir: a folder, or a place on gs://.
      step: which checkpoint; None is the newest.
      fsdp, tensor: devices along these axes of the mesh; the data axis has the rest.

    Raises:
      ConfigError: where there is no such run or checkpoint, or it does not fit the devices.
      CheckpointError: where the checkpoint is damaged.
    """
    workdir = workdir_lib.at(workdir)
    config = config_file.from_json(workdir / "config.json").copy_and_resolve_references()
    config.mesh.update(data=-1, fsdp=fsdp, tensor=tensor)
    devices = jax.device_count()
    if devices % (fsdp * tensor):
        raise ConfigError(f"--fsdp {fsdp}, --tensor {tensor}: their product does not divide the {devices} devices here")
    config.data.batch_size, config.training.accumulation = devices // tensor, 1  # of training, where all fitted
    config.mesh.update(config_lib.mesh_shape(config, devices))
    run = program.make(config, sharding.make_mesh(config.mesh))
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"--workdir {workdir}: holds no checkpoint yet")
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.all_steps()
    if not steps:
        raise ConfigError(f"--workdir {workdir}: holds no checkpoint yet")
    if step is not None and step not in steps:
        raise ConfigError(f"--step {step}: no such checkpoint in {workdir}; expected one of {sorted(steps)}")
    step = max(steps) if step is None else step
    params = checkpoints.restore_params(step, run.abstract_state.params)
    checkpoints.close()
    config = config_file.from_json(workdir / "config.json").copy_and_resolve_references()
    config.mesh.update(run.config.mesh)
    return Trained(workdir, config, run.model, params, step, run.mesh, run.rules, run.batch_sharding)
