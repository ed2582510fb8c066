"""Define the self-supervised loss of the inner loop: of a learner's output ``f(k)`` and the value ``v``, per token.

Shapes: f(k) and v are [..., b, d], the loss is [..., b].
"""

from collections.abc import Callable

import jax

Objective = Callable[[jax.Array, jax.Array], jax.Array]


def squared_error(f_k: jax.Array, v: jax.Array) -> jax.Array:
    """Return ``1/2 || f(k) - v ||^2``."""
    return 0.5 * ((f_k - v) ** 2).sum(-1)


def dot_product(f_k: jax.Array, v: jax.Array) -> jax.Array:
    """Return ``-<f(k), v>``."""
    return -(f_k * v).sum(-1)


OBJECTIVES: dict[str, Objective] = {
    "squared_error": squared_error,
    "dot_product": dot_product,
}
