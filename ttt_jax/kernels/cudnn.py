"""Attend causally by the flash attention of cuDNN, on NVIDIA GPUs, through ``jax.nn.dot_product_attention``.

Shapes: B batch, T tokens, H heads, G heads of keys and values, d head width.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from ttt_jax.kernels.derivatives import differentiable_once

_ONCE = "attention by cuDNN has no second derivative; use model.attention.kernel=xla"
_DEVICES = ("NVIDIA A100", "NVIDIA H100", "NVIDIA H200")
_MOST_FEATURES = 128  # of a head, on every GPU that has the kernel


def choose(kernel: str, head_dim: int, dtype: jnp.dtype, device: str) -> bool:
    """Return whether attention is computed by cuDNN.

    Args:
      kernel: ``cudnn``, or another one. ``auto`` does not take it: it was never run on a GPU, and its backward pass may
        sum in another order every time.
      device: the kind of device, as JAX names it.

    Raises:
      ValueError: where ``cudnn`` is asked for, and cannot be used.
    """
    reason = unsupported(head_dim, dtype)
    if not device.startswith(_DEVICES):
        reason = f"it is used on {', '.join(_DEVICES)}, and not on {device}"
    if kernel == "cudnn" and reason is not None:
        raise ValueError(reason)
    return kernel == "cudnn"


def unsupported(head_dim: int, dtype: jnp.dtype) -> str | None:
    """Return why cuDNN does not compute heads of this width and dtype; None where it does."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {jnp.dtype(dtype).name}, and cuDNN computes in bfloat16 and float16"
    if head_dim % 8 or head_dim > _MOST_FEATURES:
        return f"heads have {head_dim} features, and cuDNN takes multiples of 8 up to {_MOST_FEATURES}"
    return None


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None = None,
    *,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """Return softmax attention of each token to itself and earlier ones, [B, T, H, d].

    Args:
      q: [B, T, H, d].
      k, v: [B, T, G, d], where G divides H.
      window: the number of tokens that a token sees, including itself; None: all.
      implementation: that of :func:`jax.nn.dot_product_attention`; ``xla`` runs everywhere.

    Raises:
      NotImplementedError: where the gradient is differentiated again.
    """
    q, k, v = differentiable_once((q, k, v), _ONCE)
    # The window of JAX counts the tokens before the token itself, and those after it.
    local = None if window is None else (window - 1, 0)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation=implementation)
    return differentiable_once(y, _ONCE)
