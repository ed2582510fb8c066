"""Lay heads and tokens out in the vector registers of a TPU, which have 8 rows of 128 lanes.

A *pack* is as many heads as fit side by side in 128 lanes: two of up to 64 features, or one of up to 128. Missing
features of a head and missing heads of a pack are zeros and stay zeros. The kernels read q, k and v as they are in
memory, [B, T, H * d]; nothing is transposed there.

A *group* is the mini-batches (64 tokens) between two updates of the weights that a kernel holds. A *block* is the
tokens and packs that a step of the grid gets. Columns that multiply the gradients of a group, and rows of these
gradients, are in the order (mini-batch, head of the pack, token).

Shapes: B batch, T tokens, H heads, d head width, P packs, s heads per pack, b tokens per mini-batch, L tokens per
group, n groups.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
GROUP_TOKENS = 64  # tokens of a group, for any b
_BLOCK_TOKENS = 256


class Layout(NamedTuple):
    """The layout of an inner loop.

    Attributes:
      heads, head_dim: H and d.
      mini_batch: b.
      most_packs: the largest number of packs in a block; more packs fill more pauses, and take more memory.
    """

    heads: int
    head_dim: int
    mini_batch: int
    most_packs: int = 8

    @property
    def slot(self) -> int:
        """Return the number of lanes of a head."""
        return LANES // 2 if self.head_dim <= LANES // 2 else LANES

    @property
    def pack(self) -> int:
        """Return s, the number of heads in a pack."""
        return LANES // self.slot

    @property
    def group(self) -> int:
        """Return the number of mini-batches in a group."""
        return max(1, GROUP_TOKENS // self.mini_batch)

    @property
    def group_tokens(self) -> int:
        """Return L, the number of tokens in a group."""
        return self.group * self.mini_batch

    @property
    def block_groups(self) -> int:
        """Return the number of groups in a block."""
        return max(1, _BLOCK_TOKENS // self.group_tokens)

    @property
    def block_tokens(self) -> int:
        """Return the number of tokens in a block."""
        return self.block_groups * self.group_tokens

    @property
    def block_packs(self) -> int:
        """Return the number of packs in a block, computed in lock-step so that each fills the pauses of the others."""
        wanted = math.ceil(self.heads / self.pack)
        return math.ceil(wanted / math.ceil(wanted / self.most_packs))

    @property
    def packs(self) -> int:
        """Return P, the number of packs, in whole blocks."""
        return math.ceil(self.heads / self.pack / self.block_packs) * self.block_packs


def supported(head_dim: int, mini_batch: int) -> bool:
    """Return whether a layout exists: up to 128 features, and mini-batches that divide a group and fill registers."""
    return head_dim <= LANES and mini_batch % 8 == 0 and GROUP_TOKENS % mini_batch == 0


def pack_heads(layout: Layout, x: jax.Array, axis: int) -> jax.Array:
    """Split axis H of an array into axes [P, s], with zeros for missing heads."""
    missing = layout.packs * layout.pack - layout.heads
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], layout.packs, layout.pack, *x.shape[axis + 1 :])


def pack_features(layout: Layout, x: jax.Array, axis: int) -> jax.Array:
    """Pad axis d of an array to the lanes of a head, with zeros."""
    missing = layout.slot - layout.head_dim
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def pack_tokens(layout: Layout, x: jax.Array) -> jax.Array:
    """Pack tokens, [B, T, H, d] to [B, T', P * 128], with T' in whole blocks."""
    x = pack_heads(layout, pack_features(layout, _whole_blocks(layout, x), 3), 2)
    return x.reshape(*x.shape[:2], layout.packs * LANES)


def unpack_tokens(layout: Layout, x: jax.Array, tokens: int) -> jax.Array:
    """Undo :func:`pack_tokens`, [B, T', P * 128] to [B, T, H, d]."""
    x = x.reshape(*x.shape[:2], layout.packs * layout.pack, layout.slot)
    return x[:, :tokens, : layout.heads, : layout.head_dim]


def pack_rates(layout: Layout, token_eta: jax.Array) -> jax.Array:
    """Pack rates of tokens, [B, T, H] to [B, blocks of packs, T', heads of a block].

    Tokens that fill up the last block have rate 0, so that they take no step.
    """
    x = pack_heads(layout, _whole_blocks(layout, token_eta), 2)
    batch, tokens = x.shape[:2]
    return x.reshape(batch, tokens, -1, layout.block_packs * layout.pack).transpose(0, 2, 1, 3)


def pack_features_in_lanes(layout: Layout, x: jax.Array, axis: int) -> jax.Array:
    """Lay heads side by side, [..., H, 1, d] to [..., P, 1, 128], with H at ``axis``."""
    x = pack_heads(layout, pack_features(layout, x, x.ndim - 1), axis)
    return x.reshape(*x.shape[:axis], layout.packs, 1, LANES)


class Coefficients(NamedTuple):
    """The factor by which the step of a token (column) has moved the weights that another token (row) sees.

    The step is the gradient times the rate of the token. Columns are (mini-batch, head, token), equal for each head.
    """

    keys: Any  # [L, s * L], for the key of the row: the last position rate for tokens of earlier mini-batches
    queries: Any  # [L, s * L], for its query: also its own position rate for tokens of its mini-batch up to itself
    end: Any  # [1, 128], for all after the group: the last position rate, in all lanes


def coefficients(layout: Layout, position_eta: jax.Array) -> Coefficients:
    """Return the coefficients of a group from the rates [b] of the positions in a mini-batch."""
    b, tokens = layout.mini_batch, layout.group_tokens
    token = jnp.arange(tokens)
    source = jnp.broadcast_to(token.reshape(-1, 1, b), (layout.group, layout.pack, b)).reshape(-1)  # of a column
    before = source[None, :] // b < token[:, None] // b
    same = (source[None, :] // b == token[:, None] // b) & (source[None, :] <= token[:, None])
    last = position_eta[b - 1]
    earlier = jnp.where(before, last, 0.0)
    by_position = jnp.tile(position_eta, layout.group)[:, None]
    return Coefficients(earlier, earlier + jnp.where(same, by_position, 0.0), jnp.broadcast_to(last, (1, LANES)))


class Tokens(NamedTuple):
    """The tokens of a group in one pack: arrays, references, or reads and writes of these."""

    q: Any  # [L, 128]
    k: Any
    v: Any
    eta: Any  # [L, s]


class Norm(NamedTuple):
    """The LN of a pack, [1, 128] each."""

    scale: Any
    bias: Any


def _whole_blocks(layout: Layout, x: jax.Array) -> jax.Array:
    """Append zeros after the last token, [B, T, ...] to [B, T', ...]."""
    missing = -x.shape[1] % layout.block_tokens
    return jnp.pad(x, [(0, missing if i == 1 else 0) for i in range(x.ndim)]) if missing else x
