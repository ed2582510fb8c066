"""Call the two programs of a fused inner loop: define their grid, the blocks of their arrays, and scratch memory.

The grid is (sequence, block of packs, block of tokens), the last of which runs in order: the weights stay in the fast
memory of the chip from one block of tokens to the next.

Shapes: B batch, T tokens in whole blocks, P packs, n groups, N blocks of tokens, m mini-batches of a block; see
:mod:`ttt_jax.kernels.layout`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ttt_jax.kernels import forward_backward as program_lib
from ttt_jax.kernels import restarts
from ttt_jax.kernels.forward_backward import Inputs, Kept, Program, take
from ttt_jax.kernels.layout import LANES, Layout
from ttt_jax.kernels.restarts import Stretches

_VMEM = 56 * 2**20  # bytes of fast memory that a program may use; chips have 128 MiB (v5e, v6e) or 64 MiB (v5p, v7x)
_PARAMETERS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM)


class Blocks:
    """The grid of a program, and the block of each array that a step of the grid gets.

    Args:
      shape: the shape of q, [B, T, P * 128].
      backwards: whether the grid goes from the last tokens to the first.
    """

    def __init__(self, layout: Layout, shape: Sequence[int], backwards: bool = False):
        self._layout = layout
        batch, tokens, _ = shape
        steps = tokens // layout.block_tokens
        self.grid = (batch, layout.packs // layout.block_packs, steps)
        self._at = (lambda t: steps - 1 - t) if backwards else (lambda t: t)

    def tokens(self) -> pl.BlockSpec:
        """Return the block of an array [B, T, P * 128]."""
        block = (None, self._layout.block_tokens, self._layout.block_packs * LANES)
        return pl.BlockSpec(block, lambda i, j, t: (i, self._at(t), j))

    def rates(self) -> pl.BlockSpec:
        """Return the block of an array [B, blocks of packs, T, heads of a block]."""
        layout = self._layout
        block = (None, None, layout.block_tokens, layout.block_packs * layout.pack)
        return pl.BlockSpec(block, lambda i, j, t: (i, j, self._at(t), 0))

    def per_sequence(self, x: Any) -> pl.BlockSpec:
        """Return the block of an array [B, P, rows, lanes]."""
        return pl.BlockSpec((None, self._layout.block_packs, *x.shape[2:]), lambda i, j, t: (i, j, 0, 0))

    def per_group(self, x: Any) -> pl.BlockSpec:
        """Return the block of an array [B, n, P, rows, lanes]."""
        block = (None, self._layout.block_groups, self._layout.block_packs, *x.shape[3:])
        return pl.BlockSpec(block, lambda i, j, t: (i, self._at(t), j, 0, 0))

    def per_block(self, x: Any) -> pl.BlockSpec:
        """Return the block of an array [B, N, P, rows, lanes]."""
        block = (None, None, self._layout.block_packs, *x.shape[3:])
        return pl.BlockSpec(block, lambda i, j, t: (i, self._at(t), j, 0, 0))

    def for_chain(self, rows: int, lanes: int, _: Any) -> pl.BlockSpec:
        """Return the block of an array of the shape of :meth:`chain_shape`."""
        block = (None, self._layout.block_packs, rows * self._layout.block_tokens, lanes)
        return pl.BlockSpec(block, lambda i, j, t: (i, j, self._at(t), 0))

    def chain_shape(self, rows: int, lanes: int, dtype: Any) -> jax.ShapeDtypeStruct:
        """Return the shape of an array of the chain, [B, P, T * rows per token, lanes]."""
        batch, _, steps = self.grid
        shape = (batch, self._layout.packs, steps * self._layout.block_tokens * rows, lanes)
        return jax.ShapeDtypeStruct(shape, dtype)

    def per_pack(self, x: Any) -> pl.BlockSpec:
        """Return the block of an array [P, rows, lanes]."""
        return pl.BlockSpec((self._layout.block_packs, *x.shape[1:]), lambda i, j, t: (j, 0, 0))

    def per_program(self, x: Any) -> pl.BlockSpec:
        """Return the block of an array [B, blocks of packs, rows, lanes]."""
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda i, j, t: (i, j, 0, 0))

    def whole(self, x: Any) -> pl.BlockSpec:
        """Return the block of an array [rows, lanes]: all of it."""
        return pl.BlockSpec(x.shape, lambda i, j, t: (0, 0))

    def per_mini_batch(self, x: Any) -> pl.BlockSpec:
        """Return the block of an array [B, N, 1, mini-batches of a block], in the memory for scalars."""
        block = (None, None, *x.shape[2:])
        return pl.BlockSpec(block, lambda i, j, t: (i, self._at(t), 0, 0), memory_space=pltpu.SMEM)


def forward(
    program: Program, inputs: Inputs, flags: jax.Array | None, *, keep: bool
) -> tuple[jax.Array, Any, Kept | None]:
    """Return the outputs z [B, T, P * 128] in the dtype of q, the state at the end, and with ``keep`` what was stored.

    Args:
      flags: [B, N, m], the mini-batches that restart, or None.
    """
    blocks = Blocks(program.numerics.layout, inputs.tokens.q.shape)
    arguments = inputs, _stretches(program, flags, program.unroll[0])
    state = tuple(inputs.state)
    shapes: list = [inputs.tokens.q, *state]
    specs = [blocks.tokens(), *(blocks.per_sequence(x) for x in state)]
    if keep:
        kept = _kept(program, blocks, state)
        shapes += [*kept.state, *kept.chain]
        specs += _specs_of_kept(program, blocks, kept)
    z, *rest = pl.pallas_call(
        partial(program_lib.forward, program, jax.tree.structure(arguments), keep),
        name=f"ttt_{_name(program)}_forward",
        grid=blocks.grid,
        in_specs=_specs_of(blocks, *arguments),
        out_specs=specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
        interpret=program.interpret,
        compiler_params=_PARAMETERS,
    )(*jax.tree.leaves(arguments))
    n = len(state)
    return z, type(inputs.state)(*rest[:n]), Kept(rest[n : 2 * n], rest[2 * n :]) if keep else None


def backward(
    program: Program, inputs: Inputs, flags: jax.Array | None, kept: Kept, dz: jax.Array, d_end: Any
) -> Inputs:
    """Return the gradients with respect to all inputs, from those of z and of the state at the end.

    The gradient of an input that sequences or packs share has axes for these, which the caller adds up.
    """
    blocks = Blocks(program.numerics.layout, inputs.tokens.q.shape, backwards=True)
    again = _stretches(program, flags, program.unroll[0]) if program.again else None
    arguments = inputs, (_stretches(program, flags, program.unroll[1]), again)
    structure, state, first = jax.tree.structure(inputs), tuple(inputs.state), tuple(inputs.first or ())
    norm = [jax.ShapeDtypeStruct((blocks.grid[0], *x.shape), x.dtype) for x in inputs.norm]
    coefficients = [jax.ShapeDtypeStruct((*blocks.grid[:2], *x.shape), x.dtype) for x in inputs.coefficients]
    shapes = (*inputs.tokens, *state, *norm, *coefficients, *first)
    results = pl.pallas_call(
        partial(program_lib.backward, program, jax.tree.structure(arguments), structure),
        name=f"ttt_{_name(program)}_backward",
        grid=blocks.grid,
        in_specs=[
            *_specs_of(blocks, *arguments, reads_state=False),
            *_specs_of_kept(program, blocks, kept),
            blocks.tokens(),
            *(blocks.per_sequence(x) for x in state),
        ],
        out_specs=[
            *[blocks.tokens()] * 3,
            blocks.rates(),
            *(blocks.per_sequence(x) for x in (*state, *norm)),
            *(blocks.per_program(x) for x in coefficients),
            *(blocks.per_sequence(x) for x in first),
        ],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
        scratch_shapes=_scratch(program, state, restarts=inputs.first is not None),
        interpret=program.interpret,
        compiler_params=_PARAMETERS,
    )(*jax.tree.leaves(arguments), *kept.state, *kept.chain, dz, *d_end)
    return take(results, structure)[0]


def _stretches(program: Program, flags: jax.Array | None, unroll: int) -> Stretches | None:
    return None if flags is None else restarts.stretches(program.numerics.layout, flags, unroll)


def _specs_of(blocks: Blocks, inputs: Inputs, stretches: Any, reads_state: bool = True) -> list[pl.BlockSpec]:
    """Return the blocks of the inputs; the backward program reads no state, which then takes no fast memory."""
    state = [blocks.per_sequence(x) if reads_state else pl.BlockSpec(memory_space=pl.ANY) for x in inputs.state]
    return [
        *[blocks.tokens()] * 3,
        blocks.rates(),
        *state,
        *(blocks.per_pack(x) for x in inputs.norm),
        *(blocks.whole(x) for x in inputs.coefficients),
        *(blocks.per_sequence(x) for x in inputs.first or ()),
        *(blocks.per_mini_batch(x) for x in jax.tree.leaves(stretches)),
    ]


def _specs_of_kept(program: Program, blocks: Blocks, kept: Kept) -> list[pl.BlockSpec]:
    if program.again:
        return [blocks.per_block(x) for x in kept.state]
    return [*(blocks.per_group(x) for x in kept.state), *(blocks.for_chain(*each) for each in program.chain)]


def _kept(program: Program, blocks: Blocks, state: Sequence[jax.Array]) -> Kept:
    """Return the shapes of the arrays to store.

    At the start of a block, weights are stored without rounding, because others are computed from them.
    """
    layout = program.numerics.layout
    batch, _, steps = blocks.grid
    if program.again:
        return Kept([jax.ShapeDtypeStruct((batch, steps, *x.shape[1:]), x.dtype) for x in state], [])
    groups = steps * layout.block_groups
    return Kept(
        [jax.ShapeDtypeStruct((batch, groups, *x.shape[1:]), _kept_dtype(program, x)) for x in state],
        [blocks.chain_shape(*each) for each in program.chain],
    )


def _scratch(program: Program, state: Sequence[jax.Array], restarts: bool) -> list:
    """Return the scratch memory of the backward program.

    A block that is computed again needs its weights and what is stored otherwise; restarts need the weights that a part
    of a group starts from.
    """
    layout = program.numerics.layout

    def weights(*groups):
        shapes = [(*groups, layout.block_packs, *x.shape[2:]) for x in state]
        return [pltpu.VMEM(shape, _kept_dtype(program, x)) for shape, x in zip(shapes, state, strict=True)]

    scratch = []
    if program.again:
        scratch += [pltpu.VMEM((layout.block_packs, *x.shape[2:]), x.dtype) for x in state]
        scratch += weights(layout.block_groups)
        scratch += [pltpu.VMEM((layout.block_packs, r * layout.block_tokens, n), of) for r, n, of in program.chain]
    if restarts:
        scratch += weights()
    return scratch


def _kept_dtype(program: Program, x: jax.Array) -> Any:
    """Return the dtype to store weights in; rounding matrices changes nothing, as they are read as operands only."""
    return program.numerics.operands if x.shape[2] == LANES else x.dtype


def _name(program: Program) -> str:
    return program.group.__module__.rpartition(".")[2]
