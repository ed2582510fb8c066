"""What a longer or shorter duration does to the learning rates of a run that goes on."""

from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir import Workdir
from ttt_jax.training import compiled_step


def schedule_change(config: ml_collections.ConfigDict, saved: Any, step: int, workdir: Workdir) -> str | None:
    """Return one line where the learning rates at a step are not those of the schedule so far; None where they are.

    Args:
      config: of the rest of the run.
      saved: the config in the checkpoint that it goes on from.
    """
    try:
        before = config_lib.from_dict(saved, workdir)
    except ConfigError:
        return None  # of another version
    old, new = compiled_step.schedules(before), compiled_step.schedules(config)
    rates = [[float(schedule(jnp.asarray(step))) for schedule in pair] for pair in (old, new)]
    if np.allclose(rates[0], rates[1], rtol=1e-3, atol=0):
        return None
    total = config_lib.steps(before, "training.duration")
    if step < total:
        keep = f"to keep the old schedule: --config.training.duration={before.training.duration!r}"
    else:
        end = f"{config.optimizer.end_lr:g}"
        keep = (
            "a finished schedule cannot be prolonged; to train on at its last rate, begin a new workdir with "
            f"--config.training.start_from={workdir} --config.optimizer.peak_lr={end} --config.optimizer.end_lr={end}"
        )
    return (
        f"training.duration {before.training.duration!r} -> {config.training.duration!r}: at step {step} the learning "
        f"rate goes from {rates[0][0]:.3g} to {rates[1][0]:.3g} and the inner learning rate from {rates[0][1]:.3g} to "
        f"{rates[1][1]:.3g} of its peak; {keep}"
    )
