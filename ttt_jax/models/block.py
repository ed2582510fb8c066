"""A residual block: a sequence mixer and a feed-forward layer, each behind a norm. [B, T, D] to [B, T, D]."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ttt_jax.layers import conv as conv_lib
from ttt_jax.layers.mlp import SwiGLU
from ttt_jax.layers.norm import RMSNorm
from ttt_jax.mixers.mixer import PLAIN, Context
from ttt_jax.parallel.activations import constrain


class BlockState(NamedTuple):
    """Where a block stands in its sequences."""

    conv: jax.Array | None
    mixer: Any


class Block(nn.Module):
    """``h += conv(norm h)`` with ``pre_conv``; ``h += mixer(norm h)``; ``h += mlp(norm h)``."""

    make_mixer: Callable[..., nn.Module]
    mlp_width: int
    dtype: jnp.dtype
    init_stddev: float
    norm_epsilon: float = 1e-6
    pre_conv: bool = False
    conv_width: int = 4

    @nn.compact
    def __call__(
        self, h: jax.Array, state: BlockState | None = None, context: Context = PLAIN
    ) -> tuple[jax.Array, BlockState | None]:
        def norm(name, x):
            return RMSNorm(self.dtype, self.norm_epsilon, name=name)(x)

        conv_state = mixer_state = None
        if state is not None:
            conv_state, mixer_state = state
        if self.pre_conv:
            conv = conv_lib.CausalConv(self.conv_width, self.dtype, name="conv")
            y, conv_state = conv(norm("conv_norm", h), conv_state)
            h = h + y
        y, mixer_state = self.make_mixer(name="mixer")(norm("mixer_norm", h), mixer_state, context)
        h = h + y
        h = h + SwiGLU(self.mlp_width, self.dtype, self.init_stddev, name="mlp")(norm("mlp_norm", h))
        h = constrain(h, "batch", None, None)
        self.sow("hidden_states", "h", h, reduce_fn=lambda _, new: new)
        return h, None if state is None else BlockState(conv_state, mixer_state)

    def initial_state(self, batch: int, width: int, length: int) -> BlockState:
        """The state before the first token."""
        conv = conv_lib.initial_state(batch, self.conv_width, width, self.dtype) if self.pre_conv else None
        return BlockState(conv, self.make_mixer(parent=None).initial_state(batch, width, length))

    def state_axes(self) -> BlockState:
        """The names of the axes of the state."""
        conv = conv_lib.STATE_AXES if self.pre_conv else None
        return BlockState._make((conv, self.make_mixer(parent=None).state_axes()))
