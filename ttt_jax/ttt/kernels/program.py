"""The two programs of a fused inner loop, forward and backward, for any learner that says what a group is.

A program runs over a grid (sequence, block of packs, block of tokens), the last in order; the weights stay in the fast
memory of the chip from one block of tokens to the next. Forward, it keeps the weights that every group starts from, and
the chain of each group; or, to keep less, only the weights that every block of tokens starts from. Backward, it goes
through the groups from the last to the first, and differentiates each from what was kept, or from what it computes
again for the block: the derivative is that of the group itself, taken inside the kernel.

Shapes: B batch, T tokens in whole blocks, P packs, n groups, N blocks of tokens, s heads per pack; see
:mod:`ttt_jax.ttt.kernels.layout`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ttt_jax.ttt.kernels import access
from ttt_jax.ttt.kernels.blocks import Blocks
from ttt_jax.ttt.kernels.layout import LANES, Norm, Tokens
from ttt_jax.ttt.kernels.ops import Numerics
from ttt_jax.ttt.kernels.weave import weave

_VMEM = 56 * 2**20  # bytes of fast memory that a program may use; the chips have 128 MiB (v5e, v6e) or 64 (v5p, v7x)
_PARAMETERS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM)


class Inputs(NamedTuple):
    """What a program reads; see the functions of :mod:`ttt_jax.ttt.kernels.layout` that make them."""

    tokens: Tokens  # q, k, v [B, T, P * 128], eta [B, blocks of packs, T, heads of a block]
    state: Any  # a named tuple of arrays [B, P, ...]: the weights at the start
    norm: Norm  # [P, 1, 128]
    coefficients: Any  # a named tuple of arrays [rows, lanes]


class Saved(NamedTuple):
    """One array of what is kept of each group besides the weights it starts from."""

    rows: int  # per token
    lanes: int
    dtype: Any


class Program(NamedTuple):
    """How the programs compute.

    Attributes:
      group: of the learner: ``(numerics, state, tokens, norm, coefficients, chain) -> (state, z, chain)``, for a pack.
      derivative: of it: ``(numerics, state, tokens, norm, coefficients, chain, d_state, d_z)`` to those with respect to
        state, tokens, norm and coefficients. Matrices of the state and the chain come in the dtypes they are kept in.
      chain: what the chain is: arrays that a group can be computed from without waiting.
      numerics: layout and dtype of operands.
      unroll: forward and backward, groups that are computed together.
      stagger: forward and backward, cycles by which each pack starts after the one before.
      again: keep only the weights that blocks of tokens start from, and compute what is in a block again backwards.
      interpret: run as ordinary XLA operations, where there is no TPU.
    """

    group: Callable
    derivative: Callable
    chain: tuple[Saved, ...]
    numerics: Numerics
    unroll: tuple[int, int] = (1, 1)
    stagger: tuple[float, float] = (0.0, 0.0)
    again: bool = False
    interpret: bool = False


class Kept(NamedTuple):
    """What the backward program needs of the forward one, or computes again for a block."""

    state: Sequence[
        Any
    ]  # what groups start from [B, n, P, ...], matrices in the dtype of operands; or blocks, [B, N, P]
    chain: Sequence[Any]  # [B, P, rows, lanes]; none where it is computed again


def forward(program: Program, inputs: Inputs, *, keep: bool) -> tuple[jax.Array, Any, Kept | None]:
    """Outputs z [B, T, P * 128] in the dtype of q, the state at the end, and, where wanted, what was kept."""
    blocks = Blocks(program.numerics.layout, inputs.tokens.q.shape)
    structure, state = jax.tree.structure(inputs), tuple(inputs.state)
    shapes: list = [inputs.tokens.q, *state]
    specs = [blocks.tokens(), *(blocks.of_sequence(x) for x in state)]
    if keep:
        kept = _kept(program, blocks, state)
        shapes += [*kept.state, *kept.chain]
        specs += _specs_of_kept(program, blocks, kept)
    z, *rest = pl.pallas_call(
        partial(_forward, program, structure, keep),
        name=f"ttt_{_name(program)}_forward",
        grid=blocks.grid,
        in_specs=_specs_of(blocks, inputs),
        out_specs=specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes],
        interpret=program.interpret,
        compiler_params=_PARAMETERS,
    )(*jax.tree.leaves(inputs))
    n = len(state)
    return z, type(inputs.state)(*rest[:n]), Kept(rest[n : 2 * n], rest[2 * n :]) if keep else None


def backward(program: Program, inputs: Inputs, kept: Kept, dz: jax.Array, d_end: Any) -> Inputs:
    """Gradients with respect to all inputs, from those of z and of the state at the end. Those of what is shared by
    sequences or packs have axes for them, to be added up."""
    blocks = Blocks(program.numerics.layout, inputs.tokens.q.shape, backwards=True)
    structure, state = jax.tree.structure(inputs), tuple(inputs.state)
    norm = [jax.ShapeDtypeStruct((blocks.grid[0], *x.shape), x.dtype) for x in inputs.norm]
    coefficients = [jax.ShapeDtypeStruct((*blocks.grid[:2], *x.shape), x.dtype) for x in inputs.coefficients]
    results = pl.pallas_call(
        partial(_backward, program, structure),
        name=f"ttt_{_name(program)}_backward",
        grid=blocks.grid,
        in_specs=[
            *_specs_of(blocks, inputs, reads_state=False),
            *_specs_of_kept(program, blocks, kept),
            blocks.tokens(),
            *(blocks.of_sequence(x) for x in state),
        ],
        out_specs=[
            *[blocks.tokens()] * 3,
            blocks.rates(),
            *(blocks.of_sequence(x) for x in (*state, *norm)),
            *(blocks.of_program(x) for x in coefficients),
        ],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs.tokens, *state, *norm, *coefficients)],
        scratch_shapes=_scratch(program, blocks, state) if program.again else (),
        interpret=program.interpret,
        compiler_params=_PARAMETERS,
    )(*jax.tree.leaves(inputs), *kept.state, *kept.chain, dz, *d_end)
    return _take(results, structure)[0]


def _forward(program: Program, structure: Any, keep: bool, *refs) -> None:
    inputs, (z_ref, *rest) = _take(refs, structure)
    n = len(inputs.state)
    state_refs, kept = rest[:n], Kept(rest[n : 2 * n], rest[2 * n :])

    @pl.when(pl.program_id(2) == 0)
    def _():
        _copy(inputs.state, state_refs)

    if keep and program.again:
        _copy(state_refs, kept.state)
    _through_block(program, inputs, state_refs, z_ref, kept if keep and not program.again else None)


def _through_block(program: Program, inputs: Inputs, state_refs: Sequence, z_ref: Any, kept: Kept | None) -> None:
    """The groups of a block of tokens in order. Writes the weights after them over those before, and, where they are
    wanted, the outputs and what a derivative needs of each group."""
    layout, state_type = program.numerics.layout, type(inputs.state)
    unroll, wanted = program.unroll[0], (z_ref is not None, kept is not None)

    def groups(state, tokens, norm, coefficients):
        done = []
        for each in tokens:
            new, z, chain = program.group(program.numerics, state, each, norm, coefficients)
            done.append(_those((z, (state, chain)), wanted))
            state = new
        return state, done

    def body(step, _):
        indices = [step * unroll + u for u in range(unroll)]
        arguments, results = [], []
        for p in range(layout.block_packs):
            state = state_type(*(access.whole(ref.at[p]) for ref in state_refs))
            tokens = [access.tokens(layout, inputs.tokens, p, i) for i in indices]
            arguments.append((state, tokens, *access.shared(inputs.norm, inputs.coefficients, p)))
            end = state_type(*(access.into(ref.at[p], over) for ref, over in zip(state_refs, state, strict=True)))
            done = []
            for i in indices:
                z = access.into(z_ref.at[access.rows_of(layout, i), access.lanes_of(p)]) if z_ref is not None else None
                done.append(_those((z, _into_kept(program, kept, p, i)), wanted))
            results.append((end, done))
        weave(groups, arguments, results, program.stagger[0])
        return 0

    lax.fori_loop(0, layout.block_groups // unroll, body, 0)


def _into_kept(program: Program, kept: Kept | None, p: int, i) -> Any:
    if kept is None:
        return None
    layout = program.numerics.layout
    return (
        tuple(access.into(ref.at[i, p]) for ref in kept.state),
        tuple(access.into(access.chain(layout, ref, p, i)) for ref in kept.chain),
    )


def _backward(program: Program, structure: Any, *refs) -> None:
    inputs, rest = _take(refs, structure)
    n, state_type = len(inputs.state), type(inputs.state)
    m = 0 if program.again else len(program.chain)
    kept, dz_ref, d_end_refs = Kept(rest[:n], rest[n : n + m]), rest[n + m], rest[n + m + 1 : 2 * n + m + 1]
    (d_tokens, state_refs, *shared), scratch = _take(rest[2 * n + m + 1 :], structure)
    layout, unroll = program.numerics.layout, program.unroll[1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        _copy(d_end_refs, state_refs)
        for ref in jax.tree.leaves(shared):
            ref[...] = jnp.zeros_like(ref)

    if program.again:
        weights, at_start = scratch[:n], kept.state
        kept = Kept(scratch[n : 2 * n], scratch[2 * n :])
        _copy(at_start, weights)
        _through_block(program, inputs, weights, None, kept)

    def derivatives(d_state, norm, coefficients, groups):
        d_groups, d_shared = [], None
        for state, tokens, chain, dz in groups:
            inputs = state, tokens, norm, coefficients, chain
            d_state, d_tokens, *new = program.derivative(program.numerics, *inputs, d_state, dz)
            d_groups.append(d_tokens)
            d_shared = new if d_shared is None else jax.tree.map(jnp.add, d_shared, new)
        return d_state, d_shared, d_groups

    def body(step, _):
        indices = [layout.block_groups - 1 - step * unroll - u for u in range(unroll)]
        arguments, results = [], []
        for p in range(layout.block_packs):
            groups, d_groups = [], []
            for i in indices:
                state = state_type(*(access.as_kept(ref.at[i, p]) for ref in kept.state))
                chain = tuple(access.as_kept(access.chain(layout, ref, p, i)) for ref in kept.chain)
                dz = access.whole(dz_ref.at[access.rows_of(layout, i), access.lanes_of(p)])
                groups.append((state, access.tokens(layout, inputs.tokens, p, i), chain, dz))
                d_groups.append(access.into_tokens(layout, d_tokens, p, i))
            d_state = state_type(*(access.whole(ref.at[p]) for ref in state_refs))
            d_before = state_type(*(access.into(ref.at[p], x) for ref, x in zip(state_refs, d_state, strict=True)))
            arguments.append((d_state, *access.shared(inputs.norm, inputs.coefficients, p), groups))
            norm = Norm(*(access.onto(ref.at[p]) for ref in shared[0]))
            results.append((d_before, [norm, jax.tree.map(access.onto, shared[1])], d_groups))
        weave(derivatives, arguments, results, program.stagger[1])
        return 0

    lax.fori_loop(0, layout.block_groups // unroll, body, 0)


def _specs_of(blocks: Blocks, inputs: Inputs, reads_state: bool = True) -> list[pl.BlockSpec]:
    """Backwards the state is not read, and takes no fast memory: groups start from what was kept."""
    state = [blocks.of_sequence(x) if reads_state else pl.BlockSpec(memory_space=pl.ANY) for x in inputs.state]
    return [
        *[blocks.tokens()] * 3,
        blocks.rates(),
        *state,
        *(blocks.of_packs(x) for x in inputs.norm),
        *(blocks.whole(x) for x in inputs.coefficients),
    ]


def _specs_of_kept(program: Program, blocks: Blocks, kept: Kept) -> list[pl.BlockSpec]:
    if program.again:
        return [blocks.of_blocks(x) for x in kept.state]
    return [*(blocks.of_groups(x) for x in kept.state), *(blocks.of_chain(*each) for each in program.chain)]


def _kept(program: Program, blocks: Blocks, state: Sequence[jax.Array]) -> Kept:
    """Shapes of what is kept. At the start of a block weights are kept as they are: others are computed from them."""
    layout = program.numerics.layout
    batch, _, steps = blocks.grid
    if program.again:
        return Kept([jax.ShapeDtypeStruct((batch, steps, *x.shape[1:]), x.dtype) for x in state], [])
    groups = steps * layout.block_groups
    return Kept(
        [jax.ShapeDtypeStruct((batch, groups, *x.shape[1:]), _kept_dtype(program, x)) for x in state],
        [blocks.chain_shape(*each) for each in program.chain],
    )


def _scratch(program: Program, blocks: Blocks, state: Sequence[jax.Array]) -> list:
    """For a block that is computed again: its weights, and what is kept elsewhere."""
    layout = program.numerics.layout
    shapes = [(layout.block_packs, *x.shape[2:]) for x in state]
    return [
        *(pltpu.VMEM(shape, x.dtype) for shape, x in zip(shapes, state, strict=True)),
        *(pltpu.VMEM((layout.block_groups, *s), _kept_dtype(program, x)) for s, x in zip(shapes, state, strict=True)),
        *(pltpu.VMEM((layout.block_packs, r * layout.block_tokens, lanes), of) for r, lanes, of in program.chain),
    ]


def _kept_dtype(program: Program, x: jax.Array) -> Any:
    """Matrices are read as operands only, so rounding what groups start from changes nothing."""
    return program.numerics.operands if x.shape[2] == LANES else x.dtype


def _take(refs: Sequence, structure: Any) -> tuple[Inputs, Sequence]:
    """The first refs as :class:`Inputs`, and the others."""
    n = structure.num_leaves
    return jax.tree.unflatten(structure, refs[:n]), refs[n:]


def _those(values: Sequence, wanted: Sequence[bool]) -> list:
    return [x for x, yes in zip(values, wanted, strict=True) if yes]


def _copy(sources: Sequence, targets: Sequence) -> None:
    for source, target in zip(sources, targets, strict=True):
        target[...] = source[...]


def _name(program: Program) -> str:
    return program.group.__module__.rpartition(".")[2]
