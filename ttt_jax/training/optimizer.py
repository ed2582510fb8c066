"""Build the optimizer: AdamW with clipping, its schedules, and the guard against loss spikes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from ttt_jax import config as config_lib
from ttt_jax.errors import ConfigError
from ttt_jax.storage.workdir import Workdir

Schedule = Callable[[jax.Array], jax.Array]  # optimizer steps taken so far -> value
WINDOW = 100  # gradient norms that the guard remembers


def adamw(
    schedule: Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Clip by global norm, then apply AdamW with weight decay on every parameter, norms, biases and tau included."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay),
    )


# ---- Schedules


def learning_rate(peak: float, end: float, warmup_steps: int, total_steps: int) -> Schedule:
    """Return a linear warm-up from 0, then a cosine to ``end`` at ``total_steps``, which include the warm-up.

    The first update has rate 0.
    """
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(total_steps, warmup_steps + 1), end)


def warmup(steps: int) -> Schedule:
    """Return a linear warm-up from 0 to 1 over so many steps."""
    return lambda step: jnp.minimum(1.0, step / steps)


def schedules(config: ml_collections.ConfigDict) -> tuple[Schedule, Schedule]:
    """Return the learning rate and the warm-up of inner learning rates, as functions of the optimizer steps taken."""
    o, warmup_steps = config.optimizer, config_lib.steps(config, "optimizer.warmup")
    total = config_lib.steps(config, "training.duration")
    return learning_rate(o.peak_lr, o.end_lr, warmup_steps, total), warmup(warmup_steps)


def schedule_change(config: ml_collections.ConfigDict, saved: Any, step: int, workdir: Workdir) -> str | None:
    """Return one line if the rest of a run has other learning rates than its schedule so far; None if it has the same.

    Args:
      config: the config of the rest of the run.
      saved: the config in the checkpoint that the run continues from.
      step: the step of that checkpoint.
    """
    try:
        before = config_lib.from_dict(saved, workdir)
    except ConfigError:
        return None  # of another version
    rates = [[float(schedule(jnp.asarray(step))) for schedule in schedules(each)] for each in (before, config)]
    if np.allclose(rates[0], rates[1], rtol=1e-3, atol=0):
        return None
    if step < config_lib.steps(before, "training.duration"):
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


# ---- The guard against loss spikes


class GuardState(NamedTuple):
    """The state of the guard, a part of the train state, so that a resumed run judges as one that never stopped."""

    norms: jax.Array  # [WINDOW], of the last finite gradients; NaN where there has been none yet
    next: jax.Array  # where the next norm goes, int32 scalar
    skipped: jax.Array  # updates left out so far, int32 scalar
    in_a_row: jax.Array  # updates left out since the last one that was made, int32 scalar


def initial_guard() -> GuardState:
    """Return the state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return GuardState(jnp.full(WINDOW, jnp.nan), zero, zero, zero)


def judge_update(guard: GuardState, norm: jax.Array, factor: float) -> tuple[jax.Array, GuardState]:
    """Return whether an update may be made, judged by the global norm of its gradient, and the next state.

    The norm must be finite and, once there are :data:`WINDOW` norms, at most ``factor`` times their median. Finite
    norms of updates that are left out count for the median too, so that a level that lasts is accepted in time. With a
    factor of 0 every update is made, and the norms are remembered all the same.
    """
    finite = jnp.isfinite(norm)
    full = ~jnp.isnan(guard.norms[-1])
    allowed = finite & (~full | (norm <= factor * jnp.median(guard.norms))) if factor else jnp.ones((), bool)
    return allowed, GuardState(
        jnp.where(finite, guard.norms.at[guard.next].set(norm), guard.norms),
        jnp.where(finite, (guard.next + 1) % WINDOW, guard.next),
        guard.skipped + ~allowed,
        jnp.where(allowed, 0, guard.in_a_row + 1),
    )


def select_update(allowed: jax.Array, new: Any, old: Any) -> Any:
    """Return the tree after the update where it is allowed, else the tree before.

    Counts of steps advance either way: the schedule of the learning rate ends with the run.
    """

    def leaf(new, old):
        return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(allowed, new, old)

    return jax.tree.map(leaf, new, old)
