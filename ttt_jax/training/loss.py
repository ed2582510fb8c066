"""Compute the next-token loss.

Shapes: B batch, T tokens, V vocabulary.
"""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax


class Batch(TypedDict):
    """A batch of windows."""

    inputs: Any  # [B, T] integers
    targets: Any  # [B, T] integers: the inputs one token later
    mask: Any  # [B, T] 1 where the target counts, 0 where it is BOS or padding


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the negative log-likelihood of each target in nats, [B, T], float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def mean_over_rows(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean over rows of the masked mean of each row.

    Rows are not weighted by their numbers of tokens, and a row that is fully masked counts as 0.

    Args:
      values, mask: [B, T].
    """
    mask = mask.astype(jnp.float32)
    return ((values * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1e-10)).mean()
