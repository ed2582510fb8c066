"""AdamW with global-norm clipping, its learning rate, and the warm-up of inner learning rates."""

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


def learning_rate(peak: float, end: float, warmup_steps: int, total_steps: int) -> Schedule:
    """Linear warm-up from 0, then cosine to ``end`` at ``total_steps``, which include the warm-up. The first update
    has rate 0."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(total_steps, warmup_steps + 1), end)


def warmup(steps: int) -> Schedule:
    """How far a warm-up of so many steps has come: linear from 0 to 1."""
    return lambda step: jnp.minimum(1.0, step / steps)


def adamw(
    schedule: Schedule,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with weight decay on every parameter: norms, biases and tau included."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay),
    )


def schedules(config: ml_collections.ConfigDict) -> tuple[Schedule, Schedule]:
    """Return the learning rate, and how far the warm-up of inner learning rates has come, by optimizer steps taken."""
    o, warmup_steps = config.optimizer, config_lib.steps(config, "optimizer.warmup")
    total = config_lib.steps(config, "training.duration")
    return learning_rate(o.peak_lr, o.end_lr, warmup_steps, total), warmup(warmup_steps)


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
    old, new = schedules(before), schedules(config)
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


WINDOW = 100


class GuardState(NamedTuple):
    """What the guard remembers."""

    norms: jax.Array  # [WINDOW], of the last finite gradients; NaN where there has been none yet
    next: jax.Array  # where the next one goes, int32 scalar
    skipped: jax.Array  # updates left out so far, int32 scalar
    in_a_row: jax.Array  # and without one in between


def initial_guard() -> GuardState:
    """Before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return GuardState(jnp.full(WINDOW, jnp.nan), zero, zero, zero)


def judge(guard: GuardState, norm: jax.Array, factor: float) -> tuple[jax.Array, GuardState]:
    """Whether an update of this gradient norm may be made, and what the guard remembers afterwards.

    It may when the norm is finite, and at most ``factor`` times the median once there are :data:`WINDOW` norms. Finite
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


def choose(allowed: jax.Array, new: Any, old: Any) -> Any:
    """The tree after the update where it is allowed, else the one before.

    Counts of steps go on either way: the schedule of the learning rate ends with the run.
    """

    def leaf(new, old):
        return new if jnp.issubdtype(new.dtype, jnp.integer) else jnp.where(allowed, new, old)

    return jax.tree.map(leaf, new, old)
