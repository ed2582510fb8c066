"""Lay heads and tokens out in the vector registers of a TPU, which have 8 rows of 128 lanes.

A *pack* is as many heads as fit side by side in 128 lanes: two of up to 64 features, or one of up to 128. Missing
features of a head and missing heads of a pack are zeros and stay zeros. The kernels read q, k and v as they are in
memory, [B, T, H * d]; nothing is transposed there.

A *group* is the mini-batches (64 tokens) between two updates of the weights that a kernel holds. A *block* is the
tokens and packs that a step of the grid gets. Columns that multiply the gradients of a group, and rows of these
gradients, are in the order (mini-batch, head of the pack, token).

Programs are written for one pack and one group. The functions that begin with ``read`` make a
:class:`~ttt_jax.kernels.weave.Read` of a part of an array in fast memory, those that begin with ``write`` or ``add`` a
:class:`~ttt_jax.kernels.weave.Write`; nothing is read or written before the program is woven.

Shapes: B batch, T tokens, H heads, d head width, P packs, s heads per pack, b tokens per mini-batch, L tokens per
group, n groups.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ttt_jax.kernels.weave import Read, Write

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


class Rows(NamedTuple):
    """The tokens of a group to read, from ``first`` to before ``stop``; scalars of a program."""

    first: Any
    stop: Any


def read_tokens(layout: Layout, refs: Tokens, p: int, i, only: Rows | None = None) -> Tokens:
    """Read the tokens of group i of pack p; tokens outside of ``only`` have rate 0."""
    rows = rows_of_group(layout, i)
    q, k, v = (read(ref.at[rows, lanes_of_pack(p)]) for ref in refs[:3])
    return Tokens(q, k, v, read_rows(layout, refs.eta.at[rows, heads_of_pack(layout, p)], only))


def write_tokens(layout: Layout, refs: Tokens, p: int, i, only: Rows | None = None) -> Tokens:
    """Write arrays of the tokens of group i of pack p, only in the rows of ``only``."""
    rows = rows_of_group(layout, i)
    q, k, v = (write_rows(layout, ref.at[rows, lanes_of_pack(p)], only) for ref in refs[:3])
    return Tokens(q, k, v, write_rows(layout, refs.eta.at[rows, heads_of_pack(layout, p)], only))


def read_shared(norm: Norm, coefficients: Any, p: int) -> tuple[Norm, Any]:
    """Read what all groups of pack p share."""
    return Norm(*(read(ref.at[p]) for ref in norm)), jax.tree.map(read, coefficients)


def chain_of_group(layout: Layout, ref: Any, p: int, i) -> Any:
    """Return the part for group i of pack p of a reference [P, rows per token * tokens of a block, lanes]."""
    rows = ref.shape[1] // layout.block_groups
    return ref.at[p, pl.ds(pl.multiple_of(i * rows, rows), rows)]


def read(ref: Any) -> Read:
    """Read a reference in float32."""
    return Read(ref.shape, jnp.float32, lambda: ref[...].astype(jnp.float32))


def read_rows(layout: Layout, ref: Any, only: Rows | None) -> Read:
    """Read the rows of ``only`` in float32, with zeros in the others; all rows for None."""
    if only is None:
        return read(ref)
    every = read(ref)
    return every._replace(read=lambda: jnp.where(_among(layout, ref.shape, only), every.read(), 0.0))


def read_as_stored(ref: Any) -> Read:
    """Read a reference in its own dtype."""
    return Read(ref.shape, ref.dtype, lambda: ref[...])


def write(ref: Any, over: Read | None = None) -> Write:
    """Write to a reference in its dtype; ``over`` is the read of the value that is overwritten."""

    def put(value):
        ref[...] = value.astype(ref.dtype)

    return Write(put, over)


def write_rows(layout: Layout, ref: Any, only: Rows | None) -> Write:
    """Write to the rows of ``only`` and leave the others; all rows for None."""
    if only is None:
        return write(ref)

    def put(value):
        old = ref[...].astype(jnp.float32)
        ref[...] = jnp.where(_among(layout, ref.shape, only), value.astype(jnp.float32), old).astype(ref.dtype)

    return Write(put)


DISCARD = Write(lambda value: None)


def add(ref: Any) -> Write:
    """Add to a reference."""

    def put(value):
        ref[...] += value

    return Write(put)


def rows_of_group(layout: Layout, i) -> Any:
    """Return the rows of the tokens of group i in a block."""
    return pl.ds(pl.multiple_of(i * layout.group_tokens, layout.group_tokens), layout.group_tokens)


def lanes_of_pack(p: int) -> slice:
    """Return the lanes of pack p in a block."""
    return slice(p * LANES, (p + 1) * LANES)


def heads_of_pack(layout: Layout, p: int) -> slice:
    """Return the columns of the heads of pack p in a block of rates."""
    return slice(p * layout.pack, (p + 1) * layout.pack)


def _among(layout: Layout, shape: tuple[int, int], only: Rows) -> jax.Array:
    """Return whether each row is among ``only``; the tokens of the group may repeat along the rows."""
    token = lax.broadcasted_iota(jnp.int32, shape, 0) & (layout.group_tokens - 1)
    return (token >= only.first) & (token < only.stop)
