"""Where a run takes its first parameters from: another run, as a fine-tuning does."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax.traverse_util import flatten_dict

from ttt_jax import config as config_lib
from ttt_jax.distributed import process_checks
from ttt_jax.errors import CheckpointError, ConfigError
from ttt_jax.models import language_model
from ttt_jax.storage import workdir as workdir_lib
from ttt_jax.storage.workdir import Workdir
from ttt_jax.training import run_config
from ttt_jax.training.checkpoint import Checkpoints


def parameters(config: ml_collections.ConfigDict, abstract_params: Any) -> tuple[Any, str]:
    """The parameters that ``training.start_from`` names, and in words where they are from.

    It is the workdir of a run, whose newest checkpoint is taken, or ``WORKDIR/checkpoints/STEP``. All else of a run
    begins anew: optimizer state, schedule, data.

    Args:
      abstract_params: their shapes, dtypes and shardings.

    Raises:
      ConfigError: where there is no such checkpoint, or its model has parameters of other shapes.
      CheckpointError: where it cannot be restored.
    """
    source, step = process_checks.on_all(lambda: _source(config, abstract_params))
    checkpoints = Checkpoints(source, read_only=True)
    try:
        steps = checkpoints.all_steps()
        if not steps or (step is not None and step not in steps):
            there = f"one of {', '.join(map(str, steps))}" if steps else "a run that has saved a checkpoint"
            raise ConfigError(f"training.start_from={config.training.start_from}: no such checkpoint; expected {there}")
        while True:
            chosen = steps[-1] if step is None else step
            try:
                return checkpoints.restore_params(chosen, abstract_params), f"{source}, step {chosen}"
            except CheckpointError:
                steps = checkpoints.all_steps()  # a training that goes on removes those that are not the newest
                if step is not None or not steps or chosen in steps:
                    raise
    finally:
        checkpoints.close()


def _source(config: ml_collections.ConfigDict, abstract_params: Any) -> tuple[Workdir, int | None]:
    """The workdir of the other run, and the step of its checkpoint that is asked for."""
    named = config.training.start_from.rstrip("/")
    match = re.fullmatch(r"(.+)/checkpoints/(\d+)", named)
    try:
        source = workdir_lib.at(match[1] if match else named)
        theirs = run_config.load(source)
    except ConfigError as error:
        raise ConfigError(f"training.start_from: {str(error).removeprefix('--workdir ')}") from error
    ours, there = _shapes(abstract_params), _shapes(_abstract_params(theirs.model))
    if ours != there:
        differing = config_lib.differing_keys(theirs.model.to_dict(), config.model.to_dict(), "model.")
        listed = ", ".join(f"{key} {there!r} there, {here!r} here" for key, (there, here) in differing.items())
        raise ConfigError(f"training.start_from={named}: has parameters of other shapes ({listed}); expected the same")
    return source, int(match[2]) if match else None


def _abstract_params(model: ml_collections.ConfigDict) -> Any:
    module = language_model.build_model(model)
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in flatten_dict(params, sep="/").items()}
