"""The loss-spike guard: an update whose gradient is out of proportion is left out.

It is judged by the global norm of the gradient against the median of those of the last 100 steps. The norms are part of
the train state, so that a run that is resumed judges as one that was never stopped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 100


class GuardState(NamedTuple):
    """What the guard remembers."""

    norms: jax.Array  # [WINDOW], of the last finite gradients; NaN where there has been none yet
    next: jax.Array  # where the next one goes, int32 scalar
    skipped: jax.Array  # updates left out so far, int32 scalar
    in_a_row: jax.Array  # and without one in between


def initial_state() -> GuardState:
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
