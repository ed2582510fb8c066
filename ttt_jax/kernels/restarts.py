"""Divide a sequence into stretches of mini-batches that a program reads together, where mini-batches restart at W0.

A group is computed from one W, so it cannot contain a restart. A *step* of a program is the groups that it computes
together. A step in which no mini-batch restarts, except perhaps its first one, is one stretch, and is computed as
without restarts. Any other step is read group by group, and each group from one restart to the next. Such a stretch is
computed as its whole group with rate 0 for the tokens outside of it: they take no step, so the stretch does not depend
on them, and only the rows of the stretch are written.

Shapes: B batch, N blocks of tokens, m mini-batches per block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ttt_jax.kernels.layout import Layout, Rows


class Stretches(NamedTuple):
    """The stretch of each mini-batch of a block, int32 [B, N, 1, m]; in a program, references to a block of these."""

    first: Any  # the first mini-batch of its stretch
    stop: Any  # the first mini-batch after its stretch
    fresh: Any  # 1 where the mini-batch begins at W0, else 0


def flags_by_block(layout: Layout, restarts: jax.Array, blocks: int) -> jax.Array:
    """Return the flags of mini-batches [B, n] by block, int32 [B, N, m], with 0 where the last block is filled up."""
    per_block = layout.block_tokens // layout.mini_batch
    batch, n = restarts.shape
    flags = jnp.pad(restarts.astype(jnp.int32), ((0, 0), (0, blocks * per_block - n)))
    return flags.reshape(batch, blocks, per_block)


def stretches(layout: Layout, restarts: jax.Array, unroll: int) -> Stretches:
    """Return the stretches of sequences with flags [B, N, m], for steps of ``unroll`` groups."""
    per_block, per_step = restarts.shape[-1], unroll * layout.group
    index = jnp.arange(per_block)
    inside = (restarts * (index % per_step > 0)).reshape(*restarts.shape[:2], -1, per_step)
    split = jnp.repeat(inside.max(-1) > 0, per_step, -1)  # [B, N, m], whether the step has more than one stretch
    begins = (restarts > 0) | (index % per_step == 0) | (split & (index % layout.group == 0))
    first = lax.cummax(jnp.where(begins, index, 0), axis=2)
    ends = jnp.roll(begins, -1, 2)  # each block begins with a stretch, so each block ends with one
    stop = lax.cummin(jnp.where(ends, index + 1, per_block), axis=2, reverse=True)
    return Stretches(*(x[:, :, None].astype(jnp.int32) for x in (first, stop, restarts)))


def for_each(
    layout: Layout,
    of_block: Any,
    unroll: int,
    step: Callable[[Any, Any], None],
    part: Callable[[Any, Any, Rows], None],
    backwards: bool = False,
) -> None:
    """Go through the stretches of a block, inside a program.

    Args:
      of_block: :class:`Stretches`, references to [1, m]; None without restarts.
      unroll: groups per step.
      step: reads a whole step; called with the number of steps before it, and whether its first mini-batch restarts.
      part: reads a stretch inside a group; called with the group, whether its first mini-batch restarts, and its rows.
      backwards: whether to go from the last stretch to the first.
    """
    steps, per_step = layout.block_groups // unroll, unroll * layout.group

    def part_of(first, stop):
        group = lax.div(first, layout.group)
        rows = Rows(*((x - group * layout.group) * layout.mini_batch for x in (first, stop)))
        part(group, of_block.fresh[0, first] > 0, rows)

    def next_part(start):
        stop = of_block.stop[0, start]
        part_of(start, stop)
        return stop

    def part_before(stop):
        first = of_block.first[0, stop - 1]
        part_of(first, stop)
        return first

    def body(turn, _):
        if of_block is None:
            step(turn, None)
            return 0
        start = (steps - 1 - turn if backwards else turn) * per_step
        stop = start + per_step

        def parts():
            if backwards:
                lax.while_loop(lambda at: at > start, part_before, stop)
            else:
                lax.while_loop(lambda at: at < stop, next_part, start)

        whole = of_block.stop[0, start] == stop
        pl.when(whole)(lambda: step(turn, of_block.fresh[0, start] > 0))
        pl.when(jnp.logical_not(whole))(parts)
        return 0

    lax.fori_loop(0, steps, body, 0)
