"""Parts of the arrays in the fast memory of a chip, for one pack and one group: what is read, and what is written.

Shapes: L tokens of a group, s heads per pack; see :mod:`ttt_jax.ttt.kernels.layout`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from ttt_jax.ttt.kernels.layout import LANES, Layout, Norm, Tokens
from ttt_jax.ttt.kernels.weave import Read, Write


def tokens(layout: Layout, refs: Tokens, p: int, i) -> Tokens:
    """Group i of pack p, as :class:`Read`."""
    rows = rows_of(layout, i)
    q, k, v = (whole(ref.at[rows, lanes_of(p)]) for ref in refs[:3])
    return Tokens(q, k, v, whole(refs.eta.at[rows, heads_of(layout, p)]))


def into_tokens(layout: Layout, refs: Tokens, p: int, i) -> Tokens:
    """The same, as :class:`Write`."""
    rows = rows_of(layout, i)
    q, k, v = (into(ref.at[rows, lanes_of(p)]) for ref in refs[:3])
    return Tokens(q, k, v, into(refs.eta.at[rows, heads_of(layout, p)]))


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


def as_kept(ref: Any) -> Read:
    """In its own dtype."""
    return Read(ref.shape, ref.dtype, lambda: ref[...])


def into(ref: Any, over: Read | None = None) -> Write:
    """In place of what is there."""

    def write(value):
        ref[...] = value.astype(ref.dtype)

    return Write(write, over)


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
