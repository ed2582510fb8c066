"""Define the loss: from the last hidden states to the mean over rows of the losses of tokens.

The logits of long sequences do not fit into memory. They are computed a chunk of tokens at a time, and with them the
gradients, which the loss of a chunk determines up to a factor. So no product is computed twice, and the logits of a
chunk stay in the fast memory of a TPU.

Shapes: B batch, T tokens, V vocabulary, D width. Within a device: N tokens, in chunks of C, and a part of V.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ttt_jax.distributed import sharding
from ttt_jax.layers.linear import HEAD_AXES, project

# By the schedule of a v5e, forward and backward, with V = 32000 and D = 768: 2048 tokens take 1.98 ms at once and 2.30
# in chunks of 512; 8192 tokens take 7.9 ms and 1 GB at once, and 8.8 ms and no memory in chunks of 512.
MOST_LOGITS = 2048 * 32768  # of a device at once
_CHUNK_LOGITS = 512 * 32768  # 67 MB in float32, half of the fast memory of a v5e


def token_nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the negative log-likelihood of each target in nats, [B, T], float32; NaN for one that is no word."""
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - _at(logits, targets) + _nan_unless_word(targets, logits.shape[-1])


def mean_over_rows(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean over rows of the masked mean of each row.

    Rows are not weighted by their numbers of tokens, and a row that is fully masked counts as 0.

    Args:
      values, mask: [B, T].
    """
    mask = mask.astype(jnp.float32)
    return ((values * mask).sum(-1) / jnp.maximum(mask.sum(-1), 1e-10)).mean()


def of_hidden_states(h: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return the mean over rows of the masked mean of the losses of each row.

    Args:
      h: [B, T, D], the last hidden states.
      head: [D, V], float32.
      targets, mask: [B, T].
      dtype: of the products.
    """
    logits = h.shape[0] * h.shape[1] * head.shape[1]
    if logits <= MOST_LOGITS * sharding.parts_of("batch") * sharding.parts_of("vocab"):
        return mean_over_rows(token_nll(project(h, head, HEAD_AXES, dtype, jnp.float32), targets), mask)
    mask = mask.astype(jnp.float32)
    weights = mask / (jnp.maximum(mask.sum(-1, keepdims=True), 1e-10) * len(mask))
    return _in_chunks(h.astype(dtype), head, targets, weights + _nan_unless_word(targets, head.shape[1]), dtype)


def _nan_unless_word(targets: jax.Array, words: int) -> jax.Array:
    return jnp.where((targets >= 0) & (targets < words), 0.0, jnp.nan)


def _at(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the logits of targets; 0 where a target is not among them.

    The sum over a mask joins another pass over the logits. On a TPU, reading logits by index takes as long as the
    products with the head, backwards.
    """
    return jnp.where(_hits(logits, targets), logits, 0).sum(-1)


def _hits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]


# ---- In chunks


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_chunks(h, head, targets, weights, dtype):
    """Return the sum of the weighted losses of tokens; it is not differentiated with respect to the weights."""
    return _with_gradients(h, head, targets, weights, dtype)[0]


def _in_chunks_forward(h, head, targets, weights, dtype):
    loss, *gradients = _with_gradients(h, head, targets, weights, dtype)
    return loss, gradients


def _in_chunks_backward(dtype, gradients, g):
    of_h, of_head = gradients
    return (of_h * g).astype(of_h.dtype), of_head * g, None, None


_in_chunks.defvjp(_in_chunks_forward, _in_chunks_backward)


def _with_gradients(h, head, targets, weights, dtype):
    """Return the loss and its gradients with respect to h and the head."""

    def of_device(h, head, targets, weights):
        words = head.shape[1]
        targets = targets - words * sharding.part_of("vocab")

        def of_chunk(carry, chunk):
            loss, of_head = carry
            h, targets, weights = chunk  # [C, D], [C], [C]
            logits = jnp.dot(h, head, preferred_element_type=jnp.float32)  # [C, V]
            largest = sharding.max_over(logits.max(-1), "vocab")
            odds = jnp.exp(logits - largest[:, None])
            total = sharding.sum_over(odds.sum(-1), "vocab")
            loss += (weights * (jnp.log(total) + largest - sharding.sum_over(_at(logits, targets), "vocab"))).sum()
            of_logits = weights[:, None] * (odds / total[:, None] - _hits(logits, targets))
            of_logits = of_logits.astype(dtype)
            of_h = sharding.sum_over(jnp.dot(of_logits, head.T, preferred_element_type=jnp.float32), "vocab")
            of_head += jnp.dot(h.T, of_logits, preferred_element_type=jnp.float32)
            return (loss, of_head), of_h.astype(dtype)

        size = max(1, _CHUNK_LOGITS // words)
        zero = jnp.zeros(()), jnp.zeros(head.shape, jnp.float32)
        (loss, of_head), of_h = _scan(of_chunk, zero, (h, targets, weights), size)
        return sharding.sum_over_rows(loss), of_h, sharding.sum_over_rows(of_head, *HEAD_AXES)

    tokens, words = P("batch"), P(None, HEAD_AXES[1])
    program = sharding.locally(of_device, (tokens, words, tokens, tokens), (P(), tokens, P(*HEAD_AXES)))
    return program(h, sharding.gathered(head.astype(dtype), *HEAD_AXES), targets, weights)


def _scan(of_chunk, zero, tokens, size):
    """Read chunks of ``size`` tokens one after another, with padding of weight 0 in the last.

    Args:
      tokens: arrays [B, T, ...].

    Returns:
      The last carry, and an array [B, T, ...] of what is returned for each chunk.
    """
    rows, length = tokens[0].shape[:2]
    count = -(-rows * length // size)

    def cut(x):
        x = x.reshape(rows * length, *x.shape[2:])
        return jnp.pad(x, ((0, count * size - len(x)), *((0, 0),) * (x.ndim - 1))).reshape(count, size, *x.shape[1:])

    carry, found = jax.lax.scan(of_chunk, zero, tuple(map(cut, tokens)))
    found = found.reshape(count * size, *found.shape[2:])[: rows * length]
    return carry, found.reshape(rows, length, *found.shape[1:])
