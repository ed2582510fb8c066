"""Attend causally by splash attention, the fused kernel for TPUs that comes with JAX.

Blocks of logits stay in fast memory, forwards and backwards, and blocks that no query of a block sees are skipped.

Shapes: B batch, T tokens, H heads, G heads of keys and values, d head width.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library

from ttt_jax.kernels.derivatives import differentiable_once

KERNELS = ("auto", "xla", "splash")
_ONCE = "splash attention has no second derivative; use model.attention.kernel=xla"
_BLOCKS = (1024, 512, 256, 128)  # tokens; the largest is the fastest by the schedule of a v5e
_MOST_PADDING = 1 / 8  # of the tokens


# By the schedule of a v5e for 12 heads of 64 features, forward and backward: at 2k tokens attention in blocks by XLA
# takes 277 us, since its logits stay in fast memory, and splash 611, with the blocks that it skips; at 8k it is 19.4
# and 9.0 ms.
FROM_TOKENS = 8192


def choose(kernel: str, tokens: int, head_dim: int, dtype: jnp.dtype, device: str) -> bool:
    """Return whether attention is computed by the kernel.

    Args:
      kernel: one of :data:`KERNELS`.
      tokens: T.
      device: the kind of device, as JAX names it.

    Raises:
      ValueError: where ``splash`` is asked for, and cannot be used.
    """
    reason = unsupported(head_dim, dtype) if device.startswith("TPU") else f"there is none for {device}"
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
    *,
    name: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return softmax attention of each token to itself and earlier ones, [B, T, H, d].

    Args:
      q: [B, T, H, d].
      k, v: [B, T, G, d], where G divides H.
      window: the number of tokens that a token sees, including itself; None: all.
      name: a name for what the backward pass needs of the forward kernel, by which rematerialisation may keep it.
      interpret: whether to run the kernel without a TPU.

    Raises:
      NotImplementedError: where the gradient is differentiated again.
    """
    tokens, heads = q.shape[1:3]
    block, padded = _block(tokens)
    shape = (padded, padded)
    # The window of the library counts the tokens before the token itself.
    mask = library.CausalMask(shape) if window is None else library.LocalMask(shape, (window - 1, 0), 0)
    kernel = library.make_splash_mha_single_device(
        library.MultiHeadMask([mask] * heads),
        block_sizes=library.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=name,
        interpret=interpret,
    )
    q, k, v = differentiable_once((q, k, v), _ONCE)
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)

    def laid_out(x: jax.Array) -> jax.Array:
        """Return x as [B, heads, padded, d]; no token sees the padding, which is behind all tokens."""
        return jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))).swapaxes(1, 2)

    y = differentiable_once(jax.vmap(kernel)(laid_out(scaled), laid_out(k), laid_out(v)), _ONCE)
    return y.swapaxes(1, 2)[:, :tokens]


def _block(tokens: int) -> tuple[int, int]:
    """Return the tokens of a block, and of all blocks together."""
    for block in _BLOCKS:
        padded = -(-tokens // block) * block
        if padded - tokens <= _MOST_PADDING * tokens:
            break
    return block, padded
