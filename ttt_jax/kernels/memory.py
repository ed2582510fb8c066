"""Read and write parts of the arrays in the fast memory of a chip, for one pack and one group.

The functions that begin with ``read`` make a :class:`~ttt_jax.kernels.weave.Read` of a reference, those that begin with
``write`` or ``add`` a :class:`~ttt_jax.kernels.weave.Write`; nothing is read or written before the program is woven.

Shapes: L tokens of a group, s heads per pack; see :mod:`ttt_jax.kernels.layout`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ttt_jax.kernels.layout import LANES, Layout, Norm, Tokens
from ttt_jax.kernels.weave import Read, Write


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
