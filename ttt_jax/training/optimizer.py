"""AdamW with global-norm clipping, its learning rate, and the warm-up of inner learning rates."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

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
