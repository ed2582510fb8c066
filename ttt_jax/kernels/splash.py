"""Attend causally by splash attention, fused kernels for TPUs.

Blocks of logits stay in fast memory, forwards and backwards, and blocks that no query of a block sees are skipped. The
forward kernel is the one that comes with JAX. The backward kernel of JAX stores a gradient of all queries for every
block of keys, and adds them up outside; that of :mod:`ttt_jax.kernels.splash_backward` does not.

Shapes: B batch, T tokens, H heads, G heads of keys and values, d head width.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as library

from ttt_jax.kernels import splash_backward
from ttt_jax.kernels.derivatives import differentiable_once

_ONCE = "splash attention has no second derivative; use model.attention.kernel=xla"
_BLOCKS = (1024, 512, 256, 128)  # tokens; the largest is the fastest by the schedule of a v5e
_MOST_PADDING = 1 / 8  # of the tokens

# By the schedule of a v5e, training steps of models with 12 and 32 heads of 64 features are faster by splash from here
# on, with and without a window: docs/attention.md has the times.
FROM_TOKENS = 2048
MOST_TOKENS = 65_536  # that a token sees; the sums of the gradients of so many queries fit into fast memory


def choose(kernel: str, tokens: int, head_dim: int, dtype: jnp.dtype, device: str, window: int | None = None) -> bool:
    """Return whether attention is computed by the kernels.

    Args:
      kernel: ``auto``, ``splash``, or another one.
      tokens: T.
      device: the kind of device, as JAX names it.
      window: the number of tokens that a token sees; None: all.

    Raises:
      ValueError: where ``splash`` is asked for, and cannot be used.
    """
    reason = unsupported(head_dim, dtype) if device.startswith("TPU") else f"there is none for {device}"
    if reason is None and min(tokens, window or tokens) > MOST_TOKENS:
        reason = f"tokens see up to {min(tokens, window or tokens)} tokens, and the kernel takes {MOST_TOKENS}"
    if kernel == "splash" and reason is not None:
        raise ValueError(reason)
    if kernel != "auto" or reason is not None:
        return kernel == "splash"
    return tokens >= FROM_TOKENS


def unsupported(head_dim: int, dtype: jnp.dtype) -> str | None:
    """Return why the kernel is not used for heads of this width and dtype; None where it may be used."""
    if dtype != jnp.bfloat16:
        return f"the dtype is {jnp.dtype(dtype).name}, and the products of the kernel are those of bfloat16"
    if head_dim % 64:
        return f"heads of {head_dim} features do not fill registers"
    return None


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None = None,
    documents: jax.Array | None = None,
    *,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return softmax attention of each token to itself and earlier ones, [B, T, H, d].

    Args:
      q: [B, T, H, d].
      k, v: [B, T, G, d], where G divides H.
      window: the number of tokens that a token sees, including itself; None: all.
      documents: int [B, T]; a token sees tokens of its own document only. None: all are of one.
      name: a name for what the backward pass needs of the forward kernel, by which rematerialisation may keep it.
      interpret: whether to run the kernels without a TPU.

    Raises:
      NotImplementedError: where the gradient is differentiated again.
    """
    tokens = q.shape[1]
    size, padded = blocks(tokens)
    q, k, v = differentiable_once((q, k, v), _ONCE)
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)

    def laid_out(x: jax.Array) -> jax.Array:
        """Return x as [B, heads, padded, d]; no token sees the padding, which is behind all tokens."""
        return jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))).swapaxes(1, 2)

    if documents is not None:
        documents = jnp.pad(documents.astype(jnp.int32), ((0, 0), (0, padded - tokens)))
    run = _Run(window, size, name, interpret)
    y = differentiable_once(_attend(laid_out(scaled), laid_out(k), laid_out(v), documents, run), _ONCE)
    return y.swapaxes(1, 2)[:, :tokens]


@dataclasses.dataclass(frozen=True)
class _Run:
    """The options of the kernels; ``block`` is the number of tokens of a block."""

    window: int | None
    block: int
    name: str | None
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None, run: _Run) -> jax.Array:
    """Return the output [B, H, T, d] of scaled queries [B, H, T, d] with keys and values [B, G, T, d]."""
    return _by_library(q, k, v, documents, run, save_residuals=False)


def _forward(q, k, v, documents, run):
    y, (logsumexp,) = _by_library(q, k, v, documents, run, save_residuals=True)
    if run.name is not None:
        y, logsumexp = (checkpoint_name(x, run.name) for x in (y, logsumexp))
    return y, (q, k, v, documents, y, logsumexp)


def _backward(run, kept, dy):
    q, k, v, documents, y, logsumexp = kept
    found = splash_backward.gradients(
        q, k, v, y, logsumexp, dy, documents, window=run.window, block=run.block, interpret=run.interpret
    )
    return *found, None


_attend.defvjp(_forward, _backward)


def _by_library(q, k, v, documents, run, *, save_residuals):
    """Call the forward kernel, which also returns the logsumexp [B, H, T] with ``save_residuals``."""
    heads, tokens = q.shape[1:3]
    shape = (tokens, tokens)
    # The window of the library counts the tokens before the token itself.
    mask = library.CausalMask(shape) if run.window is None else library.LocalMask(shape, (run.window - 1, 0), 0)
    block, part = run.block, min(run.block, 512)
    kernel = library.make_splash_mha_single_device(
        library.MultiHeadMask([mask] * heads),
        block_sizes=library.BlockSizes(block_q=block, block_kv=block, block_kv_compute=part),
        save_residuals=save_residuals,
        interpret=run.interpret,
    )
    if documents is None:
        return jax.vmap(kernel)(q, k, v)
    return jax.vmap(kernel)(q, k, v, library.SegmentIds(documents, documents))


def blocks(tokens: int) -> tuple[int, int]:
    """Return the tokens of a block, and of all blocks together."""
    for size in _BLOCKS:
        padded = -(-tokens // size) * size
        if padded - tokens <= _MOST_PADDING * tokens:
            break
    return size, padded
