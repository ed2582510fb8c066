"""Prepare a run before its first step: check the processes, open the data, and find the state that it begins with."""

import hashlib
import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax.traverse_util import flatten_dict

import ttt_jax
from ttt_jax import config as config_lib
from ttt_jax.data import named_sources, token_source
from ttt_jax.distributed import agreement, sharding
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.models import language_model
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir
from ttt_jax.training import checkpoint, metrics, optimizer, run_config, validation
from ttt_jax.training.checkpoint import Checkpoints
from ttt_jax.training.step import Program, build_program

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Prepared(NamedTuple):
    """The program and the data of a run."""

    run: Program
    data: token_source.TokenSource
    held_out: token_source.TokenSource | None  # None where the run has no validation


def prepare(config: ml_collections.ConfigDict, workdir: Workdir) -> Prepared:
    """Build the program, open the data, and make the workdir.

    Every process does this by itself, before the processes do anything together.
    """
    mesh = sharding.make_mesh(config_lib.mesh_shape(config, jax.device_count()))
    run = build_program(config, mesh)
    data = named_sources.from_config(config, "train")
    token_source.check(data, config.model.vocab_size, config.data.sequence_length, windows=config.data.batch_size)
    held_out = None
    if config_lib.steps(config, "evaluation.every"):
        held_out = named_sources.from_config(config, config.evaluation.split)
        token_source.check(held_out, config.model.vocab_size, config.data.sequence_length)
    metrics.check_destinations(workdir, tensorboard=config.log.tensorboard, wandb=bool(config.log.wandb_project))
    workdir_lib.make(workdir)
    return Prepared(run, data, held_out)


def check_processes(config: ml_collections.ConfigDict, workdir: Workdir) -> None:
    """Check that all processes have the same config, workdir, code and packages.

    Raises:
      ConfigError: where they differ.
    """
    agreement.check_same(
        {
            "config": config.to_dict(),
            "workdir": str(workdir),
            "versions": versions(),
            "code": _hash_of_source(),
        }
    )


def restore(
    config: ml_collections.ConfigDict,
    workdir: Workdir,
    prepared: Prepared,
    fingerprint: str,
    checkpoints: Checkpoints,
    best: validation.KeepBest,
) -> checkpoint.Restored | None:
    """Return the newest checkpoint of the run, or None for a new run.

    What the rest of the run does differently from the part before the checkpoint is printed on standard error.

    Args:
      fingerprint: of the training data.
      best: is given the validation losses up to the checkpoint.

    Raises:
      ConfigError: where the checkpoint is of other data.
      CheckpointError: where no checkpoint can be restored.
    """
    restored = checkpoints.restore_newest(prepared.run.abstract_state)
    if restored is None:
        return None
    run_config.check_same_data(restored.meta["data"], fingerprint, prepared.data.name)
    saved_config = restored.meta.get("config")
    is_finished = restored.step >= config_lib.steps(config, "training.duration")
    if not is_finished and (change := optimizer.schedule_change(config, saved_config, restored.step, workdir)):
        agreement.print_once(change)
    best.losses = validation.read_losses(workdir, restored.step)
    if best.losses and (change := validation.other_tokens(saved_config, config)):
        agreement.print_once(change)
    return restored


def load_parameters(config: ml_collections.ConfigDict, abstract_params: Any) -> tuple[Any, str]:
    """Return the parameters of the run that ``training.start_from`` names, and a text that says where they are from.

    It is a workdir, whose newest checkpoint is taken, or ``WORKDIR/checkpoints/STEP``. The optimizer state, the
    schedule and the data of the new run begin anew.

    Args:
      abstract_params: the shapes, dtypes and shardings of the parameters.

    Raises:
      ConfigError: where there is no such checkpoint, or its model has parameters of other shapes.
      CheckpointError: where the checkpoint cannot be restored.
    """
    source, step = agreement.on_all(lambda: _find_source(config, abstract_params))
    checkpoints = Checkpoints(source, read_only=True)
    try:
        steps = checkpoints.all_steps()
        if not steps or (step is not None and step not in steps):
            expected = f"one of {', '.join(map(str, steps))}" if steps else "a run that has saved a checkpoint"
            raise ConfigError(
                f"training.start_from={config.training.start_from}: no such checkpoint; expected {expected}"
            )
        while True:
            chosen = steps[-1] if step is None else step
            try:
                return checkpoints.restore_params(chosen, abstract_params), f"{source}, step {chosen}"
            except CheckpointError:
                # A training that continues in the other workdir removes its older checkpoints.
                steps = checkpoints.all_steps()
                if step is not None or not steps or chosen in steps:
                    raise
    finally:
        checkpoints.close()


def _find_source(config: ml_collections.ConfigDict, abstract_params: Any) -> tuple[Workdir, int | None]:
    """Return the workdir of the other run, and the step of the checkpoint; None for the newest."""
    named = config.training.start_from.rstrip("/")
    match = re.fullmatch(r"(.+)/checkpoints/(\d+)", named)
    try:
        source = workdir_lib.at(match[1] if match else named)
        other = run_config.load(source)
    except ConfigError as error:
        raise ConfigError(f"training.start_from: {str(error).removeprefix('--workdir ')}") from error
    if _shapes(abstract_params) != _shapes(_abstract_params(other.model)):
        differing = config_lib.differing_keys(other.model.to_dict(), config.model.to_dict(), "model.")
        raise ConfigError(
            f"training.start_from={named}: has parameters of other shapes ({run_config.describe_changes(differing)}); "
            "expected the same"
        )
    return source, int(match[2]) if match else None


def _abstract_params(model: ml_collections.ConfigDict) -> Any:
    module = language_model.build_model(model)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in flatten_dict(params, sep="/").items()}


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the packages that compute its numbers."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": sys.version.split()[0], "ttt_jax": ttt_jax.__version__, **packages}


def _hash_of_source() -> str:
    """Return a hash of the source files of this package."""
    folder = Path(ttt_jax.__file__).parent
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.py")):
        digest.update(os.fspath(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
