"""Parts of the arrays in the fast memory of a chip, for one pack and one group: what is read, and what is written.

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
    """The tokens of a group that are read, from the first to before the last; scalars of a program."""

    first: Any
    stop: Any


def tokens(layout: Layout, refs: Tokens, p: int, i, only: Rows | None = None) -> Tokens:
    """Group i of pack p, as :class:`Read`; with rate 0 for rows that are not among those to read."""
    rows = rows_of(layout, i)
    q, k, v = (whole(ref.at[rows, lanes_of(p)]) for ref in refs[:3])
    return Tokens(q, k, v, only_rows(layout, refs.eta.at[rows, heads_of(layout, p)], only))


def into_tokens(layout: Layout, refs: Tokens, p: int, i, only: Rows | None = None) -> Tokens:
    """The same, as :class:`Write`."""
    rows = rows_of(layout, i)
    q, k, v = (into_rows(layout, ref.at[rows, lanes_of(p)], only) for ref in refs[:3])
    return Tokens(q, k, v, into_rows(layout, refs.eta.at[rows, heads_of(layout, p)], only))


def shared(norm: Norm, coefficients: Any, p: int) -> tuple[Norm, Any]:
    """What all groups of pack p have in common."""
    return Norm(*(whole(ref.at[p]) for ref in norm)), jax.tree.map(whole, coefficients)


def chain(layout: Layout, ref: Any, p: int, i) -> Any:
    """Group i of pack p of [P, rows per token * tokens of a block, lanes]"""
    rows = ref.shape[1] // layout.block_groups
    return ref.at[p, pl.ds(pl.multiple_of(i * rows, rows), rows)]


def whole(ref: Any) -> Read:
    """In float32."""
    return Read(ref.shape, jnp.float32, lambda: ref[...].astype(jnp.float32))


def only_rows(layout: Layout, ref: Any, only: Rows | None) -> Read:
    """In float32, with zeros in other rows; all rows for None."""
    if only is None:
        return whole(ref)
    every = whole(ref)
    return every._replace(read=lambda: jnp.where(_among(layout, ref.shape, only), every.read(), 0.0))


def as_kept(ref: Any) -> Read:
    """In its own dtype."""
    return Read(ref.shape, ref.dtype, lambda: ref[...])


def into(ref: Any, over: Read | None = None) -> Write:
    """In place of what is there."""

    def write(value):
        ref[...] = value.astype(ref.dtype)

    return Write(write, over)


def into_rows(layout: Layout, ref: Any, only: Rows | None) -> Write:
    """In place of what is there in some rows; in all of them for None."""
    if only is None:
        return into(ref)

    def write(value):
        old = ref[...].astype(jnp.float32)
        ref[...] = jnp.where(_among(layout, ref.shape, only), value.astype(jnp.float32), old).astype(ref.dtype)

    return Write(write)


NOWHERE = Write(lambda value: None)


def onto(ref: Any) -> Write:
    """Added to what is there."""

    def write(value):
        ref[...] += value

    return Write(write)


def rows_of(layout: Layout, i) -> Any:
    """Of the tokens of group i."""
    return pl.ds(pl.multiple_of(i * layout.group_tokens, layout.group_tokens), layout.group_tokens)


def lanes_of(p: int) -> slice:
    """Of pack p."""
    return slice(p * LANES, (p + 1) * LANES)


def heads_of(layout: Layout, p: int) -> slice:
    """Of pack p."""
    return slice(p * layout.pack, (p + 1) * layout.pack)


def _among(layout: Layout, shape: tuple[int, int], only: Rows) -> jax.Array:
    """Whether the token of a row is read, of rows that are the tokens of a group once or more."""
    token = lax.broadcasted_iota(jnp.int32, shape, 0) & (layout.group_tokens - 1)
    return (token >= only.first) & (token < only.stop)
