"""Which part of each array a step of a program's grid is given.

The grid is (sequence, block of packs, block of tokens).

Shapes: B batch, T tokens in whole blocks, P packs, n groups, N blocks of tokens; see :mod:`ttt_jax.kernels.layout`.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ttt_jax.kernels.layout import LANES, Layout


class Blocks:
    """Parts of arrays.

    Args:
      shape: of q, [B, T, P * 128].
      backwards: from the last tokens to the first.
    """

    def __init__(self, layout: Layout, shape: Sequence[int], backwards: bool = False):
        self._layout = layout
        batch, tokens, _ = shape
        steps = tokens // layout.block_tokens
        self.grid = (batch, layout.packs // layout.block_packs, steps)
        self._at = (lambda t: steps - 1 - t) if backwards else (lambda t: t)

    def tokens(self) -> pl.BlockSpec:
        """Of [B, T, P * 128]"""
        block = (None, self._layout.block_tokens, self._layout.block_packs * LANES)
        return pl.BlockSpec(block, lambda i, j, t: (i, self._at(t), j))

    def rates(self) -> pl.BlockSpec:
        """Of [B, blocks of packs, T, heads of a block]"""
        layout = self._layout
        block = (None, None, layout.block_tokens, layout.block_packs * layout.pack)
        return pl.BlockSpec(block, lambda i, j, t: (i, j, self._at(t), 0))

    def of_sequence(self, x: Any) -> pl.BlockSpec:
        """Of [B, P, rows, lanes]"""
        return pl.BlockSpec((None, self._layout.block_packs, *x.shape[2:]), lambda i, j, t: (i, j, 0, 0))

    def of_groups(self, x: Any) -> pl.BlockSpec:
        """Of [B, n, P, rows, lanes]"""
        block = (None, self._layout.block_groups, self._layout.block_packs, *x.shape[3:])
        return pl.BlockSpec(block, lambda i, j, t: (i, self._at(t), j, 0, 0))

    def of_blocks(self, x: Any) -> pl.BlockSpec:
        """Of [B, N, P, rows, lanes]"""
        block = (None, None, self._layout.block_packs, *x.shape[3:])
        return pl.BlockSpec(block, lambda i, j, t: (i, self._at(t), j, 0, 0))

    def of_chain(self, rows: int, lanes: int, _: Any) -> pl.BlockSpec:
        """Of :meth:`chain_shape`"""
        block = (None, self._layout.block_packs, rows * self._layout.block_tokens, lanes)
        return pl.BlockSpec(block, lambda i, j, t: (i, j, self._at(t), 0))

    def chain_shape(self, rows: int, lanes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """[B, P, T * rows per token, lanes]"""
        batch, _, steps = self.grid
        shape = (batch, self._layout.packs, steps * self._layout.block_tokens * rows, lanes)
        return jax.ShapeDtypeStruct(shape, dtype)

    def of_packs(self, x: Any) -> pl.BlockSpec:
        """Of [P, rows, lanes]"""
        return pl.BlockSpec((self._layout.block_packs, *x.shape[1:]), lambda i, j, t: (j, 0, 0))

    def of_program(self, x: Any) -> pl.BlockSpec:
        """Of [B, blocks of packs, rows, lanes]"""
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, j, t: (i, j, 0, 0))

    def whole(self, x: Any) -> pl.BlockSpec:
        """Of [rows, lanes]"""
        return pl.BlockSpec(x.shape, lambda i, j, t: (0, 0))

    def of_mini_batches(self, x: Any) -> pl.BlockSpec:
        """Of [B, N, 1, mini-batches of a block], as scalars"""
        block = (None, None, *x.shape[2:])
        return pl.BlockSpec(block, lambda i, j, t: (i, self._at(t), 0, 0), memory_space=pltpu.SMEM)
