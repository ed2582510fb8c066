"""Define the residual block, a sequence mixer and channel parts, each behind a norm: [B, T, D] to [B, T, D].

Shapes: B batch, T tokens, D width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.distributed.sharding import constrain
from ttt_jax.layers import conv as conv_lib
from ttt_jax.layers.mlp import SwiGLU
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.mixers.mixer import PLAIN, Context

CHANNELS = ("swiglu",)  # the parts of model.channel, which is "none" without any
NORMS = ("pre", "pre_post")  # values of model.norms


class BlockState(NamedTuple):
    """The state of a block between two pieces of its sequences."""

    conv: jax.Array | None
    mixer: Any


class Block(nn.Module):
    """``h += conv(norm h)`` with ``pre_conv``; ``h += mixer(norm h)``; ``h += channel(norm h)`` for each channel part.

    Attributes:
      channel: members of :data:`CHANNELS` in order; empty for a mixer that has its own feed-forward part.
      post_norm: whether the outputs of the mixer and the channel parts also pass a norm before they are added.
    """

    make_mixer: Callable[..., nn.Module]
    mlp_width: int
    dtype: jnp.dtype
    init_stddev: float
    norm_epsilon: float = 1e-6
    pre_conv: bool = False
    conv_width: int = 4
    channel: tuple[str, ...] = ("swiglu",)
    post_norm: bool = False

    @nn.compact
    def __call__(
        self, h: jax.Array, state: BlockState | None = None, context: Context = PLAIN
    ) -> tuple[jax.Array, BlockState | None]:
        """Return h [B, T, D] after the block, and its state after the tokens."""

        def norm(name: str, x: jax.Array) -> jax.Array:
            return RMSNorm(self.dtype, self.norm_epsilon, name=name)(x)

        def added(y: jax.Array) -> jax.Array:
            return h + context.blank(y)

        conv_state = mixer_state = None
        if state is not None:
            conv_state, mixer_state = state
        if self.pre_conv:
            conv = conv_lib.CausalConv(self.conv_width, self.dtype, name="conv")
            y, conv_state = conv(norm("conv_norm", h), conv_state, context)
            h = added(y)
        y, mixer_state = self.make_mixer(name="mixer")(norm("mixer_norm", h), mixer_state, context)
        h = added(norm("mixer_post_norm", y) if self.post_norm else y)
        for place, _ in enumerate(self.channel):
            name = "mlp" if place == 0 else f"mlp_{place + 1}"
            y = SwiGLU(self.mlp_width, self.dtype, self.init_stddev, name=name)(norm(f"{name}_norm", h))
            h = added(norm(f"{name}_post_norm", y) if self.post_norm else y)
        h = constrain(h, "batch", None, None)
        self.sow("hidden_states", "h", h, reduce_fn=lambda _, new: new)
        return h, None if state is None else BlockState(conv_state, mixer_state)

    def initial_state(self, batch: int, width: int, length: int) -> BlockState:
        """Return the state before the first token."""
        conv = conv_lib.initial_state(batch, self.conv_width, width, self.dtype) if self.pre_conv else None
        return BlockState(conv, self.make_mixer(parent=None).initial_state(batch, width, length))

    def state_axes(self) -> BlockState:
        """Return the names of the axes of the state."""
        conv = conv_lib.STATE_AXES if self.pre_conv else None
        return BlockState._make((conv, self.make_mixer(parent=None).state_axes()))


def channel_parts(text: str) -> tuple[str, ...]:
    """Return the channel parts that ``model.channel`` names, in order: ``none``, or names joined by +.

    Raises:
      ValueError: for a name that does not exist.
    """
    if text == "none":
        return ()
    parts = tuple(part.strip() for part in text.split("+"))
    if any(part not in CHANNELS for part in parts):
        raise ValueError(f"expected none, or one or more of {', '.join(CHANNELS)} joined by +")
    return parts
