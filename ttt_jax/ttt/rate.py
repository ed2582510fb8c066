"""Compute the inner learning rate: a part per token times a part per position.

    eta[t, s] = position_eta[t] * token_eta[s]

is the rate with which the gradient of token s is followed in the weights W_t that token t sees. For TTT-Linear and
TTT-MLP, with t = 1 ... b the position of the token in its mini-batch, x_s the input of the layer and theta, tau trained
by the outer loop,

    token_eta[s] = eta_base sigmoid(theta . x_s) / d          position_eta[t] = max(0, 1 / t + tau[t])

The part per token may differ for each weight matrix of the learner.

Shapes: B batch, T tokens, H heads, M weight matrices, b tokens per mini-batch.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# (logits [B, T, H] or [B, T, H, M], base rate, scale of the warm-up, width of keys) -> token_eta of the logits' shape.
TOKEN_RATES: dict[str, Callable[[jax.Array, float, jax.Array | float, int], jax.Array]] = {
    "sigmoid/d": lambda logits, base, scale, d: base * scale / d * jax.nn.sigmoid(logits),  # the paper's
    "sigmoid": lambda logits, base, scale, d: base * scale * jax.nn.sigmoid(logits),
    "softplus": lambda logits, base, scale, d: scale * jax.nn.softplus(logits + softplus_inverse(base)),  # LaCT's
}
# (t [b] from 1 to b, tau [b]) -> position_eta [b].
POSITION_RATES: dict[str, Callable[[jax.Array, jax.Array | float], jax.Array]] = {
    "1/t": lambda t, tau: jnp.maximum(0.0, 1 / t + tau),  # the paper's
    "1": lambda t, tau: jnp.ones_like(t),
}


@dataclasses.dataclass(frozen=True)
class Rate:
    """The rate with which gradients are followed.

    Attributes:
      token: a name in :data:`TOKEN_RATES`.
      position: a name in :data:`POSITION_RATES`.
      per_matrix: whether each weight matrix of the learner has its own rate per token.
    """

    token: str = "sigmoid/d"
    position: str = "1/t"
    per_matrix: bool = False

    def token_eta(self, logits: jax.Array, base: float, scale: jax.Array | float, d: int) -> jax.Array:
        """Return the part per token, of the shape of the logits: [B, T, H] or [B, T, H, M].

        Args:
          base: the factor of the sigmoid; for softplus, the rate at logits of 0.
          scale: multiplies the rate (its warm-up).
          d: width of the keys.
        """
        return TOKEN_RATES[self.token](logits, base, scale, d)

    def position_eta(self, b: int, tau: jax.Array | float = 0.0) -> jax.Array:
        """Return the part per position, [b]; ``tau`` [b] is added where the part has a trained offset."""
        return POSITION_RATES[self.position](jnp.arange(1.0, b + 1), tau)


def softplus_inverse(y: float) -> float:
    """Return x such that ``softplus(x) = y``."""
    return y + math.log(-math.expm1(-y))
